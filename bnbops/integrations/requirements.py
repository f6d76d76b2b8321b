"""Whether optional libraries are there, and are late enough. Which ones, pyproject.toml says once, by extra."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from bnbops.versions import REQUIREMENTS, minimum, release


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
    """Of all extras."""
    for text in REQUIREMENTS:
        named, _, condition = text.partition(";")
        package, versions = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(.*?)\s*$", named).groups()
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
