"""Timing on a noisy machine: candidates take turns, and the memory bandwidth measured among them is the yardstick."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import bnbops

STREAM = "stream: a.add_(b), fp32"
SLOW_SECONDS = 0.3
SLOW_TURNS = 4  # a slow candidate runs in about so many rounds only


class VerificationError(RuntimeError):
    """A candidate computes something else than the reference: its speed means nothing."""


@dataclass
class Candidate:
    """A call to time. `bytes_moved` is what it cannot avoid to read and write, `baseline` whom its ratio refers to."""

    name: str
    run: Callable[[], object]
    elements: int
    bytes_moved: int
    baseline: str | None = None
    seconds: dict[int, float] = field(default_factory=dict)  # by round


class Memory:
    """Two arrays that no cache holds: they measure the memory bandwidth, and push everything else out of the caches."""

    def __init__(self, elements: int, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.a = torch.ones(elements, device=device)
        self.b = torch.full((elements,), 1e-6, device=device)

    def candidate(self) -> Candidate:
        """The yardstick: reads a and b, writes a."""
        n = self.a.numel()
        return Candidate(STREAM, lambda: self.a.add_(self.b), n, 3 * 4 * n)

    def evict(self) -> None:
        self.a.sum()

    def seconds(self, run: Callable[[], object]) -> float:
        """What a call takes with cold caches."""
        self.evict()
        if self.device.type == "cuda":
            return seconds_on_gpu(run)
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def seconds_on_gpu(run: Callable[[], object]) -> float:
    """What the device is busy with a call, without the host's time to launch it: the device sleeps meanwhile."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(candidates: list[Candidate], rounds: int, memory: Memory) -> None:
    """Times the candidates A B C A B C ..., so that a disturbance hits all alike; caches are cold every time."""
    stride = max(1, rounds // SLOW_TURNS)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for candidate in candidates:
                slow = min(candidate.seconds.values(), default=0.0) > SLOW_SECONDS
                if slow and turn % stride:
                    continue
                candidate.seconds[turn] = memory.seconds(candidate.run)
    finally:
        gc.enable()


def results(candidates: list[Candidate]) -> list[dict[str, Any]]:
    """One row a candidate: the table's columns and all the times."""
    by_name = {candidate.name: candidate for candidate in candidates}
    stream = by_name[STREAM]
    bandwidth = stream.bytes_moved / min(stream.seconds.values())
    return [_result(c, by_name.get(c.baseline), bandwidth) for c in candidates]


def ratios(candidate: Candidate, baseline: Candidate | None) -> tuple[float | None, float | None]:
    """The baseline's median over the candidate's, and the median of the ratios within each round both took part in."""
    if baseline is None:
        return None, None
    ratio = statistics.median(baseline.seconds.values()) / statistics.median(candidate.seconds.values())
    shared = candidate.seconds.keys() & baseline.seconds.keys()
    return ratio, statistics.median(baseline.seconds[turn] / candidate.seconds[turn] for turn in shared)


def _result(candidate: Candidate, baseline: Candidate | None, bandwidth: float) -> dict[str, Any]:
    median = statistics.median(candidate.seconds.values())
    ratio, round_ratio = ratios(candidate, baseline)
    return {
        "name": candidate.name,
        "ms": median * 1e3,
        "baseline": baseline.name if baseline else None,
        "ratio": ratio,
        "round ratio": round_ratio,
        "G/s": candidate.elements / median / 1e9,
        "B/element": candidate.bytes_moved / candidate.elements,
        "GB/s": candidate.bytes_moved / median / 1e9,
        "% of stream": 100 * candidate.bytes_moved / median / bandwidth,
        "rounds": len(candidate.seconds),
        "seconds": list(candidate.seconds.values()),
    }


_COLUMNS = {
    "name": "{}",
    "ms": "{:.2f}",
    "ratio": "{:.2f}x",
    "round ratio": "{:.2f}x",
    "G/s": "{:.3f}",
    "B/element": "{:.2f}",
    "GB/s": "{:.1f}",
    "% of stream": "{:.0f}",
    "rounds": "{}",
}


def table(rows: list[dict[str, Any]], columns: dict[str, str] = _COLUMNS) -> str:
    """The rows as a Markdown table that is aligned as plain text, too. `columns` says how to format a row's entries."""
    cells = [
        list(columns),
        *([form.format(row[key]) if row[key] is not None else "-" for key, form in columns.items()] for row in rows),
    ]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    lines = []
    for line in cells:
        first, *rest = line
        padded = [first.ljust(widths[0]), *(c.rjust(width) for c, width in zip(rest, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * width if k == 0 else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def report(title: str, unit: str, candidates: list[Candidate]) -> dict[str, Any]:
    """Prints a section, and returns it for the JSON file. `unit` says what a ratio of 1 means."""
    rows = results(candidates)
    print(f"\n## {title}; threads: {torch.get_num_threads()}; ratio 1 = {unit}\n\n{table(rows)}", flush=True)
    return {"title": title, "rows": rows}


def save(path: str, sections: list[dict[str, Any]]) -> None:
    """Writes the sections and what they ran on as JSON."""
    machine = {
        "torch": torch.__version__,
        "bnbops": bnbops.__version__,
        "isa": bnbops.isa(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    Path(path).write_text(json.dumps({"machine": machine, "sections": sections}, indent=1) + "\n")


def parser(description: str | None, peers: list[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--rounds", type=int, help="turns of each candidate; enough by default")
    result.add_argument("--peers", nargs="*", choices=peers, default=peers, help="compared with, where installed")
    result.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    result.add_argument("--json", metavar="FILE", help="also write all figures to FILE")
    return result


def count(text: str) -> int:
    """A number of elements such as 4096, 64Ki or 32Mi."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", text)
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 4096, 64Ki or 32Mi, got {text!r}")
    return int(match[1]) * {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[match[2]]


def import_peer(name: str) -> ModuleType | None:
    """An optional library, or None; a peer that fails in whatever way is no reason to stop."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"{name} left out: {type(error).__name__}: {error}", flush=True)
        return None


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs the block with `n` intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
