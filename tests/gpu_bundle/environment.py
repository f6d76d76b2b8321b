"""The first stage: what the machine has, and whether the library runs on it. If not, one sentence says what to do.

bnbops is imported within functions: without torch, which may be what is missing, it is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

from gpu_bundle.events import Events

TORCH = (2, 10)
BUNDLE = "BNBOPS_GPU_REPORT_BUNDLE"  # environment variable: what the bundle says of itself, as JSON


class Unusable(Exception):
    """The library cannot run here; says why and what to do."""


def check_torch(version: str, cuda: str | None) -> None:
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("+")[0].split(".")[:2])
    if numbers < TORCH:
        raise Unusable(f"torch {version} is too old: bnbops needs torch 2.10 or later (pip install 'torch>=2.10')")
    if cuda is None:
        raise Unusable(f"torch {version} is without CUDA: install one with CUDA (https://pytorch.org/get-started)")


def check_driver(driver_cuda: str | None, toolkit: str) -> None:
    """Any driver of the same major version of CUDA runs what a toolkit built."""
    from bnbops.report import too_old

    if too_old(driver_cuda, toolkit or None):
        raise Unusable(
            f"the NVIDIA driver is for CUDA {driver_cuda} and the bundle was built by CUDA {toolkit}: update the "
            f"driver, or make the bundle with a toolkit of CUDA {driver_cuda.partition('.')[0]}"
        )


def check_architecture(capability: tuple[int, int], architectures: Sequence[str], name: str) -> None:
    """Of the bundle's kernels there is code for this GPU."""
    from bnbops.cuda_build import CudaBuild

    have = capability[0] * 10 + capability[1]
    if architectures and not CudaBuild("", tuple(architectures)).has_code_for(capability):
        raise Unusable(
            f"the bundle has kernels for compute capability {', '.join(architectures)} and {name} has {have}: make it "
            f"again with `make gpu-bundle CUDA_ARCHITECTURES={have}`"
        )


def without_gpu() -> str:
    """Why torch finds none."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"no GPU: {' '.join(str(error).split())}"
    return "no GPU: torch finds no CUDA device (is the driver loaded, and CUDA_VISIBLE_DEVICES right?)"


def software() -> dict[str, Any]:
    facts: dict[str, Any] = {"Python": platform.python_version(), "machine": platform.machine()}
    facts["C library"] = " ".join(platform.libc_ver())
    for name in ("torch", "triton", "numpy", "bitsandbytes", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    facts["C compiler"] = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    return facts


def hardware() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    clock, width = (getattr(found, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))  # kHz, bits
    return {
        "GPU": found.name,
        "GPUs": torch.cuda.device_count(),
        "compute capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory GB": round(found.total_memory / 1e9, 1),
        "bandwidth GB/s": round(2 * clock * 1e3 * width / 8 / 1e9) or None,  # two transfers a clock
    }


def of_driver(driver: dict[str, str | None] | None) -> dict[str, Any]:
    """`report.driver`'s answer."""
    return {"driver": driver and driver["version"], "driver's CUDA": driver and driver["cuda"]}


def look(events: Events, dry_run: bool, bundle: dict[str, Any]) -> None:
    events.tell(facts=software())
    try:
        import torch
    except ImportError as error:
        raise Unusable(
            f"torch does not load ({error}): install torch>=2.10 with CUDA, or name a Python that has it"
        ) from None
    events.tell(facts={"torch's CUDA": torch.version.cuda})
    check_torch(torch.__version__, "dry run" if dry_run else torch.version.cuda)
    if not dry_run and not torch.cuda.is_available():
        raise Unusable(without_gpu())
    if not dry_run:
        events.tell(facts=hardware())
    import bnbops
    from bnbops import report

    events.tell(facts={"bnbops": bnbops.__version__, "instruction set": bnbops.isa()})
    if dry_run:
        return
    driver = report.driver()
    events.tell(facts=of_driver(driver))
    check_driver(driver and driver["cuda"], bundle.get("CUDA toolkit") or "")
    check_architecture(
        torch.cuda.get_device_capability(), bundle.get("architectures") or [], torch.cuda.get_device_name()
    )
    if not bnbops.has_cuda:
        raise Unusable("this bnbops has no CUDA kernels: make the bundle where nvcc is (docs/cuda.md)")
    torch.ops.bnbops.squared_norms([torch.ones(1000, device="cuda")])
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    dry_run = parser.parse_args().dry_run
    events = Events()
    bundle = json.loads(os.environ.get(BUNDLE) or "{}")
    for name in events.plan(["the library runs here"]):
        events.run(name, lambda: look(events, dry_run, bundle))
    events.tell(done=True)


if __name__ == "__main__":
    main()
