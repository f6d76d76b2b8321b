"""The stages of a run, in their order, and how the time is shared.

A stage must be over when the shares of all up to it are used up: what one leaves, the next ones get. The benchmarks
come last; what they leave goes to stages that were cut off.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

# What the kernels compute, by family: the tests that `make test-gpu` runs besides those named in STAGES.
KERNEL_TESTS = (
    *("quantize", "quantize_4bit", "golden_4bit", "int8_ops", "int8_bad_input", "embedding_4bit_ops"),
    *("rules", "rules_edges", "directions", "codecs", "norms", "percentile_clip", "nan_bits"),
)
PRODUCT_TESTS = ("linear_4bit_ops", "grouped_linear_4bit_ops", "linear_int8")
GPU, SIMULATOR = "cuda", "cuda_on_cpu"  # backends of tests/cases/backends.py
REDUCED = "8"  # in a dry run, whose kernels are a thousand times slower: every eighth test


@dataclass(frozen=True)
class Stage:
    """What one process does. `tests`: files or tests of pytest, with `-k` expressions that choose among them; else
    `module` of this package. `patience`: seconds without a sign of life after which it hangs."""

    name: str
    title: str
    share: float  # seconds of a run of 480
    tests: tuple[str, ...] = ()
    chosen: str = ""
    module: str = ""
    large: bool = False  # a dry run takes every eighth test
    patience: float = 60.0

    def command(self, dry_run: bool) -> list[str]:
        """For a process in the root of the bundle (or of the repository)."""
        if self.module:
            return [sys.executable, "-B", "-m", f"gpu_bundle.{self.module}", *["--dry-run"] * dry_run]
        backend = SIMULATOR if dry_run else GPU
        pytest = [sys.executable, "-B", "-m", "pytest", "-p", "gpu_bundle.pytest_events", "-p", "no:cacheprovider"]
        choice = ["-k", self.chosen] if self.chosen else []
        reduced = ["--every", REDUCED] if dry_run and self.large else []
        return [*pytest, "-q", "--backends", backend, *reduced, *choice, *self.tests]


def files(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"tests/ops/test_{name}.py" for name in names)


ON_CUDA, ON_GPU = ("tests/cuda/test_on_cuda.py",), ("tests/cuda/test_gpu.py",)
STAGES = (
    Stage("environment", "the machine, and whether the library runs on it", 60, module="environment"),
    Stage("self-check", "every operator, against plain torch", 40, ON_CUDA, "test_self_check"),
    Stage("bits", "every operator, against the CPU's bits", 40, ON_CUDA, "test_same_bits"),
    Stage("layers", "Linear4bit, Linear8bitLt and experts, against dense layers", 20, ON_CUDA, "dense"),
    Stage("optimizers", "steps of every optimizer, against the CPU's bits", 25, ON_CUDA, "optimizers"),
    Stage("graphs", "CUDA graphs, streams, paged states", 35, ON_GPU, "not sanitizer and not compiled"),
    Stage(
        "compile",
        "compiled_train_step and torch.compile of layers",
        60,
        (*ON_CUDA, *ON_GPU),
        "compile",
        patience=90,
    ),
    Stage("kernels", "sweeps of each kernel family, against naive references", 70, files(KERNEL_TESTS), large=True),
    Stage("products", "sweeps of products with quantized weights", 30, files(PRODUCT_TESTS), large=True),
    Stage("sanitizer", "NVIDIA's compute-sanitizer on the operators", 70, module="sanitizer", patience=120),
    Stage("benchmarks", "speed, each candidate verified first", 60, module="speed", patience=120),
)
