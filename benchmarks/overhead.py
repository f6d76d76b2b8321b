"""Times what calls cost beside their arithmetic: layers so small, and steps over tensors so small, that little is left.

Verifies the layers against float64 arithmetic with their own quantized weights, and the steps against torch's AdamW,
first. Everything runs in one thread, with warm caches.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import linear
import scaling
import torch
from linear_contenders import TOLERANCES, Contender, contender_4bit, linear_8bit, llm_int8, size
from measure import Candidate, Memory, parser, ratios, save, table, take_turns, threads
from torch import Tensor, nn

import bnbops

DENSE = "torch Linear"
FEATURES = 64
CALLS = 100  # in a row, so that the clock's own time does not count
COLUMNS = {"layer": "{}", "us": "{:.1f}", "vs torch": "{:.2f}x", "rounds": "{}"}


def contenders() -> Iterator[Contender]:
    """Layers of 64 x 64 float32 weights."""
    weight = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0)) / 8
    dense = nn.Linear(FEATURES, FEATURES, bias=False)
    dense.weight = nn.Parameter(weight.clone(), requires_grad=False)
    tolerance = TOLERANCES[weight.dtype]
    yield Contender(DENSE, dense, weight, size(weight), tolerance)
    yield contender_4bit("bnbops Linear4bit", bnbops.nn, weight, False, tolerance)
    yield contender_4bit("bnbops Linear4bit, nested", bnbops.nn, weight, True, tolerance)
    layer, codes, scales = linear_8bit(bnbops.nn, weight)
    values = codes * (scales / 127)[:, None]
    yield Contender("bnbops Linear8bitLt", layer.eval(), values, size(codes, scales), tolerance, llm_int8)


def in_a_row(call: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        call()


def layers(gradient: bool, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Microseconds of a call with one row, without a gradient, or with that of its input.

    Raises:
        VerificationError: a layer computes something else.
    """
    x = linear.inputs_of(1, FEATURES, torch.float32, torch.device("cpu")).requires_grad_(gradient)
    grad = torch.ones(1, FEATURES)
    candidates = []
    for contender in contenders():
        expected = [contender.expected(x.detach())]
        run: Callable[[], list[Tensor]] = functools.partial(linear.product, contender.layer, x)
        if gradient:
            run = functools.partial(linear.product_and_gradient, contender.layer, x, grad)
            expected.append(grad.double() @ contender.weight.double())
        linear.verify(contender, run, expected)
        candidates.append(Candidate(contender.name, functools.partial(in_a_row, run, calls), calls, 1))
    take_turns(candidates, rounds, Memory(4096))  # caches stay warm: it is the host's work that counts
    rows = []
    for candidate in candidates:
        ratio, _ = ratios(candidate, candidates[0])
        us = statistics.median(candidate.seconds.values()) / calls * 1e6
        rows.append({"layer": candidate.name, "us": us, "vs torch": ratio, "rounds": len(candidate.seconds)})
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command line; returns the sections."""
    args = parser(__doc__, []).parse_args(argv)
    sections = []

    def report(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
        print(f"\n## {title}; threads: 1\n\n{table(rows, columns)}", flush=True)
        sections.append({"title": title, "rows": rows})

    rounds, calls = args.rounds or (2 if args.quick else 50), 2 if args.quick else CALLS
    with threads(1):
        for gradient, title in ((False, "no gradient"), (True, "and the gradient of its input")):
            report(f"A row times {FEATURES} x {FEATURES}, {title}", layers(gradient, rounds, calls), COLUMNS)
        counts = scaling.TENSORS[:1] if args.quick else scaling.TENSORS
        rows = [row for count in counts for row in scaling.overhead(count, min(rounds, 15), compiled=0)]
        report(f"A step over tensors of {scaling.SHAPE[1]} elements", rows, scaling.OVERHEAD)
    if args.json:
        save(args.json, sections)
    return sections


if __name__ == "__main__":
    main()
