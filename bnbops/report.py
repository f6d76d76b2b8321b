"""What is installed here, what it can use, and what is missing for what: the facts that `python -m bnbops` prints."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path
from typing import Any

import torch

import bnbops
from bnbops import cuda_build, versions
from bnbops._library import ISAS, cuda_problem, find_cuda_library

_FOR_USERS = {"hf": "Hugging Face's libraries", "examples": "examples", "encoder": "the encoder example"}  # by extra
_DRIVER = Path("/proc/driver/nvidia/version")


def collect() -> dict[str, Any]:
    """All but the results of the operators' checks, as docs/troubleshooting.md describes it; JSON can hold it."""
    found = {
        "bnbops": bnbops.__version__,
        "python": {"version": platform.python_version(), "needs": f">={versions.OLDEST_PYTHON}"},
        "torch": {"version": torch.__version__, "needs": f">={versions.OLDEST_TORCH}", "cuda": torch.version.cuda},
        "platform": platform.platform(),
        "cpu": {
            "processor": platform.machine(),
            "isa": bnbops.isa(),
            "available": torch.ops.bnbops.isas(),
            "threads": torch.get_num_threads(),
        },
        "cuda": _cuda(),
        "features": {
            what: {"needs_torch": f">={first}", "available": versions.torch_is(first)}
            for what, first in versions.FEATURES.items()
        },
        "extras": _extras(),
    }
    return {**found, "missing": missing(found)}


# ---- what is there ---------------------------------------------------------------------------------------------


def _cuda() -> dict[str, Any]:
    library = find_cuda_library()
    build = None if library is None else cuda_build.of_library(library)
    return {
        "library": None if library is None else str(library),
        "loaded": bnbops.has_cuda,
        "problem": cuda_problem(),
        "toolkit": build and build.toolkit,
        "architectures": build and list(build.architectures),
        "driver": driver(),
        "devices": [_device(i, build) for i in range(torch.cuda.device_count())],
    }


def _device(i: int, build: cuda_build.CudaBuild | None) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(i)
    capability = (properties.major, properties.minor)
    return {
        "name": properties.name,
        "capability": f"{capability[0]}.{capability[1]}",
        "memory": properties.total_memory,
        "has_code": build is not None and build.has_code_for(capability),
    }


def driver() -> dict[str, str | None] | None:
    """NVIDIA's driver: its version, and that of the latest CUDA that it runs. None if there is no driver."""
    try:
        number = ctypes.c_int(0)
        found = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0
    except OSError:
        found = False
    version = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", _DRIVER.read_text()) if _DRIVER.exists() else None
    if not found and version is None:
        return None
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}" if found else None
    return {"version": version and version[1], "cuda": cuda}


def _extras() -> dict[str, dict[str, dict[str, Any]]]:
    extras: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in _FOR_USERS}
    for needed in versions.requirements():
        if needed.extra in extras:
            facts = {"needs": needed.versions, "found": needed.found, "problem": needed.problem}
            extras[needed.extra][needed.package] = facts
    return extras


# ---- what is not -----------------------------------------------------------------------------------------------


def missing(found: dict[str, Any]) -> list[str]:
    """A sentence for each thing that could be had: for what it is missing, and how to get it."""
    version = found["torch"]["version"]
    needed = {what: it["needs_torch"] for what, it in found["features"].items() if not it["available"]}
    later = [f"{what}: needs torch{x}, this is {version}: pip install 'torch{x}'" for what, x in needed.items()]
    return [*_missing_cpu(found["cpu"]), *_missing_cuda(found), *later, *_missing_extras(found["extras"])]


def _missing_cpu(cpu: dict[str, Any]) -> list[str]:
    said, best = [], cpu["available"][-1]
    if cpu["isa"] != best:
        said.append(f"CPU kernels: BNBOPS_ISA chose {cpu['isa']}; without it they use {best}, which is faster")
    lacking = [isa for isa in ISAS if isa not in cpu["available"]]
    if lacking and cpu["processor"] in ("x86_64", "AMD64"):
        said.append(f"CPU kernels for {', '.join(lacking)}: this processor or its system lacks them")
    elif lacking:
        said.append(f"CPU kernels for {', '.join(lacking)}: they are for x86-64, this is {cpu['processor']}")
    return said


def _missing_cuda(found: dict[str, Any]) -> list[str]:
    cuda = found["cuda"]
    if found["torch"]["cuda"] is None:
        problem = "this torch has no CUDA: install one that has (https://pytorch.org/get-started)"
    elif cuda["problem"] is not None:
        problem = cuda["problem"]
    elif cuda["driver"] is None:
        problem = "there is no NVIDIA driver: install it where there is a GPU"
    elif too_old(cuda["driver"]["cuda"], cuda["toolkit"]):
        problem = (
            f"the NVIDIA driver runs CUDA {cuda['driver']['cuda']} at most, and CUDA {cuda['toolkit']} built bnbops: "
            f"update the driver, or reinstall bnbops with an older nvcc"
        )
    elif not cuda["devices"]:
        problem = "torch sees no GPU: `nvidia-smi` and CUDA_VISIBLE_DEVICES tell which there are"
    else:
        return [_without_code(i, device, cuda) for i, device in enumerate(cuda["devices"]) if not device["has_code"]]
    return [f"CUDA kernels: {problem}"]


def too_old(driver_cuda: str | None, toolkit: str | None) -> bool:
    """A driver runs what any toolkit of its major version built."""
    if driver_cuda is None or toolkit is None:
        return False
    return versions.release(driver_cuda)[0] < versions.release(toolkit)[0]


def _without_code(i: int, device: dict[str, Any], cuda: dict[str, Any]) -> str:
    gpu = f"CUDA kernels on GPU {i} ({device['name']}, compute capability {device['capability']})"
    oldest = ".".join(map(str, cuda_build.OLDEST_CAPABILITY))
    if versions.release(device["capability"]) < versions.release(oldest):
        return f"{gpu}: bnbops needs {oldest} (Ampere) or later"
    there = cuda_build.CudaBuild("", tuple(cuda["architectures"] or ()))
    return (
        f"{gpu}: this build has code for {there.capabilities or 'others'}: reinstall bnbops with "
        "`pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native`"
    )


def _missing_extras(extras: dict[str, Any]) -> list[str]:
    said = []
    for extra, packages in extras.items():
        wrong = [f"{name}{it['needs']} ({it['problem']})" for name, it in packages.items() if it["problem"]]
        if wrong:
            said.append(f"{_FOR_USERS[extra]}: {', '.join(wrong)}: pip install 'bnbops[{extra}]'")
    return said
