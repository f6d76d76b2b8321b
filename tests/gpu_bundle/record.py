"""What a run has found so far, as it goes into report.json: made anew from the stages' events with each writing."""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_bundle.events import Events, read

FORMAT = 1
FAILED, PASSED, SKIPPED, UNFINISHED, NOT_REACHED = "failed", "passed", "skipped", "unfinished", "not reached"


@dataclass
class StageRecord:
    """A stage's events, and what the runner knows of its processes. `blamed`: what was under way when one died or hung,
    and how it ended; `problems`: ends that are nobody's fault but the stage's."""

    name: str
    title: str
    events: Path
    begun: bool = False
    over: bool = False
    cut_off: bool = False  # its time was over
    seconds: float = 0.0
    blamed: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def items(self) -> dict[str, dict[str, Any]]:
        """All that was planned or began, by name: outcome, seconds and message."""
        found: dict[str, dict[str, Any]] = {}
        for event in read(self.events):
            for name in event.get("plan", ()):
                found.setdefault(name, {"outcome": NOT_REACHED})
            if "again" in event:
                found[event["again"]] = {"outcome": NOT_REACHED}
            if "start" in event:
                found[event["start"]] = {"outcome": UNFINISHED}
            if "end" in event:
                found[event["end"]] = {key: event[key] for key in ("outcome", "seconds", "message")}
        for name, how in self.blamed.items():
            found[name] = {"outcome": FAILED, "seconds": None, "message": how}
        return found

    def told(self, key: str) -> list[Any]:
        return [event[key] for event in read(self.events) if key in event]

    def begun_items(self) -> int:
        return sum(item["outcome"] != NOT_REACHED for item in self.items().values())

    def done(self) -> bool:
        return bool(self.told("done"))

    def under_way(self) -> str | None:
        """What began last and has not ended."""
        return next((name for name, item in self.items().items() if item["outcome"] == UNFINISHED), None)

    def begin_again(self) -> None:
        """What was under way when the time was over; a process of the stage may go on there."""
        if name := self.under_way():
            Events(self.events).tell(again=name)

    def data(self) -> dict[str, Any]:
        items = self.items()
        counts = Counter(item["outcome"] for item in items.values())
        return {
            "name": self.name,
            "title": self.title,
            "verdict": self.verdict(counts),
            "seconds": round(self.seconds, 1),
            "counts": dict(counts),
            "problems": self.problems,
            "notes": self.notes,
            "items": [{"name": name} | item for name, item in items.items()],
            "tables": self.told("table"),
        }

    def verdict_now(self) -> str:
        return self.verdict(Counter(item["outcome"] for item in self.items().values()))

    def verdict(self, counts: Counter[str]) -> str:
        if counts[FAILED] or self.problems:
            return FAILED
        if not counts[PASSED] and not counts[SKIPPED]:
            return UNFINISHED if self.begun else NOT_REACHED
        if not self.over or not self.done() or counts[UNFINISHED] or counts[NOT_REACHED]:
            return UNFINISHED
        return PASSED if counts[PASSED] else SKIPPED


@dataclass
class Record:
    """The whole run."""

    stages: list[StageRecord]
    bundle: dict[str, Any]
    dry_run: bool
    limit: float
    seconds: float = 0.0
    ended: str = ""  # why before its end, if it was

    def data(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for stage in self.stages:
            for some in stage.told("facts"):
                facts |= some
        stages = [stage.data() for stage in self.stages]
        if bandwidth := facts.get("bandwidth GB/s"):
            for row in (row for stage in stages for table in stage["tables"] for row in table["rows"]):
                row["% of card"] = 100 * row["GB/s"] / bandwidth if row.get("GB/s") else None
        return {
            "format": FORMAT,
            "verdict": overall([stage["verdict"] for stage in stages]),
            "dry run": self.dry_run,
            "ended": self.ended,
            "seconds": round(self.seconds, 1),
            "limit": self.limit,
            "machine": facts,
            "bundle": self.bundle,
            "stages": stages,
        }


def overall(verdicts: list[str]) -> str:
    if FAILED in verdicts:
        return FAILED
    return UNFINISHED if {UNFINISHED, NOT_REACHED} & {*verdicts} else PASSED


# ---- nothing about whose machine it is ---------------------------------------------------------------------------

_PATH = re.compile(r"(?<![\w.:/<>])/(?:[^\s/'\":,;()]+/)+([^\s/'\":,;()]*)")


def without_places(value: Any, places: dict[str, str]) -> Any:
    """The same with no absolute path, and `places` by their names."""
    if isinstance(value, dict):
        return {key: without_places(entry, places) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_places(entry, places) for entry in value]
    if not isinstance(value, str):
        return value
    for place in sorted(places, key=len, reverse=True):
        value = value.replace(place, places[place])
    return _PATH.sub(r"<path>/\1", value)


def places_of(root: Path, out: Path) -> dict[str, str]:
    """What stands in the place of folders, and of the host's name where that is no word."""
    found = {str(root): "<bundle>", str(out): "<out>", str(Path.home()): "<home>", os.getcwd(): "<cwd>"}
    host = socket.gethostname()
    if len(host) > 5 and re.search(r"[\d.-]", host):
        found[host] = "<host>"
    return {place: name for place, name in found.items() if len(place) > 1}


def write(path: Path, text: str) -> None:
    """At once: a reader finds the former text or this one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def as_json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"
