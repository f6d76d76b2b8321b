"""Which bnbops this is, which Python, torch and optional libraries it needs, and what an older torch lacks.

Nothing here imports torch before `check_environment` has looked for it.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version

try:
    _METADATA = metadata("bnbops")  # of pyproject.toml
except PackageNotFoundError:
    raise ImportError(
        "bnbops is not installed, only its sources are here: run `pip install .` (or `pip install -e .` to work on it) "
        "in the folder of its pyproject.toml"
    ) from None

BNBOPS = _METADATA["Version"]
REQUIREMENTS: list[str] = _METADATA.get_all("Requires-Dist") or []

FEATURES = {"compiled_train_step": "2.11"}
"""What needs a later torch than bnbops itself does, as messages call it, and the first release that will do."""


def release(text: str) -> list[int]:
    """The numbers at the front: of "5.23.0rc1", 5 and 23. A release candidate counts as its release."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    parts = [int(number) for number in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def minimum(requirement: str) -> str:
    """Of "torch>=2.10,<3" or of ">=2.10", "2.10"; "0" if it names none."""
    found = re.search(r">=\s*([\w.]+)", requirement)
    return found[1] if found else "0"


OLDEST_PYTHON = minimum(_METADATA["Requires-Python"])
OLDEST_TORCH = minimum(next(text for text in REQUIREMENTS if re.match(r"torch\b", text)))


def check_environment() -> None:
    """Looks for what `import bnbops` cannot do without, before the loader meets it somewhere inside.

    Raises:
        ImportError: Python or torch is too old, or there is no torch; says which is needed.
    """
    python = platform.python_version()
    if release(python) < release(OLDEST_PYTHON):
        raise ImportError(f"bnbops needs Python {OLDEST_PYTHON} or later, this is Python {python}")
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(_needs_torch("bnbops", OLDEST_TORCH, "which is not installed")) from None
    if not torch_is(OLDEST_TORCH):
        raise ImportError(_needs_torch("bnbops", OLDEST_TORCH, f"this is torch {torch.__version__}"))


def torch_is(minimum: str) -> bool:
    """Whether this torch is at least such as "2.13"; a build on the way to that release counts as it."""
    import torch

    return release(torch.__version__) >= release(minimum)


def require_torch_for(feature: str) -> None:
    """Refuses one of `FEATURES` that needs a later torch than this one.

    Raises:
        NotImplementedError: says which torch it needs.
    """
    if not torch_is(FEATURES[feature]):
        import torch

        raise NotImplementedError(_needs_torch(feature, FEATURES[feature], f"this is torch {torch.__version__}"))


def _needs_torch(what: str, minimum: str, state: str) -> str:
    return f"{what} needs torch {minimum} or later, {state}: pip install 'torch>={minimum}'"


# ---- optional libraries ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requirement:
    """Of an extra: `pip install 'bnbops[hf]'` brings transformers."""

    extra: str
    package: str  # as pip has it
    versions: str  # ">=5.23,<6", or nothing

    @property
    def minimum(self) -> str:
        return minimum(self.versions)

    @property
    def found(self) -> str | None:
        """The version that is installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def problem(self) -> str | None:
        """What is wrong with what is there: "which is not installed", "found 4.57.1"; or None."""
        found = self.found
        if found is None:
            return "which is not installed"
        return f"found {found}" if release(found) < release(self.minimum) else None

    def __str__(self) -> str:
        return self.package if self.minimum == "0" else f"{self.package} {self.minimum} or later"


def requirements() -> Iterator[Requirement]:
    """Of all extras, as pyproject.toml has them."""
    for text in REQUIREMENTS:
        named, _, condition = text.partition(";")
        ((package, versions),) = re.findall(r"^([\w.-]+)(?:\[[^]]*\])?\s*(.*?)\s*$", named)
        for extra in re.findall(r"extra == ['\"](\w+)['\"]", condition):
            yield Requirement(extra, package, versions.strip("()"))


def require(package: str, what: str) -> None:
    """Refuses a library that is missing or too old, before its import fails somewhere inside.

    Args:
        package: its name as pip has it; one that an extra brings.
        what: that needs it, the subject of the message, such as "LoRA layers".

    Raises:
        ImportError: it says what is there, and how to get what is needed.
    """
    needed = next(needed for needed in requirements() if needed.package == package)
    if needed.problem is not None:
        raise ImportError(f"{what}: bnbops needs {needed}, {needed.problem}: pip install 'bnbops[{needed.extra}]'")
