"""Runs the stages, one process at a time, and rewrites the report as they tell what they find."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_bundle import markdown, record
from gpu_bundle.environment import BUNDLE
from gpu_bundle.events import EVENTS, GPU_LOST
from gpu_bundle.plan import Stage
from gpu_bundle.processes import Run
from gpu_bundle.record import Record, StageRecord

RESTARTS = 5  # of a stage
PASSED, FAILED, UNFINISHED, UNUSABLE = 0, 1, 3, 4  # exit codes; 2 is argparse's
_TAIL_LINES = 5


class Stopped(Exception):
    """By a signal."""


@dataclass
class Runner:
    """`root` is the bundle's folder, or the repository; everything is written to `out`."""

    root: Path
    out: Path
    stages: Sequence[Stage]
    seconds: float = 480.0
    dry_run: bool = False
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        described = self.root / "bundle.json"
        self.bundle: dict[str, Any] = json.loads(described.read_text()) if described.exists() else {}
        self.work = Path(tempfile.mkdtemp(prefix="work-", dir=self.out))
        for folder in ("events", "tmp", "cache", "site"):
            (self.work / folder).mkdir()
        (self.out / "logs").mkdir(exist_ok=True)
        records = [StageRecord(s.name, s.title, self.work / "events" / s.name) for s in self.stages]
        self.record = Record(records, self.bundle, self.dry_run, self.seconds)
        self.places = record.places_of(self.root, self.out)
        self.written = 0.0

    # ---- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Exit code: 0 if nothing failed and all was reached."""
        total = sum(stage.share for stage in self.stages)
        seconds = self.seconds - min(5.0, self.seconds / 20)  # the rest is for an end in order
        pairs = list(zip(self.stages, self.record.stages, strict=True))
        with signals(), Run() as processes:
            try:
                self.write()
                self.unpack()
                share = 0.0
                for stage, state in pairs:
                    share += stage.share
                    self.run_stage(processes, stage, state, self.start + seconds * share / total)
                    if stage.module == "environment" and state.verdict_now() == record.FAILED:
                        self.record.ended = self.why(state)
                        break
                else:
                    self.use_what_is_left(processes, pairs, self.start + seconds)
            except Stopped as reason:
                self.record.ended = f"by {reason}"
            finally:
                ignore_signals()
                self.write()
                code = self.exit_code()
                shutil.rmtree(self.work, ignore_errors=True)
        return code

    def use_what_is_left(self, processes: Run, pairs: list[tuple[Stage, StageRecord]], end: float) -> None:
        """Stages whose time did not suffice go on where they were."""
        for stage, state in pairs:
            if state.cut_off and time.monotonic() < end:
                state.begin_again()
                self.run_stage(processes, stage, state, end)

    def why(self, state: StageRecord) -> str:
        messages = [item.get("message") or "" for item in state.items().values()] + state.problems
        return next(filter(None, messages), "it cannot run here").removeprefix("Unusable: ")

    def exit_code(self) -> int:
        if self.record.stages[0].verdict_now() == record.FAILED and self.stages[0].module == "environment":
            return UNUSABLE
        verdict = record.overall([state.verdict_now() for state in self.record.stages])
        return {record.FAILED: FAILED, record.UNFINISHED: UNFINISHED, record.PASSED: PASSED}[verdict]

    # ---- a stage -------------------------------------------------------------------------------------------------

    def run_stage(self, processes: Run, stage: Stage, state: StageRecord, deadline: float) -> None:
        begin = time.monotonic() - state.seconds
        print(f"{stage.name}: {stage.title} ...", flush=True)
        over = Over(self, stage, state, begin, deadline)
        log = self.out / "logs" / f"{stage.name}.txt"
        if not state.begun:
            log.write_bytes(b"")
        state.begun, state.cut_off = True, False
        try:
            for _ in range(1 + RESTARTS):
                begun = state.begun_items()
                how = processes.watch(stage.command(self.dry_run), self.environment(state), self.root, log, over)
                state.cut_off = how == TIME_IS_OVER
                if state.done() or state.cut_off:
                    break
                if how == f"status {GPU_LOST}":
                    state.notes.append("an error of the GPU ended a process; another one went on behind it")
                elif name := state.under_way():
                    state.blamed[name] = f"its process ended: {how}"
                else:
                    state.problems.append(f"a process ended: {how}\n{tail(log)}")
                if state.begun_items() == begun:
                    break  # another one would come no further
                over.sign_of_life = time.monotonic()
            state.over = True
        finally:
            state.seconds = time.monotonic() - begin
            self.write()
        print(f"{stage.name}: {state.verdict_now()} after {state.seconds:.0f} s", flush=True)

    def environment(self, state: StageRecord) -> dict[str, str]:
        """Of a stage's process: what it imports comes with the bundle, what it writes goes to the report's folder."""
        path = [str(self.work / "site"), str(self.root / "tests")]
        if inherited := os.environ.get("PYTHONPATH"):
            path.append(inherited)
        cache, simulator = self.work / "cache", self.root / "simulator.so"
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TMPDIR": str(self.work / "tmp"),
            "XDG_CACHE_HOME": str(cache),
            "CUDA_CACHE_PATH": str(cache / "cuda"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            EVENTS: str(state.events),
            BUNDLE: json.dumps(self.bundle),
            **({"CUDA_ON_CPU_LIBRARY": str(simulator)} if simulator.exists() else {}),
        }

    def unpack(self) -> None:
        """The wheels, so that nothing is installed anywhere."""
        for wheel in sorted((self.root / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.work / "site")
                for entry in archive.infolist():
                    if mode := entry.external_attr >> 16 & 0o777:
                        (self.work / "site" / entry.filename).chmod(mode | 0o600)

    # ---- the report ----------------------------------------------------------------------------------------------

    def write(self) -> None:
        self.record.seconds = time.monotonic() - self.start
        data = record.without_places(self.record.data(), self.places)
        record.write(self.out / "report.json", record.as_json(data))
        record.write(self.out / "report.md", markdown.report(data))
        self.written = time.monotonic()


TIME_IS_OVER = "its time was over"


@dataclass
class Over:
    """Asked all the time while a stage's process runs: keeps the report up to date, and says when to end it."""

    runner: Runner
    stage: Stage
    state: StageRecord
    begin: float
    deadline: float
    size: int = -1
    sign_of_life: float = field(default_factory=time.monotonic)

    def __call__(self) -> str | None:
        now = time.monotonic()
        with contextlib.suppress(OSError):
            size = self.state.events.stat().st_size
            if size != self.size:
                self.size, self.sign_of_life = size, now
        if self.sign_of_life > self.runner.written and now - self.runner.written > 1:
            self.state.seconds = now - self.begin
            self.runner.write()
        if now > self.deadline:
            return TIME_IS_OVER
        if now - self.sign_of_life > self.stage.patience:
            return f"no sign of life for {self.stage.patience:g} seconds"
        return None


def tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Those that ask for an end raise `Stopped`."""

    def stop(number: int, _frame: object) -> None:
        ignore_signals()
        raise Stopped(signal.Signals(number).name)

    former = {number: signal.signal(number, stop) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ignore_signals() -> None:
    """What is left is short, and must be done."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
