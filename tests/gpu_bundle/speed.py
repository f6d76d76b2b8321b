"""The last stage: benchmarks/gpu.py, section by section. In a dry run tiny sizes on the simulator, whose figures mean
nothing."""

from __future__ import annotations

import argparse
import importlib
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from gpu_bundle.events import Events
from gpu_bundle.plan import SIMULATOR

SECTIONS = ("steps", "linear", "4bit", "blockwise")  # what most depends on comes first
# Half of what benchmarks/gpu.py takes by default, since random numbers come from the CPU and the time is short. Rows as
# docs/cuda_performance.md predicts them.
OPTIONS = ["--params", "64Mi", "--elements", "64Mi", "--rounds", "21", "--rows", "1", "8", "16", "64", "256"]
QUICK = ["--quick", "--rounds", "1", "--rows", "1", "8", "--peers"]


def measure(events: Events, section: str, dry_run: bool) -> str:
    from cases import backends

    sys.path.insert(0, str(Path("benchmarks").resolve()))
    gpu = importlib.import_module("gpu")
    args = gpu.arguments([*(QUICK if dry_run else OPTIONS), "--sections", section])
    tables = 0
    with backends.use(SIMULATOR) if dry_run else nullcontext():
        for table in gpu.run(args, "cpu" if dry_run else "cuda"):
            rows = [{key: value for key, value in row.items() if key != "seconds"} for row in table["rows"]]
            events.tell(table={"section": section, "title": table["title"], "rows": rows})
            tables += 1
    return f"{tables} tables"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    dry_run = parser.parse_args().dry_run
    events = Events()
    for section in events.plan(list(SECTIONS)):
        events.run(section, partial(measure, events, section, dry_run))
    events.tell(done=True)


if __name__ == "__main__":
    main()
