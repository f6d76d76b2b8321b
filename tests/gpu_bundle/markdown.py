"""report.md of report.json's data."""

from __future__ import annotations

from typing import Any

FACTS = ("GPU", "driver", "driver's CUDA", "torch", "torch's CUDA", "Python", "bnbops")
MESSAGE_LINES = 6
SHOWN_FAILURES = 40


def report(data: dict[str, Any]) -> str:
    parts = [heading(data), stages(data), problems(data), notes(data), left(data), figures(data), machine(data)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(data: dict[str, Any]) -> str:
    gpu = "a simulated GPU" if data["dry run"] else data["machine"].get("GPU") or "a machine without a usable GPU"
    known = [f"{name} {data['machine'][name]}" for name in FACTS[1:] if data["machine"].get(name)]
    lines = [f"# bnbops on {gpu}: {data['verdict']}", "", ", ".join(known)]
    if data["dry run"]:
        lines += ["", "A dry run: the kernels ran in a simulator on the CPU, and figures of speed mean nothing."]
    if data["ended"]:
        lines += ["", f"**Ended before its end: {data['ended']}.**"]
    return "\n".join(lines)


def stages(data: dict[str, Any]) -> str:
    counted = ("passed", "failed", "skipped", "unfinished", "not reached")
    rows = [
        [
            stage["name"],
            stage["title"],
            stage["verdict"],
            *(str(stage["counts"].get(name, 0)) for name in counted),
            f"{stage['seconds']:.0f}",
        ]
        for stage in data["stages"]
    ]
    total = f"{data['seconds']:.0f} of {data['limit']:.0f} seconds."
    return f"{table(['stage', 'what', 'verdict', *counted, 'seconds'], rows)}\n\n{total}"


def problems(data: dict[str, Any]) -> str:
    found = []
    for stage in data["stages"]:
        found += [f"* {stage['name']}: {first_lines(text)}" for text in stage["problems"]]
        found += [
            f"* {stage['name']}: `{item['name']}`: {first_lines(item.get('message') or 'no message')}"
            for item in stage["items"]
            if item["outcome"] == "failed"
        ]
    more = [f"* and {len(found) - SHOWN_FAILURES} more, in report.json"] if len(found) > SHOWN_FAILURES else []
    return "\n".join(["## Failures", "", *found[:SHOWN_FAILURES], *more]) if found else ""


def first_lines(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    if len(lines) == 1:
        return lines[0]
    return "\n\n  ```\n" + "\n".join(f"  {line.replace('```', '')}" for line in lines[:MESSAGE_LINES]) + "\n  ```"


def notes(data: dict[str, Any]) -> str:
    """What a stage said of itself, and why tests were skipped, each reason once."""
    found = []
    for stage in data["stages"]:
        found += [f"* {stage['name']}: {note}" for note in stage["notes"]]
        reasons: dict[str, int] = {}
        for item in stage["items"]:
            if item["outcome"] == "skipped":
                reasons[first_lines(item.get("message") or "")] = (
                    reasons.get(first_lines(item.get("message") or ""), 0) + 1
                )
        found += [f"* {stage['name']}: {count} skipped: {reason}" for reason, count in reasons.items()]
    return "\n".join(["## Notes", "", *found]) if found else ""


def left(data: dict[str, Any]) -> str:
    """What the time did not suffice for."""
    found = []
    for stage in data["stages"]:
        names = [item["name"] for item in stage["items"] if item["outcome"] in ("unfinished", "not reached")]
        if names:
            found.append(
                f"* {stage['name']}: {len(names)}, the first of which are {', '.join(f'`{n}`' for n in names[:3])}"
            )
        elif stage["verdict"] in ("unfinished", "not reached"):
            found.append(f"* {stage['name']}: {stage['verdict']}")
    return "\n".join(["## Not reached", "", *found]) if found else ""


COLUMNS = {
    "name": "{}",
    "ms": "{:.3f}",
    "ratio": "{:.2f}x",
    "vs dense": "{:.2f}x",
    "vs bitsandbytes": "{:.2f}x",
    "GB/s": "{:.0f}",
    "% of card": "{:.0f}",
    "% of stream": "{:.0f}",
    "GFLOP/s": "{:.0f}",
    "% of peak": "{:.0f}",
}


def figures(data: dict[str, Any]) -> str:
    """Every table of a benchmark."""
    parts = []
    for found in (table for stage in data["stages"] for table in stage["tables"]):
        columns = [key for key in COLUMNS if any(row.get(key) is not None for row in found["rows"])]
        cells = [[cell(row.get(key), COLUMNS[key]) for key in columns] for row in found["rows"]]
        parts.append(f"### {found['title']}\n\n{table(columns, cells)}")
    if not parts:
        return ""
    says = "ratio: torch's fused AdamW is 1, or bitsandbytes; % of stream: of what `a.add_(b)` reaches at best"
    if bandwidth := data["machine"].get("bandwidth GB/s"):
        says += f"; % of card: of the {bandwidth} GB/s that its memory's clock and width make"
    return "\n\n".join(["## Speed", f"{says}.", *parts])


def cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value) if isinstance(value, int | float) else str(value)


def machine(data: dict[str, Any]) -> str:
    rows = [[str(key), "-" if value is None else str(value)] for key, value in data["machine"].items()]
    rows += [[f"bundle: {key}", str(value)] for key, value in data["bundle"].items()]
    return f"## Machine\n\n{table(['', ''], rows)}" if rows else ""


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown; what a cell holds cannot end it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in line) + " |" for line in lines
    )
