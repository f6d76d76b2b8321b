"""Messages of `require` for libraries that are missing or too old."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable

import pytest

from bnbops import versions
from bnbops.versions import require


@pytest.fixture
def needed(monkeypatch) -> Callable[..., None]:
    """Declares libraries as pyproject.toml does, or what is installed of them."""

    def declare(text: str, found: str | None = None) -> None:
        monkeypatch.setattr(versions, "REQUIREMENTS", ["torch>=2.10", f'{text}; extra == "hf"'])
        if found is not None:
            monkeypatch.setattr(versions, "version", lambda package: found)

    return declare


@pytest.mark.parametrize(
    ("found", "minimum"),
    [("5.23.0", "5.23"), ("5.23", "5.23.0"), ("5.100.1", "5.23"), ("6.0.0.dev0", "5.23"), ("2.13.0+cpu", "2.13")],
)
def test_a_late_enough_version_passes(needed, found, minimum):
    needed(f"somelib<7,>={minimum}", found)
    require("somelib", "Its layers")


@pytest.mark.parametrize(("found", "minimum"), [("5.9.1", "5.23"), ("0.19", "0.21"), ("4", "5.23"), ("", "1")])
def test_an_early_version_is_named(needed, found, minimum):
    needed(f"somelib<7,>={minimum}", found)
    message = rf"Its layers: .* needs somelib {minimum} or later, found {found}: pip install 'bnbops\[hf\]'"
    with pytest.raises(ImportError, match=message):
        require("somelib", "Its layers")


@pytest.mark.parametrize(
    ("text", "wanted"), [("no-such-lib>=1.0", "no-such-lib 1.0 or later"), ("no-such-lib", "no-such-lib")]
)
def test_a_missing_library_is_named(needed, text, wanted):
    needed(text)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-lib")
    with pytest.raises(ImportError, match=f"needs {wanted}, which is not installed: pip install"):
        require("no-such-lib", "Anything")


def test_requirements_are_those_of_the_project_file():
    extras = {(needed.extra, needed.package): needed.minimum for needed in versions.requirements()}
    assert extras[("hf", "transformers")] == "5.23" and extras[("hf", "peft")] == "0.21"
    assert extras[("hf", "safetensors")] == extras[("encoder", "safetensors")] == "0"


def test_an_old_transformers_is_refused_at_import(monkeypatch):
    import bnbops.integrations.transformers as module

    monkeypatch.setattr(versions, "version", lambda package: "4.57.1")
    message = r"bnbops\.integrations\.transformers: bnbops needs transformers 5\.23 or later, found 4\.57\.1"
    with pytest.raises(ImportError, match=message):
        importlib.reload(module)


IMPORTS = """
import sys
import bnbops
others = {"transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "bitsandbytes"}
assert not others & sys.modules.keys(), others & sys.modules.keys()
import bnbops.integrations.transformers
assert not {"transformers.trainer", "peft", "trl", "datasets", "bitsandbytes"} & sys.modules.keys()
"""


def test_nothing_is_imported_unasked():
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
