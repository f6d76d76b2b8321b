"""Times linear layers with 4- and 8-bit weights of bnbops beside dense ones, bitsandbytes and torchao.

Verifies every layer against float64 arithmetic with its own quantized weight first, then times those very layers in
turns. Quantizing and dequantizing to 4 bits (quantize_4bit.py) is timed, too.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import quantize_4bit
import torch
from linear_contenders import DENSE, THRESHOLD, Contender, contenders_4bit, contenders_8bit, size
from measure import (
    Candidate,
    Memory,
    VerificationError,
    count,
    import_peer,
    parser,
    ratios,
    results,
    save,
    table,
    take_turns,
    threads,
)
from quantize import reuse_memory
from torch import Tensor
from torch.nn import functional as F

PARTS = ("forward", "backward", "quantize", "int8")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BITSANDBYTES = ("bitsandbytes Linear4bit, repacked", "bitsandbytes Linear4bit, plain", "bitsandbytes Linear8bitLt")
PEAK = "peak: large dense product"
PEAK_ROWS = 2048
OUTLIERS = 8  # columns of the input; language models have a few in thousands

COLUMNS = {
    "name": "{}",
    "ms": "{:.3f}",
    "vs dense": "{:.2f}x",
    "vs bitsandbytes": "{:.2f}x",
    "GB/s": "{:.1f}",
    "% of stream": "{:.0f}",
    "GFLOP/s": "{:.0f}",
    "% of peak": "{:.0f}",
    "rounds": "{}",
}

Results = list[Tensor]


def product(layer: Callable[[Tensor], Tensor], x: Tensor) -> Results:
    with torch.no_grad():
        return [layer(x)]


def product_and_gradient(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Results:
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


def distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| (Euclidean norms) of the worst row."""
    error = (actual.double() - expected).norm(dim=1)
    return (error / expected.norm(dim=1)).max().item()  # keeps a NaN


def verify(contender: Contender, run: Callable[[], Results], expected: Results) -> None:
    """Holds a contender's results against float64 arithmetic.

    Raises:
        VerificationError: a row is off, or (bnbops) the bits depend on the number of threads.
    """
    actual = run()
    off = max(distance(a, wanted) for a, wanted in zip(actual, expected, strict=True))
    if not off <= contender.tolerance:
        raise VerificationError(f"{contender.name}: a row is {off:.2g} off, more than {contender.tolerance:g}")
    if contender.fixed_bits:
        for n in {1, 2} - {torch.get_num_threads()}:
            with threads(n):
                again = run()
            if not all(torch.equal(a, b) for a, b in zip(again, actual, strict=True)):
                raise VerificationError(f"{contender.name}: {n} threads give other bits than {torch.get_num_threads()}")
    same_bits = ", same bits with 1 and 2 threads" if contender.fixed_bits else ""
    print(
        f"verified {contender.name}: worst row {off:.1e} off (tolerance {contender.tolerance:g}){same_bits}", flush=True
    )


def peak(weight: Tensor, dtype: torch.dtype) -> Candidate:
    """The yardstick of arithmetic: torch's product of a dense weight with many rows."""
    x, weight = inputs_of(PEAK_ROWS, weight.shape[1], dtype, weight.device), weight.to(dtype)
    run = functools.partial(product, lambda x: F.linear(x, weight), x)
    return Candidate(PEAK, run, PEAK_ROWS * weight.numel(), size(x, weight, *run()))


def candidate(contender: Contender, run: Callable[[], Results], inputs: Results, outputs: Results) -> Candidate:
    """Each pass reads the weight; inputs are read and outputs written once. Its elements are multiply-adds."""
    passes, multiply_adds = len(outputs), inputs[0].shape[0] * contender.weight.numel()
    moved = passes * contender.weight_bytes + size(*inputs, *outputs)
    return Candidate(contender.name, run, passes * multiply_adds, moved, DENSE)


def run_section(
    title: str, contenders: list[Contender], x: Tensor, grad: Tensor | None, rounds: int, memory: Memory
) -> dict[str, Any]:
    """Verifies and times the product with x; if grad is given, together with the gradient to x."""
    print(f"\n# {title}", flush=True)
    candidates = [memory.candidate(), peak(contenders[0].weight, x.dtype)]
    for contender in contenders:
        expected = [contender.expected(x.detach())]
        if grad is None:
            run, inputs = functools.partial(product, contender.layer, x), [x]
        else:
            run, inputs = functools.partial(product_and_gradient, contender.layer, x, grad), [x, grad]
            expected.append(grad.double() @ contender.weight.double())
        verify(contender, run, expected)
        candidates.append(candidate(contender, run, inputs, run()))
    take_turns(candidates, rounds, memory)
    return report(title, candidates)


def report(title: str, candidates: list[Candidate]) -> dict[str, Any]:
    """Prints a section, and returns it for the JSON file."""
    by_name = {c.name: c for c in candidates}
    theirs = next((by_name[name] for name in BITSANDBYTES if name in by_name), None)
    fastest = by_name[PEAK].elements / min(by_name[PEAK].seconds.values())
    rows = results(candidates)
    for c, row in zip(candidates, rows, strict=True):
        is_layer = c.baseline is not None  # not a yardstick
        row["vs dense"], row["vs dense, by round"] = row["ratio"], row["round ratio"]
        row["vs bitsandbytes"], row["vs bitsandbytes, by round"] = ratios(c, theirs if is_layer else None)
        has_flops = is_layer or c.name == PEAK
        row["GFLOP/s"] = 2 * row["G/s"] if has_flops else None
        row["% of peak"] = 100 * row["G/s"] * 1e9 / fastest if has_flops else None
    unit = f"the speed of {DENSE}" + (f", and of {theirs.name}" if theirs else "")
    heading = f"{title}; threads: {torch.get_num_threads()}; ratio 1 = {unit}"
    print(f"\n## {heading}\n\n{table(rows, COLUMNS)}", flush=True)
    return {"title": title, "rows": rows}


def inputs_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def with_outliers(x: Tensor) -> Tensor:
    x[:, :: max(1, x.shape[1] // OUTLIERS)] *= 4 * THRESHOLD
    return x


def product_sections(args: Any, rounds: int, memory: Memory, peers: dict[str, ModuleType]) -> Iterator[dict[str, Any]]:
    dtype = DTYPES[args.dtype]
    n, k = args.features
    weight = (0.02 * torch.randn(n, k, generator=torch.Generator().manual_seed(0))).to(memory.device, dtype)
    inputs = functools.partial(inputs_of, dtype=dtype, device=memory.device)
    size_and_dtype = f"{n}x{k} {args.dtype}" + (", nested scales" if args.nested else "")
    if "forward" in args.parts:
        contenders = list(contenders_4bit(weight, args.nested, peers, training=False))
        for rows in args.rows:
            title = f"NF4 {size_and_dtype}, forward, rows: {rows}"
            yield run_section(title, contenders, inputs(rows, k), None, rounds, memory)
    if "backward" in args.parts:
        contenders = list(contenders_4bit(weight, args.nested, peers, training=True))
        x, grad = inputs(args.rows[-1], k).requires_grad_(), inputs(args.rows[-1], n)
        title = f"NF4 {size_and_dtype}, forward and backward to the input, rows: {args.rows[-1]}"
        yield run_section(title, contenders, x, grad, rounds, memory)
    if "int8" in args.parts:
        contenders = list(contenders_8bit(weight, peers))
        for rows in args.rows:
            title = f"int8 {n}x{k} {args.dtype}, threshold {THRESHOLD:g}, forward, rows: {rows}"
            x = with_outliers(inputs(rows, k))
            yield run_section(title, contenders, x, None, rounds, memory)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__, ["bitsandbytes", "torchao"])
    options.add_argument(
        "--rows", type=count, nargs="+", default=[1, 16, 256], help="of the input; backward takes the last"
    )
    options.add_argument("--features", type=count, nargs=2, metavar=("OUT", "IN"), default=[4096, 4096], help="sizes")
    options.add_argument("--elements", type=count, default=count("16Mi"), help="to quantize; rounded to whole blocks")
    options.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the input and of the dense weight")
    options.add_argument("--nested", action="store_true", help="4-bit scales are quantized, too")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to time")
    options.add_argument("--reuse-memory", action="store_true", help="no page faults in results (see README.md)")
    args = options.parse_args(argv)
    if args.quick:
        args.rows = sorted({min(rows, 8) for rows in args.rows})
        args.features = [min(size, 256) for size in args.features]
    if any(size % quantize_4bit.BLOCKSIZE for size in args.features):
        options.error(f"--features must be multiples of {quantize_4bit.BLOCKSIZE}")
    if args.reuse_memory:
        reuse_memory()
    rounds = args.rounds or (3 if args.quick else 21)
    memory = Memory(count("1Mi" if args.quick else "64Mi"))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its layers would warn in each call
    peers = {name: module for name in args.peers if (module := import_peer(name))}

    sections = list(product_sections(args, rounds, memory, peers))
    if "quantize" in args.parts:
        elements = min(args.elements, 2**14) if args.quick else args.elements
        sections += quantize_4bit.run(elements, rounds, memory, peers.get("bitsandbytes"))
    if args.json:
        save(args.json, sections)
    return sections


if __name__ == "__main__":
    try:
        main()
    except VerificationError as error:
        sys.exit(f"verification failed: {error}")
