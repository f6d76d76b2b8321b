"""Builds and loads the CUDA kernels for the CPU: `torch.ops.bnbops_cuda_on_cpu.*`."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMESPACE = "bnbops_cuda_on_cpu"
KERNELS = f"lib{NAMESPACE}.so"
BUILT = "CUDA_ON_CPU_LIBRARY"  # environment variable: a library that was built elsewhere, to be loaded as it is


def build(sanitizer: str | None = None, product: str = KERNELS) -> Path:
    """The shared library, or another product, built if it is not up to date. `sanitizer`: "address" (with undefined
    behavior) or "thread". Concurrent callers wait for one another."""
    folder, path = ROOT / "build" / NAMESPACE, f"{sanitizer or 'plain'}/{product}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        _run("cmake", "-S", HERE, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
        _run("cmake", "--build", folder, "--target", path)
    return folder / path


def _run(*command: str | Path) -> None:
    scripts = Path(sys.executable).parent  # cmake and ninja may be installed beside Python
    env = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    env.pop("LD_PRELOAD", None)  # a sanitizer is for the tests, not for compilers
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


def load(sanitizer: str | None = None) -> torch._ops._OpNamespace:
    """The operators."""
    torch.ops.load_library(os.environ.get(BUILT) or str(build(sanitizer)))
    return getattr(torch.ops, NAMESPACE)
