"""A plugin of pytest that tells each test's start and end, runs an even sample of all tests first, and goes on behind
what a former process began."""

from __future__ import annotations

import itertools
import os

import pytest

from gpu_bundle.events import EVENTS, Events

MESSAGE_LINES = 12


def spread(names: list[str]) -> list[str]:
    """In an order whose every beginning is an even sample: 0, 1/2, 1/4, 3/4, 1/8 ... of the way through."""
    bits = max(1, (len(names) - 1).bit_length())
    order = sorted(range(1 << bits), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return [names[i] for i in order if i < len(names)]


def families_in_turn(names: list[str]) -> list[str]:
    """Those of all files in turn, each file's spread."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("::")[0], []).append(name)
    turns = itertools.zip_longest(*map(spread, files.values()))
    return [name for turn in turns for name in turn if name is not None]


class Plugin:
    def __init__(self, events: Events) -> None:
        self.events = events
        self.outcome, self.seconds, self.message = "passed", 0.0, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.events.plan(families_in_turn(list(by_name)))]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.events.seen:
            name = f"collecting {report.nodeid}"
            self.events.tell(start=name)
            self.events.end(name, "failed", 0.0, "\n".join(str(report.longrepr).splitlines()[-MESSAGE_LINES:]))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.seconds, self.message = "passed", 0.0, ""
        self.events.tell(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.outcome != "passed" and self.outcome == "passed":
            self.outcome, self.message = report.outcome, message_of(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.events.end(nodeid, self.outcome, self.seconds, self.message)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.events.tell(done=True)


def message_of(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = f"{crash.message}\nat {crash.path}:{crash.lineno}" if crash else str(report.longrepr)
    lines = text.splitlines()
    return "\n".join(lines[: MESSAGE_LINES - 1] + lines[-1:] if len(lines) > MESSAGE_LINES else lines)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(EVENTS):
        config.pluginmanager.register(Plugin(Events()), "gpu_bundle")
