"""Runs tests against kernels that a sanitizer watches:

    PYTHONPATH=tests python -m cuda_on_cpu.sanitize address|thread -- ARGUMENTS OF PYTEST

address: accesses out of bounds (also of tensors), misaligned ones, overflows and other undefined behavior.
thread: data races within a block. About 100 times slower than without, so it wants small tensors.

The exit status is not 0 if a test fails or the sanitizer has found something.
"""

import argparse
import os
import shutil
import subprocess
import sys

from cases.backends import SANITIZER
from cuda_on_cpu import library

COMPILER = os.environ.get("CXX", "c++")
OPTIONS = {
    # Python frees little at its end. Signal handlers are pytest's.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:handle_abort=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # Python and torch are not instrumented: nothing can be said about races in them.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1", "OMP_NUM_THREADS": "1"},
}
RUNTIMES = {"address": ["asan"], "thread": ["tsan"]}


def runtime(library: str) -> str:
    """The path of a library that comes with the compiler."""
    return subprocess.check_output([COMPILER, f"-print-file-name=lib{library}.so"], text=True).strip()


def environment(sanitizer: str) -> dict[str, str]:
    """For a Python process that loads a library built with the sanitizer.

    The sanitizer's runtime must come first in the process, and it needs the C++ library, whose exceptions it follows.
    """
    preloaded = [runtime(name) for name in [*RUNTIMES[sanitizer], "stdc++"]]
    return {**os.environ, **OPTIONS[sanitizer], SANITIZER: sanitizer, "LD_PRELOAD": " ".join(preloaded)}


def run_pytest(sanitizer: str, arguments: list[str]) -> int:
    """Runs pytest in one process, as the sanitizer speaks through the process's exit status; gives that."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--capture=sys", *arguments]
    if sanitizer == "thread" and shutil.which("setarch"):
        command = ["setarch", "--addr-no-randomize", *command]  # its shadow memory has a fixed place
    return subprocess.run(command, env=environment(sanitizer)).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="cuda_on_cpu.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("sanitizer", choices=OPTIONS)
    parser.add_argument("--product", default=library.KERNELS, help="what to build first (default: %(default)s)")
    parser.add_argument("pytest", nargs="+", metavar="ARGUMENT", help="what pytest gets, after --")
    chosen = parser.parse_args()
    library.build(chosen.sanitizer, chosen.product)  # here, where the compiler runs without the sanitizer
    return run_pytest(chosen.sanitizer, chosen.pytest)


if __name__ == "__main__":
    sys.exit(main())
