"""Stages that go wrong, for the tests of gpu_bundle: each is a short Python program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bundle.plan import Stage
from gpu_bundle.processes import alive
from gpu_bundle.runner import Runner

BEGIN = """
import os, signal, subprocess, sys, time
from gpu_bundle.events import Events, Skipped
events = Events()
def fine():
    pass
def wrong():
    raise ValueError("1 is not 2\\nin /home/someone/secret/file.py:7")
def elsewhere():
    raise Skipped("not on this machine")
def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)
def hangs():  # and so does a child in a session of its own, whose parent is gone
    child = "import os, sys, time; os.fork() and os._exit(0); os.setsid(); "
    child += "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    subprocess.run([sys.executable, "-c", child, PID_FILE])
    while not os.path.exists(PID_FILE) or not open(PID_FILE).read():
        time.sleep(0.01)
    time.sleep(600)
def loses_the_gpu():
    events.tell(end="loses_the_gpu", outcome="failed", seconds=0, message="illegal access")
    os._exit(70)
def run(*calls):
    names = events.plan([call.__name__ for call in calls])
    for call in calls:
        if call.__name__ in names:
            events.run(call.__name__, call)
    events.tell(done=True)
"""


@dataclass(frozen=True)
class Planted(Stage):
    program: str = ""

    def command(self, dry_run: bool) -> list[str]:
        return [sys.executable, "-c", BEGIN + self.program]


def planted(program: str, name: str = "planted", share: float = 60, **options: Any) -> Planted:
    return Planted(name, f"the stage {name}", share, program=program, **options)


def run(folder: Path, *stages: Stage, seconds: float = 60, **options: Any) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of a run of these stages alone."""
    (folder / "out").mkdir(exist_ok=True)
    code = Runner(folder, folder / "out", stages, seconds, **options).run()
    return code, report(folder)


def report(folder: Path) -> dict[str, Any]:
    assert (folder / "out" / "report.md").read_text().startswith("# bnbops on ")
    return json.loads((folder / "out" / "report.json").read_text())


def outcomes(stage: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["outcome"] for item in stage["items"]}


def verdicts(report: dict[str, Any]) -> list[str]:
    return [stage["verdict"] for stage in report["stages"]]


def wait_for(path: Path, seconds: float = 30) -> str:
    """What a file holds as soon as it holds something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path.name} did not come")


def gone(processes: Sequence[int], seconds: float = 15) -> bool:
    """Whether they end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(alive, processes)):
            return True
        time.sleep(0.02)
    return False
