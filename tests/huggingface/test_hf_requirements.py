"""Messages of `require` for libraries that are missing or too old."""

import importlib.metadata
import subprocess
import sys

import pytest

from bnbops.integrations import requirements
from bnbops.integrations.requirements import require


@pytest.mark.parametrize(
    ("found", "minimum"),
    [("5.23.0", "5.23"), ("5.23", "5.23.0"), ("5.100.1", "5.23"), ("6.0.0.dev0", "5.23"), ("2.13.0+cpu", "2.13")],
)
def test_a_late_enough_version_passes(monkeypatch, found, minimum):
    monkeypatch.setattr(requirements, "version", lambda package: found)
    require("somelib", minimum, "Its layers")


@pytest.mark.parametrize(("found", "minimum"), [("5.9.1", "5.23"), ("0.19", "0.21"), ("4", "5.23"), ("", "1")])
def test_an_early_version_is_named(monkeypatch, found, minimum):
    monkeypatch.setattr(requirements, "version", lambda package: found)
    message = rf"Its layers: .* needs somelib {minimum} or later, found {found}: pip install 'bnbops\[hf\]'"
    with pytest.raises(ImportError, match=message):
        require("somelib", minimum, "Its layers")


def test_a_missing_library_is_named():
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-library")
    with pytest.raises(ImportError, match=r"needs no-such-library 1.0 or later, which is not installed: pip install"):
        require("no-such-library", "1.0", "Anything")


def test_an_old_transformers_is_refused_at_import(monkeypatch):
    import bnbops.integrations.transformers as module

    monkeypatch.setattr(requirements, "version", lambda package: "4.57.1")
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
