"""A stage: NVIDIA's compute-sanitizer over samples of every operator."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from gpu_bundle.events import Events, Skipped

TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
SECONDS = 10  # for a tool's operators
LIMIT = 60  # for a tool
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
_PLACES = ("/usr/local/cuda/bin",)


def find() -> str | None:
    """The machine's own, else the one in the bundle."""
    bundled = [str(folder) for path in sys.path for folder in Path(path or ".").glob("nvidia/*/bin")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *_PLACES, *bundled]))


def watch(sanitizer: str, tool: str, command: list[str], folder: Path, seconds: float | None = None) -> str:
    """Runs a command whose kernels of bnbops a tool watches, without torch's caching of memory, which would hide what
    lies beside; gives its output.

    Raises:
        Found: what the tool found, or that the command failed.
        Skipped: the tool itself does not run here, or not in so many seconds.
    """
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=bnbops"]
    with subprocess.Popen(
        [sanitizer, *options, *command],
        cwd=folder,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Skipped(f"compute-sanitizer took longer than {seconds:g} seconds") from None
    print(output, flush=True)
    refuse(output, process.returncode)
    return output


class Found(Exception):
    """Something is wrong with a kernel."""


def refuse(output: str, status: int) -> None:
    """Raises, as `watch` does, if that is what a tool said."""
    lines, summaries = output.splitlines(), _SUMMARY.findall(output)
    if not summaries:
        raise Skipped(f"compute-sanitizer does not run here: {' '.join(lines[-3:]) or f'status {status}'}")
    if int(summaries[-1]):
        raise Found("\n".join([line for line in lines if line.startswith("========= ")][1:12]))
    if status:
        raise Found("\n".join(["the operators fail while they are watched:", *lines[-10:]]))


def check_operators(seconds: float) -> int:
    """The first samples of as many operators as there is time for, on the GPU; the status is 1 if one is wrong."""
    from bnbops._library import device_operators
    from bnbops.testing import self_check
    from bnbops.testing.samples import samples

    begin, names, wrong = time.monotonic(), device_operators(), []
    for i, name in enumerate(names):
        if time.monotonic() - begin > seconds:
            names = names[:i]
            break
        wrong += [found for sample in samples(name, "cuda")[:4] if (found := self_check.check(name, sample))]
    print(*wrong, f"{len(names)} of {len(device_operators())} operators", sep="\n", flush=True)
    return 1 if wrong else 0


def check(tool: str, dry_run: bool) -> str:
    """Says how many operators the tool has watched."""
    if dry_run:
        raise Skipped("not in a dry run: compute-sanitizer watches a GPU (make test-cuda-sanitize: the simulator)")
    sanitizer = find()
    if sanitizer is None:
        raise Skipped("compute-sanitizer (of the CUDA toolkit) is neither installed nor in the bundle")
    inner = [sys.executable, "-B", "-m", "gpu_bundle.sanitizer", "--operators", str(SECONDS)]
    return next(re.finditer(r"\d+ of \d+ operators", watch(sanitizer, tool, inner, Path.cwd(), LIMIT)))[0]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--operators", type=float, metavar="SECONDS", help="be what a tool watches")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.operators:
        return check_operators(args.operators)
    events = Events()
    for tool in events.plan(list(TOOLS)):
        events.run(tool, partial(check, tool, args.dry_run))
    events.tell(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
