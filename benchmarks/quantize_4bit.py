"""quantize_4bit and dequantize_4bit of bnbops beside those of bitsandbytes, for linear.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from linear_contenders import decoded, size
from measure import Candidate, Memory, VerificationError, report, take_turns, threads
from quantize import excess_distance
from torch import Tensor

import bnbops.functional

BLOCKSIZE = 64
WIDTH = 4096  # of the matrix; bitsandbytes works row by row
QUANT_TYPE = "nf4"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLACK = 2 * 10 * 2.0**-23  # how much farther than the nearest value the chosen one may be, on both sides of a midpoint


def quantize(functional: ModuleType, A: Tensor) -> tuple[Tensor, Any]:
    return functional.quantize_4bit(A, blocksize=BLOCKSIZE, quant_type=QUANT_TYPE)


def dequantize(functional: ModuleType, packed: Tensor, state: Any) -> Tensor:
    return functional.dequantize_4bit(packed, state)


def verify(library: str, functional: ModuleType, name: str, A: Tensor) -> tuple[Tensor, Any]:
    """Holds one library's results against their definition, and returns its packed codes and state.

    Raises:
        VerificationError: a wrong scale, a code that is not the nearest, or a value that is not code times scale.
    """
    packed, state = quantize(functional, A)
    values = dequantize(functional, packed, state)
    blocks = A.double().view(-1, BLOCKSIZE)
    scales = blocks.abs().amax(dim=1)
    if not torch.equal(state.absmax.double(), scales):
        raise VerificationError(f"{library}, {name}: absmax is not the largest magnitude of each block")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    excess = excess_distance((blocks / scales[:, None]).flatten(), codes, state.code)
    if not excess <= SLACK:
        raise VerificationError(f"{library}, {name}: a code is {excess:.2g} farther than the nearest one")
    if not torch.equal(values, decoded(packed, state).to(A.dtype)):
        raise VerificationError(f"{library}, {name}: values are not code * absmax")
    if library == "bnbops":
        for n in {1, 2} - {torch.get_num_threads()}:
            with threads(n):
                again = [quantize(functional, A)[0], dequantize(functional, packed, state)]
            if not all(torch.equal(a, b) for a, b in zip(again, [packed, values], strict=True)):
                raise VerificationError(f"bnbops, {name}: {n} threads give other bits than {torch.get_num_threads()}")
    return packed, state


def run(elements: int, rounds: int, memory: Memory, bitsandbytes: ModuleType | None) -> Iterator[dict[str, Any]]:
    """A section for quantize_4bit, and one for dequantize_4bit."""
    values = torch.randn(max(1, elements // WIDTH), WIDTH, generator=torch.Generator().manual_seed(0))
    values = values.to(memory.device)
    elements = values.numel()
    libraries = {"bnbops": bnbops.functional} | ({"bitsandbytes": bitsandbytes.functional} if bitsandbytes else {})
    to_codes, to_values = [memory.candidate()], [memory.candidate()]
    for dtype_name, dtype in DTYPES.items():
        A = values.to(dtype)
        for library, functional in libraries.items():
            packed, state = verify(library, functional, dtype_name, A)
            moved = size(A, packed, state.absmax)
            name, baseline = f"{library}, {dtype_name}", f"bitsandbytes, {dtype_name}"
            to_codes.append(Candidate(name, functools.partial(quantize, functional, A), elements, moved, baseline))
            to_values.append(
                Candidate(name, functools.partial(dequantize, functional, packed, state), elements, moved, baseline)
            )
            if library == "bnbops":  # no ratio: on the CPU bitsandbytes has not got it
                out = functools.partial(functional.dequantize_4bit, packed, state, out=torch.zeros_like(A))
                to_values.append(Candidate(f"{name}, out=", out, elements, moved))
        print(f"verified {dtype_name}: {', '.join(libraries)}", flush=True)

    for title, turns in (("quantize_4bit", to_codes), ("dequantize_4bit", to_values)):
        take_turns(turns, rounds, memory)
        yield report(f"{title}, NF4, {elements} elements", "the speed of bitsandbytes", turns)
