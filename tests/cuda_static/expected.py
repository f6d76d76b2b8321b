"""What the machine code of every kernel must have: wide accesses, and few enough instructions for an element."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .sass import Instruction, Kernel, Marker, opcode

# What each kernel template must have: memory accesses of so many bits, and the tensor cores' instructions. A thread has
# eight elements: 128 bits of 16-bit values or half of fp32 ones, 64 bits of codes of a byte, 32 bits of 4-bit codes
# (an access without a number), which a warp's lanes read side by side.
NEEDED = {
    "quantize_kernel": ("LDG.128", "STG.64"),
    "dequantize_kernel": ("LDG.64", "STG.128"),
    "quantize_4bit_kernel": ("LDG.128", "STG"),
    "look_up_kernel": ("LDG", "STG.128"),
    "gemv_kernel": ("LDG", "LDG.128"),
    "tensor_core_kernel": ("LDG", "LDG.128", "HMMA"),
    "grouped_product_kernel": ("LDG.128", "STS.128"),  # of results, a thread has every 16th
    "quantize_rows_kernel": ("LDG.128", "STG.64"),
    "scan_rows_kernel": ("LDG.128",),
    "encode_rows_kernel": ("LDG.128", "LDG.64", "STG.64"),
    "dequantize_rows_kernel": ("LDG.64", "STG.128"),
    "scan_columns_kernel": ("LDG.128",),
    "encode_columns_kernel": ("LDG.128", "STG.64"),
    "list_outliers_kernel": ("LDG.64",),
    "multiply_kernel": ("LDG.128", "IMMA", "STG.128"),
    "dequantize_sums_kernel": ("LDG.128", "STG.128"),
    "prepare_kernel": (),  # one thread for a parameter
    "step_kernel": ("LDG.128", "STG.128"),
    "direction_kernel": ("LDG.128", "STG.128"),
    "apply_kernel": ("LDG.128", "STG.128"),
    "encode_state_kernel": ("LDG.128", "STG.64"),
    "decode_state_kernel": ("LDG.64", "STG.128"),
    "squares_kernel": ("LDG.128",),
    "sum_pieces_kernel": (),  # a number for every 16 blocks of a parameter
    "percentile_clip_kernel": (),  # 100 numbers for a parameter
    "place_kernel": (),  # one thread for a parameter
}


# A thread or a thread block for a parameter: how many are resident does not matter.
SMALL = {"prepare_kernel", "place_kernel", "percentile_clip_kernel"}


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
def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def source(file: str, line: int) -> str:
    """A line; nvcc also names some that do not exist, by mistaking the file of an inlined function."""
    lines = _lines(file)
    return lines[line - 1] if line <= len(lines) else ""


def marker(text: str) -> Marker:
    if not text.startswith("~"):
        return opcode(text)
    pattern = re.compile(text[1:])
    return lambda instruction: any(pattern.search(source(*line)) for line in instruction.lines)


DTYPES = {"fp32": 4, "bf16": 2}
CODE, BLOCK_256, BLOCK_64 = 1, 4 / 256, 4 / 64  # of absmax, for an element of a block
LOAD = {4: 2, 2: 1}  # accesses of 16 bytes for eight elements


def _blockwise() -> list[Way]:
    ways = []
    for dtype, size in DTYPES.items():
        moved = size + CODE + BLOCK_256
        peers = f"bitsandbytes {moved:.2f}"
        need = {
            "LDG.128": LOAD[size],
            "~from_bfloat16": 8 * (dtype == "bf16"),
            "~pack_signs": 6,  # of the signed map
            "~nearest_entry": 0,
            "STG.64": 1,
        }
        ways.append(Way(f"quantize_blockwise, {dtype}", "quantize_kernel<32>", need, 8, moved, 21, peers))
        packs = {"F2FP.BF16": 4 * (dtype == "bf16")}
        need = {"LDG.64": 1, **packs, "STG.128": LOAD[size]}
        ways.append(Way(f"dequantize_blockwise, {dtype}", "dequantize_kernel<32>", need, 8, moved, 12, peers))
    return ways


def _weight_4bit() -> list[Way]:
    ways = []
    for dtype, size in DTYPES.items():
        moved = size + CODE / 2 + BLOCK_64
        peers = f"bitsandbytes {moved:.2f}"
        need = {"LDG.128": LOAD[size], "~from_bfloat16": 8 * (dtype == "bf16"), "STG": 1}
        ways.append(Way(f"quantize_4bit, {dtype}", "quantize_4bit_kernel<8, (Nibbles)1>", need, 8, moved, 12, peers))
        packs = {"F2FP.BF16": 8 * (dtype == "bf16")}
        need = {**packs, "STG.128": 2 * LOAD[size], "~decode_askew": 0, "~nested": 0}
        ways.append(Way(f"dequantize_4bit, {dtype}", "look_up_kernel<(Nibbles)1>", need, 16, moved, 21, peers))
    return ways


def _linear_4bit() -> list[Way]:
    moved = CODE / 2 + BLOCK_64
    peers = f"bitsandbytes {moved:.2f}"
    more = f"{peers} or {moved + 4:.2f}"  # by its own kernel or by a dequantized weight
    need = {"LDG.128": 2, r"~absmax_\[": 4, r"~codes_ \+": 4, "LDS.64": 16, "FFMA": 32, "LDG.U8": 0, "~nested": 0}
    name = "gemv_kernel<WholeOctets>"
    ways = [Way("linear_4bit, fp32, 1 row", name, need, 32, moved, 6.2, peers, innermost=True)]
    # Rows; tiles of 16 features and of 8 rows; segments in which a thread has 32 weights of each tile of features.
    for rows, heights, tiles, segments, most in (
        ("8 rows, few features", 1, 1, 4, 3.6),
        ("8 rows", 2, 1, 2, 3.0),
        ("16 rows", 2, 2, 2, 3.3),
        ("64 rows", 2, 8, 2, 6.2),
    ):
        need = {"HMMA": 4 * segments * tiles * heights, "LDG.64": 2 * segments * heights, "~nested": 0}
        name = f"tensor_core_kernel<(DType)1, 64, {heights}, {tiles}>"
        work, others = f"linear_4bit, bf16, {rows}", peers if tiles == 1 else more
        ways.append(Way(work, name, need, 32 * segments * heights, moved, most, others, innermost=True))
    return ways


def _int8() -> list[Way]:
    ways = []
    for dtype, size in DTYPES.items():
        need = {"LDG.128": LOAD[size], "~from_bfloat16": 8 * (dtype == "bf16"), "STG.64": 1}
        ways.append(Way(f"int8_vectorwise_quant, {dtype}", "quantize_rows_kernel<32>", need, 8, size + CODE, 25))
    need = {"LDG.128": 6, "IMMA": 8}
    ways.append(Way("int8_linear_matmul, 16 rows", "multiply_kernel", need, 64, CODE, 2.6, innermost=True))
    return ways


def _step(work: str, rule: str, states: int, quantized: bool, dtype: str, most: float, peers: str) -> Way:
    size = DTYPES[dtype]
    moved = 3 * size + 2 * states * (CODE + BLOCK_256 if quantized else 4)
    need = {
        "LDG.128": 2 * LOAD[size] + (0 if quantized else 2 * states),
        "STG.128": LOAD[size] + (0 if quantized else 2 * states),
        "~from_bfloat16": 16 * (dtype == "bf16"),
        "F2FP.BF16": 4 * (dtype == "bf16"),
    }
    if quantized:
        need |= {"LDG.64": states, "STG.64": states}
    kernel = f"step_kernel<{rule}, {'Dynamic8' if quantized else 'Uncoded'}>"
    return Way(f"{work}, {dtype}", kernel, need, 8, moved, most, peers.format(moved=moved))


def _optimizers() -> list[Way]:
    return [
        _step("AdamW8bit", "Adam", 2, True, "fp32", 100, "bitsandbytes {moved:.2f}; torch 28"),
        _step("AdamW8bit", "Adam", 2, True, "bf16", 100, "bitsandbytes {moved:.2f}; torch 14"),
        _step("AdamW32bit", "Adam", 2, False, "fp32", 60, "bitsandbytes 28; torch 28"),
        _step("AdamW32bit", "Adam", 2, False, "bf16", 60, "bitsandbytes 22; torch 14"),
        _step("Lion8bit", "Lion", 1, True, "bf16", 60, "bitsandbytes {moved:.2f}"),
    ]


WAYS = [*_optimizers(), *_blockwise(), *_weight_4bit(), *_linear_4bit(), *_int8()]
