"""What a stage's process tells the runner: JSON objects, a line each, appended to a file as things happen.

    {"plan": [names]}            what the stage consists of
    {"start": name}              one of them begins
    {"end": name, "outcome": "passed" | "failed" | "skipped", "seconds": number, "message": text}
    {"again": name}              the runner's: it was cut off and may begin anew
    {"table": {...}}             figures of a benchmark
    {"facts": {...}}             about the machine
    {"done": true}               nothing is left to do

A process may die at any moment: what it told before counts, and the next one goes on behind it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = "BNBOPS_GPU_REPORT_EVENTS"  # environment variable: the file
GPU_LOST = 70  # exit status: an error of the GPU has spoiled this process; another one may go on


def read(path: Path) -> list[dict[str, Any]]:
    """What has been told; lines that are cut off or something else do not count, and what is no number is None."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and is_event(event):
            found.append(event)
    return found


def is_event(event: dict[str, Any]) -> bool:
    """Whether it is one of those above."""
    if "end" in event and not {"outcome", "seconds", "message"} <= event.keys():
        return False
    return all(key in _CHECKS and _CHECKS[key](value) for key, value in event.items())


def _is_table(value: Any) -> bool:
    rows = value.get("rows") if isinstance(value, dict) else None
    return isinstance(rows, list) and isinstance(value.get("title"), str) and all(map(_is_row, rows))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and all(map(_is_entry, value.values()))


def _is_entry(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "plan": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "start": lambda value: isinstance(value, str),
    "end": lambda value: isinstance(value, str),
    "again": lambda value: isinstance(value, str),
    "outcome": lambda value: value in ("passed", "failed", "skipped"),
    "seconds": lambda value: isinstance(value, int | float),
    "message": lambda value: isinstance(value, str),
    "table": _is_table,
    "facts": lambda value: isinstance(value, dict) and all(map(_is_entry, value.values())),
    "done": lambda value: value is True,
}


class Events:
    """The end that tells. `seen` are those that former processes of the stage began."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        path = path or os.environ[EVENTS]
        self.seen: set[str] = set()
        for event in read(Path(path)):
            self.seen |= {event["start"]} if "start" in event else set()
            self.seen -= {event["again"]} if "again" in event else set()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self._file, b"\n")  # ends a line that a process before did not

    def tell(self, **event: Any) -> None:
        os.write(self._file, f"{json.dumps(event)}\n".encode())

    def plan(self, names: list[str]) -> list[str]:
        """Announces them all; gives those that are left to do."""
        self.tell(plan=names)
        return [name for name in names if name not in self.seen]

    def end(self, name: str, outcome: str, seconds: float, message: str = "") -> None:
        self.tell(end=name, outcome=outcome, seconds=round(seconds, 3), message=message)
        if outcome == "failed" and gpu_is_lost():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(GPU_LOST)

    def run(self, name: str, call: Callable[[], str | None]) -> None:
        """Runs one; it failed if it raises, with the exception's words. It may return a message, or raise `Skipped`."""
        self.tell(start=name)
        start = time.monotonic()
        try:
            message, outcome = call() or "", "passed"
        except Skipped as reason:
            message, outcome = str(reason), "skipped"
        except Exception as error:
            message, outcome = f"{type(error).__name__}: {error}", "failed"
        self.end(name, outcome, time.monotonic() - start, message)


class Skipped(Exception):
    """Cannot be done here, and is no fault of bnbops; says why."""


def gpu_is_lost() -> bool:
    """Whether this process can do nothing on its GPU any more: after an illegal access all that follows would fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
