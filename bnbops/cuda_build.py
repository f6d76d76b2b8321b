"""What a library of CUDA kernels was built with, and for which GPUs: read from the file, which need not be loadable."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

OLDEST_CAPABILITY = (8, 0)  # Ampere: what the kernels are written for


@dataclass(frozen=True)
class CudaBuild:
    toolkit: str  # the version of nvcc, such as "13.0.88"
    architectures: tuple[str, ...]
    """As CMake has them: "90-real" is machine code for compute capability 9.0, "120-virtual" PTX for 12.0 and later,
    "90" both."""

    @property
    def capabilities(self) -> str:
        """For people: "8.0, 9.0, and later ones by PTX of 9.0"."""
        real = [a for a in self.architectures if not a.endswith("-virtual")]
        virtual = [a for a in self.architectures if not a.endswith("-real")]
        names = [_dotted(a) for a in real] + [f"and later ones by PTX of {_dotted(a)}" for a in virtual[-1:]]
        return ", ".join(names)

    def has_code_for(self, capability: tuple[int, int]) -> bool:
        """Machine code runs on GPUs of its generation, from its own compute capability on ("90a" on that alone); PTX
        on all later ones, which their driver compiles it for."""
        return any(_runs_on(architecture, capability) for architecture in self.architectures)


def of_library(path: Path) -> CudaBuild | None:
    """None if the file does not say, as that of an older bnbops."""
    said = re.compile(rb"bnbops-cuda-build toolkit=([\w.]+) architectures=([\w,.-]+)\0")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = said.search(content)
        return None if found is None else CudaBuild(found[1].decode(), tuple(found[2].decode().split(",")))


def _parts(architecture: str) -> tuple[tuple[int, int], str, str]:
    """Compute capability, suffix and kind."""
    matched = re.fullmatch(r"(\d+)([af]?)-?(real|virtual|)", architecture)
    assert matched is not None, f"CMake takes no architecture {architecture!r}"
    number, suffix, kind = matched.groups()
    return (int(number[:-1]), int(number[-1])), suffix, kind


def _dotted(architecture: str) -> str:
    (major, minor), suffix, _ = _parts(architecture)
    return f"{major}.{minor}{suffix}"


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    own, suffix, kind = _parts(architecture)
    if suffix == "a":
        return capability == own
    same_generation = capability[0] == own[0] and capability >= own
    return same_generation or (kind != "real" and suffix == "" and capability >= own)
