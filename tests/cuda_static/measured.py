"""Figures of a GPU's report beside what its memory allows: `python tests/cuda_static/measured.py report.json`.

Prints the table of docs/cuda_performance.md; with --write, puts it there. The report is that of `make gpu-bundle`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_static.expected import WAYS
from cuda_static.gpu_model import PAGE, table

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
NONE = "\nNone so far.\n\n"


def row_of(work: str) -> tuple[str, str] | None:
    """Which row of a report is of a prediction's work: how its table's title and a space begin, and its name."""
    if found := re.fullmatch(r"(AdamW\d+bit), (\w+)", work):
        return f"AdamW step, one {found[2]} parameter ", f"bnbops {found[1]}"
    if found := re.fullmatch(r"(quantize|dequantize)_(blockwise|4bit), (\w+)", work):
        map_ = " dynamic 256" if found[2] == "blockwise" else ""
        out = ", out=" if found[1] == "dequantize" else ""  # no new memory in each call
        return f"{found[1]}_{found[2]}, ", f"bnbops, {found[3]}{map_}{out}"
    if found := re.fullmatch(r"linear_4bit, bf16, (\d+) rows", work):
        return f"NF4 8192x8192 bf16, forward, rows: {found[1]} ", "bnbops Linear4bit"
    return None


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    """For each prediction that the report has a figure of: milliseconds for 10^9 elements, of memory and measured."""
    figures = [(t["title"], row) for stage in report["stages"] for t in stage["tables"] for row in t["rows"]]
    bandwidth, rows = report["machine"].get("bandwidth GB/s"), []
    for way in WAYS:
        for measured in (ms for title, row in figures if (ms := milliseconds(way.work, title, row)) is not None):
            memory = way.bytes / bandwidth * 1e3 if bandwidth else None
            known = ["-", "-"] if memory is None else [f"{memory:.2f}", f"{100 * memory / measured:.0f} %"]
            rows.append([way.work, known[0], f"{measured:.2f}", known[1]])
    return rows


def milliseconds(work: str, title: str, row: dict[str, Any]) -> float | None:
    """For 10^9 elements of a prediction's work, if the row of the table with this title is of it."""
    begin, name = row_of(work) or (None, None)
    if begin is None or row["name"] != name or not f"{title} ".startswith(begin):
        return None
    rows = re.search(r"rows: (\d+)", begin)  # of a product, whose elements are multiply-adds: one a weight and row
    return (int(rows[1]) if rows else 1) / row["G/s"] * 1e3


def section(report: dict[str, Any]) -> str:
    if report["dry run"]:
        raise ValueError("the report is a dry run's: its figures mean nothing")
    rows, machine = rows_of(report), report["machine"]
    on = ", ".join(f"{name} {machine[name]}" for name in ("driver", "torch", "bnbops") if machine.get(name))
    columns = ["work", "memory, ms", "measured, ms", "memory / measured"]
    return f"\n{machine.get('GPU')}, {on}:\n\n{table(columns, rows)}\n" if rows else NONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    try:
        found = section(json.loads(options.report.read_text()))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + found + END + rest.partition(END)[2])
    else:
        print(found, end="")


if __name__ == "__main__":
    main()
