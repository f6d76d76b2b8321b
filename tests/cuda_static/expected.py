"""What the machine code of every kernel must have: wide accesses, and few enough instructions for an element."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .sass import Instruction, Kernel, Marker, opcode

# By kernel template. Codes of a byte each move by 64 bits where values of 16 bits move by 128: eight a thread.
ACCESSES = {
    "quantize_kernel": ("LDG.128", "STG.64"),
    "dequantize_kernel": ("LDG.64", "STG.128"),
}


@dataclass(frozen=True)
class Way:
    """A way through a kernel's loop that is worth a prediction: everything whole, aligned and of one dtype."""

    work: str
    kernel: str
    need: dict[str, int]  # instructions that tell it from other ways: opcodes, or "~text" of their source line
    elements: int  # that a thread does on this way
    bytes: float  # moved for an element
    most: float  # instructions for an element, on any architecture
    peers: str = ""  # bytes that others move for the same
    innermost: bool = False  # the loop inside all others, rather than the one around them

    def path(self, kernel: Kernel) -> list[Instruction]:
        path = kernel.fast_path({marker(text): count for text, count in self.need.items()}, self.innermost)
        assert path is not None, f"{kernel.name} for {kernel.arch} has no such way: {self.need}"
        return path

    def instructions(self, kernel: Kernel) -> float:
        """For an element, of one thread."""
        return len(self.path(kernel)) / self.elements


@cache
def source(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def marker(text: str) -> Marker:
    if not text.startswith("~"):
        return opcode(text)
    pattern = re.compile(text[1:])
    return lambda instruction: any(pattern.search(source(file)[line - 1]) for file, line in instruction.lines)


FP32, BF16 = 4, 2
CODE, BLOCK_256, BLOCK_64 = 1, 4 / 256, 4 / 64  # of absmax, for an element of a block
LOAD = {FP32: 2, BF16: 1}  # accesses of 16 bytes for eight elements


def _blockwise() -> list[Way]:
    ways = []
    for dtype, size in (("fp32", FP32), ("bf16", BF16)):
        moved = size + CODE + BLOCK_256
        peers = f"bitsandbytes {moved:.2f}"
        need = {
            "LDG.128": LOAD[size],
            "~from_bfloat16": 16 * (dtype == "bf16"),  # once for absmax, once for the codes
            "~dynamic_code<true>": 8,
            "~dynamic_code<false>": 0,
            "~nearest_entry": 0,
            "STG.64": 1,
        }
        ways.append(Way(f"quantize_blockwise, {dtype}", "quantize_kernel<32, 1>", need, 8, moved, 65, peers))
        packs = {"F2FP.BF16": 4 * (dtype == "bf16")}
        need = {"LDG.64": 1, **packs, "STG.128": LOAD[size]}
        ways.append(Way(f"dequantize_blockwise, {dtype}", "dequantize_kernel<32>", need, 8, moved, 16, peers))
    return ways


WAYS = [*_blockwise()]
