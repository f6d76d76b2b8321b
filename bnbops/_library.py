"""Finds and loads the compiled operators."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ISAS = ("baseline", "avx2", "avx512", "amx")  # what isa() may say, the best one last

NO_CUDA_KERNELS = "bnbops was built without CUDA kernels: install nvcc (the CUDA toolkit) and reinstall bnbops"
_BUILD_HERE = "build it on this machine, by `pip install .` in its sources"

implementations = torch.library.Library("bnbops", "IMPL")  # all that Python adds to the operators
_cuda: Path | str = "this torch has no CUDA"  # the loaded library, or why there is none


def _find(name: str, search: Iterable[str]) -> Path | None:
    """The file `lib/lib<name>.*` beside the package. An editable install has it in site-packages, not beside the
    sources, so all of the package's `__path__` is searched."""
    paths = (Path(folder) / "lib" / f"lib{name}{suffix}" for folder in search for suffix in (".so", ".dylib", ".dll"))
    return next(filter(Path.exists, paths), None)


def load_operators(search: list[str]) -> None:
    """Registers `torch.ops.bnbops.*`.

    Raises:
        ImportError: the library is not built, or does not load; says what to do.
    """
    path = _find("bnbops_cpu", search)
    if path is None and sys.platform != "linux":
        raise ImportError(f"bnbops runs on Linux, this is {sys.platform}: on Windows, use WSL; elsewhere, a container")
    if path is None:
        raise ImportError(
            "bnbops is not built: libbnbops_cpu is missing. Install it with `pip install .` (or `pip install -e .` to "
            f"work on it) in the folder of its pyproject.toml. Looked in: {', '.join(f'{p}/lib' for p in search)}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(_refused(path, error)) from error


def load_cuda_operators(search: list[str]) -> bool:
    """Registers the CUDA kernels where torch has CUDA, and tells whether they are there. Where they are not, operators
    on CUDA tensors say why; the CPU's are not concerned."""
    if torch.version.cuda is None:
        return False
    path = _find("bnbops_cuda", search)
    if path is None:
        _refuse_cuda(NO_CUDA_KERNELS)
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why = _refused(path, error)
        _refuse_cuda(why)
        warnings.warn(f"bnbops runs on the CPU only: {why}", RuntimeWarning, stacklevel=2)
        return False
    global _cuda
    _cuda = path
    return True


def _refused(path: Path, error: OSError) -> str:
    """What to do about a library that the loader refuses, and the loader's words; torch's own only name the file."""
    reason = str(error.__cause__ or error)
    too_old = re.search(r"version `(GLIBC|GLIBCXX|CXXABI)_[\d.]+' not found", reason)
    foreign = "invalid ELF header" in reason or "wrong ELF class" in reason or "file too short" in reason
    if too_old:
        name = "glibc" if too_old[1] == "GLIBC" else "libstdc++"
        advice = f"this system's {name} is older than the one it was built with, so {_BUILD_HERE}"
    elif foreign:
        advice = f"it is damaged, or for another kind of machine: {_BUILD_HERE}"
    else:
        advice = f"reinstall bnbops, or {_BUILD_HERE}"
    return f"{path.name} does not load under torch {torch.__version__}: {advice} ({reason})"


def _refuse_cuda(why: str) -> None:
    """Registers kernels that raise: torch's own error would only say that there are none."""
    global _cuda
    _cuda = why

    def kernel(name: str) -> Callable[..., None]:
        def refuse(*_args: object, **_kwargs: object) -> None:
            raise NotImplementedError(f"bnbops::{name}: {why}")

        return refuse

    for name in device_operators():
        implementations.impl(name, kernel(name), "CUDA")


def device_operators() -> list[str]:
    """The operators that need a kernel for each device, "op" or "op.overload"."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name.removeprefix("bnbops::") for name in names if name.startswith("bnbops::"))


def operator(name: str) -> torch._ops.OpOverload:
    """The operator "op" or "op.overload"."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bnbops, packet), overload or "default")


def defaults(overload: torch._ops.OpOverload) -> dict[str, Any]:
    """Of the arguments that have one, by name."""
    return {a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()}


def library_path() -> Path:
    """The shared library of the operators and their CPU kernels. A program without Python that loads it (`dlopen`)
    beside libtorch has `bnbops::*`: docs/export.md."""
    path = _find("bnbops_cpu", sys.modules[__package__].__path__)
    assert path is not None, "it was found when bnbops was imported"
    return path


def find_cuda_library() -> Path | None:
    """The shared library of the CUDA kernels, loaded or not."""
    return _find("bnbops_cuda", sys.modules[__package__].__path__)


def cuda_problem() -> str | None:
    """Why the CUDA kernels are not loaded; None if they are."""
    return _cuda if isinstance(_cuda, str) else None


def cuda_library() -> Path:
    """The shared library of the CUDA kernels.

    Raises:
        NotImplementedError: it is not loaded; says why.
    """
    if isinstance(_cuda, str):
        raise NotImplementedError(f"bnbops has no CUDA kernels here: {_cuda}")
    return _cuda


def isa() -> str:
    """The CPU instruction set in use: "baseline", "avx2", "avx512" or "amx" (avx512 and tiles for matrix products).

    The best one of this machine, unless the environment variable `BNBOPS_ISA` named another before the import. All of
    them give the same bits, but for products of matrices.

    Raises:
        RuntimeError: `BNBOPS_ISA` names one that this machine or build lacks.
    """
    return torch.ops.bnbops.isa()
