"""Optimizer states larger than the memory limit: what paging them to a disk costs (Linux).

Every candidate trains in a process of its own: bf16 parameters of 32 layers, each of which steps as soon as its
gradient is there, so that one gradient exists at a time. The limit is RLIMIT_DATA, on private memory: what torch,
parameters and gradient take, plus a little. It leaves the page cache alone, so the states stay in memory as long as
there is some to spare; for the other extreme, one candidate has them written to the disk and taken out of memory before
each step (msync, then MADV_PAGEOUT: the kernel's own reclaim). What lies between shows in a container with a limit on
all memory, where the system ends the unpaged ones.

First it verifies: all candidates end with the same parameters. The table has the median of the steps after the first;
a ratio of 1 is as fast as unpaged. "file": pages of files in memory before a step, a part of it torch's own; "read":
from the disk in a step. Candidates run one after the other: on a busy machine, run it twice.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from measure import VerificationError, count
from torch import Tensor, nn

import bnbops.optim
from bnbops.optim.paging.paged import PagedMemory

LAYERS = 32
WIDTH = 1024
SLACK = 2**28  # bytes of private memory beyond torch, parameters and gradient
MADV_PAGEOUT = 21  # Linux 5.4; not in Python's mmap
MIB = 2**20

# name: paged, limited, paged out before each step
CANDIDATES = {
    "unpaged, no limit": (False, False, False),
    "unpaged, limited": (False, True, False),
    "paged, limited": (True, True, False),
    "paged, limited, paged out": (True, True, True),
}
BASELINE = "unpaged, no limit"
COLUMNS = ["states", "first step, s", "step, s", "ratio", "paging out, s", "private, MiB", "file, MiB", "read, MiB"]


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def bytes_read() -> int:
    """What this process has had read from disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]


def page_out(tensors: list[Tensor]) -> None:
    """Writes tensors to their files and takes their pages out of memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    for x in tensors:
        start = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        span = ctypes.c_void_p(start), ctypes.c_size_t(x.data_ptr() + x.nbytes - start)
        for call, flag in ((libc.msync, 4), (libc.madvise, MADV_PAGEOUT)):  # 4: MS_SYNC
            if call(*span, flag):
                raise OSError(ctypes.get_errno(), f"{call.__name__} failed")


def digest(tensors: list[Tensor]) -> str:
    """A hash of the tensors' bytes, without a copy."""
    result = hashlib.sha256()
    for x in tensors:
        result.update((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))
    return result.hexdigest()


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One candidate's figures; runs in a process of its own, whose limit and whose memory they are."""
    paged, limited, paged_out = CANDIDATES[name]
    torch.manual_seed(0)
    shape = (args.params // LAYERS // WIDTH, WIDTH)
    params = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)) for _ in range(LAYERS)]
    grad = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)
    options: dict[str, Any] = {"is_paged": True, "paged_directory": args.directory} if paged else {}
    optimizer = bnbops.optim.AdamW(params, optim_bits=args.bits, **options)
    limit = status("VmData") + min(SLACK, 2 * args.params)
    if limited:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    steps = []
    for _ in range(1 + args.rounds):
        start = time.perf_counter()
        if paged_out:
            page_out(states_of(optimizer))
        read, resident = bytes_read(), status("RssFile")
        out = time.perf_counter()
        for param in params:
            param.grad = grad
            optimizer.step()
            param.grad = None
        end = time.perf_counter()
        steps.append({"out": out - start, "step": end - out, "resident": resident, "read": bytes_read() - read})
    return {
        "states": sum(x.nbytes for x in states_of(optimizer)),
        "limit": limit if limited else None,
        "private": status("RssAnon"),
        "digest": digest(params),
        "steps": steps,
    }


def run(name: str, argv: list[str]) -> dict[str, Any]:
    """A candidate's figures, or its "error"."""
    command = [sys.executable, __file__, *argv, "--candidate", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return json.loads(result.stdout)
    lines = result.stderr.splitlines()
    return {"error": next((line for line in reversed(lines) if "Error" in line), f"status {result.returncode}")}


def row(name: str, result: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A line of the table, by COLUMNS: medians of the steps after the first."""
    if "error" in result:
        return [name, *["-"] * (len(COLUMNS) - 1)]
    first, *steps = result["steps"]
    median = {key: statistics.median(step[key] for step in steps) for key in first}
    ratio = "-"
    if "error" not in baseline:
        ratio = f"{statistics.median(step['step'] for step in baseline['steps'][1:]) / median['step']:.2f}x"
    seconds = [f"{first['step']:.2f}", f"{median['step']:.2f}", ratio, f"{median['out']:.2f}"]
    return [name, *seconds, *(f"{x / MIB:,.0f}" for x in (result["private"], median["resident"], median["read"]))]


def memory_limit() -> str:
    """The control group's limit on all memory, which is what makes the kernel page out."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for file in ("memory.max", "memory.limit_in_bytes"):
            root = "/sys/fs/cgroup/memory" if controllers == "memory" else "/sys/fs/cgroup"
            limit = Path(f"{root}{path}") / file
            if controllers in ("", "memory") and limit.exists():
                text = limit.read_text().strip()
                if text.isdigit() and int(text) < 2**60:
                    return f"{int(text) / MIB:,.0f} MiB"
    return "none"


def report(results: dict[str, dict[str, Any]]) -> None:
    cells = [COLUMNS, *(row(name, result, results[BASELINE]) for name, result in results.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    print()
    for first, *rest in cells:
        print("| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |")
    print()
    for name, result in results.items():
        if "error" in result:
            print(f"{name}: {result['error']}")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=count, default=2**29, help="elements; 512Mi by default")
    parser.add_argument("--bits", type=int, choices=(8, 32), default=32, help="precision of AdamW's states")
    parser.add_argument("--directory", help="where the states are; the temporary directory by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps, after a first one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to FILE")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.params, args.rounds = 2**25, 2
    if args.rounds < 1 or args.params % (LAYERS * WIDTH):
        parser.error(f"--rounds must be positive, --params a multiple of {LAYERS * WIDTH}")
    return args


def main(argv: list[str]) -> dict[str, dict[str, Any]]:
    args = arguments(argv)
    if args.candidate:
        print(json.dumps(train(args.candidate, args)))
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a directory in memory would show nothing
        directory = PagedMemory(args.directory).directory
    results = {name: run(name, argv) for name in CANDIDATES}
    done = [result for result in results.values() if "error" not in result]
    if not done:
        raise RuntimeError(f"{BASELINE}: {results[BASELINE]['error']}")
    if len({result["digest"] for result in done}) != 1:
        raise VerificationError("candidates end with different parameters")
    limit = max((result["limit"] or 0 for result in done), default=0)
    print(f"## AdamW, {args.bits}-bit states of {args.params:,} parameters; threads: {torch.get_num_threads()}")
    print(f"states {done[0]['states'] / MIB:,.0f} MiB, limit on private memory {limit / MIB:,.0f} MiB", end="")
    print(f", on all memory {memory_limit()}, directory {directory}")
    print(f"verified: the same parameters from {'; '.join(name for name in results if 'error' not in results[name])}")
    report(results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
