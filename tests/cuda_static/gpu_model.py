"""What the GPUs' data sheets and the compiled kernels predict: `python tests/cuda_static/gpu_model.py`.

Prints the tables of docs/cuda_performance.md; with --write, puts them there.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_static import compiled, sass
from cuda_static.expected import WAYS, Way

PAGE = compiled.ROOT / "docs" / "cuda_performance.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
SCHEDULERS = 4  # of a multiprocessor, each issuing an instruction of a warp in a cycle


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    bandwidth: float  # bytes/s
    multiprocessors: int
    clock: float  # Hz

    def memory_time(self, way: Way) -> float:
        """Seconds for an element."""
        return way.bytes / self.bandwidth

    def issue_time(self, instructions: float) -> float:
        return instructions / sass.WARP / (SCHEDULERS * self.multiprocessors * self.clock)


GPUS = (
    Gpu("A100", "sm_80", 2039e9, 108, 1.41e9),
    Gpu("H100", "sm_90", 3350e9, 132, 1.83e9),
    Gpu("B200", "sm_100", 8000e9, 148, 1.85e9),
)


@cache
def kernels() -> dict[tuple[str, str], sass.Kernel]:
    """By name and architecture."""
    return {(k.name, k.arch): k for c in compiled.compile_all() for k in sass.kernels(c)}


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |\n" for line in lines
    )


def predictions() -> str:
    rows = []
    for way in WAYS:
        counts = {arch: way.instructions(kernels()[way.kernel, arch]) for arch in compiled.ARCHITECTURES}
        row = [way.work, f"{way.bytes:.2f}", way.peers, " / ".join(f"{count:.0f}" for count in counts.values())]
        for gpu in GPUS:
            memory, issue = gpu.memory_time(way), gpu.issue_time(counts[gpu.arch])
            row.append(f"{1e12 * max(memory, issue):.2f} {'memory' if memory >= issue else 'issue'}")
        rows.append(row)
    instructions = f"instructions ({', '.join(arch.removeprefix('sm_') for arch in compiled.ARCHITECTURES)})"
    return table(["work", "bytes", "others' bytes", instructions, *(f"{gpu.name}, ms" for gpu in GPUS)], rows)


def resources() -> str:
    """The largest of each kernel template's instances."""
    families: dict[tuple[str, str], list[sass.Kernel]] = {}
    for kernel in kernels().values():
        families.setdefault((kernel.source, kernel.template), []).append(kernel)
    rows = []
    for (source, name), instances in sorted(families.items()):
        each = {arch: [k for k in instances if k.arch == arch] for arch in compiled.ARCHITECTURES}
        first = instances[0]
        rows.append(
            [
                source,
                name,
                str(len(each[first.arch])),
                f"{first.threads} x {first.resident}" if first.resident else "",
                " / ".join(str(max(k.registers for k in ks)) for ks in each.values()),
                str(max(k.shared_bytes for k in instances)),
                str(max(k.stack_bytes + k.spilled_bytes for k in instances)),
            ]
        )
    registers = f"registers ({', '.join(arch.removeprefix('sm_') for arch in compiled.ARCHITECTURES)})"
    return table(["file", "kernel", "instances", "threads x blocks", registers, "shared bytes", "stack, spills"], rows)


def tables() -> str:
    return f"\n{predictions()}\n{resources()}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    if compiled.MISSING:
        parser.exit(1, f"missing: {compiled.MISSING}\n")
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + tables() + END + rest.partition(END)[2])
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
