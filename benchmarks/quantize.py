"""Times quantize_blockwise and dequantize_blockwise of bnbops beside those of bitsandbytes.

Verifies every call against plain torch arithmetic first.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from measure import (
    Candidate,
    Memory,
    VerificationError,
    count,
    import_peer,
    parser,
    report,
    save,
    take_turns,
    threads,
)
from torch import Tensor

import bnbops.functional

BLOCKSIZES = (256, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAPS = {
    "dynamic": bnbops.functional.create_dynamic_map,  # the default one
    "linear": bnbops.functional.create_linear_map,
    "fp8": bnbops.functional.create_fp8_map,
}

# How much farther than the nearest entry of the codebook (which spans [-1, 1]) the chosen one may be. bnbops may choose
# either neighbour up to 10 ulp beside a midpoint; bitsandbytes looks up the nearest of 65536 points first.
SLACK = {"bnbops": 2 * 10 * 2.0**-23, "bitsandbytes": 2 / 65535}
CHECKED_AT_ONCE = 2**20


@dataclass(frozen=True)
class Case:
    """An input; its codes and scales (bnbops'), which are the input of dequantization."""

    name: str
    A: Tensor
    code: Tensor
    blocksize: int
    codes: Tensor
    absmax: Tensor


def cases(elements: int, device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(elements, generator=generator)
    values *= 10 ** (-4 * torch.rand(elements, generator=generator))  # so that every part of a map is used
    values = values.to(device)
    for dtype_name, dtype in DTYPES.items():
        A = values.to(dtype)
        for map_name, create in MAPS.items():
            for blocksize in BLOCKSIZES:
                code = create().to(device)
                codes, state = bnbops.functional.quantize_blockwise(A, code, blocksize=blocksize)
                yield Case(f"{dtype_name} {map_name} {blocksize}", A, code, blocksize, codes, state.absmax)


def quantize(functional: ModuleType, case: Case) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_blockwise(case.A, case.code, blocksize=case.blocksize)
    return codes, state.absmax


def dequantize(functional: ModuleType, case: Case, out: Tensor | None = None) -> Tensor:
    state = functional.QuantState(case.absmax, code=case.code, blocksize=case.blocksize, dtype=case.A.dtype)
    return functional.dequantize_blockwise(case.codes, state, out=out)


def verify(library: str, functional: ModuleType, case: Case) -> None:
    """Holds one library's results against their definition.

    Raises:
        VerificationError: a wrong scale, an entry that is not the nearest, or a value that is not entry times scale.
    """
    codes, absmax = quantize(functional, case)
    values = dequantize(functional, case)
    for i in range(0, codes.numel(), CHECKED_AT_ONCE):
        part = slice(i, i + CHECKED_AT_ONCE)
        of_blocks = slice(i // case.blocksize, (i + CHECKED_AT_ONCE) // case.blocksize)
        blocks = case.A[part].float().view(-1, case.blocksize)
        scales = blocks.abs().amax(dim=1)
        if not torch.equal(absmax[of_blocks], scales):
            raise VerificationError(f"{library}, {case.name}: absmax is not the largest magnitude of each block")
        excess = excess_distance((blocks.double() / scales[:, None]).flatten(), codes[part], case.code)
        if not excess <= SLACK[library]:
            raise VerificationError(f"{library}, {case.name}: a code is {excess:.2g} farther than the nearest one")
        wanted = case.code[case.codes[part].long()].view_as(blocks) * case.absmax[of_blocks, None]
        if not torch.equal(values[part], wanted.flatten().to(case.A.dtype)):
            raise VerificationError(f"{library}, {case.name}: values are not code[codes] * absmax")
    if library == "bnbops":
        verify_threads(functional, case, [codes, absmax, values])


def excess_distance(x: Tensor, codes: Tensor, code: Tensor) -> float:
    """How much farther from `x` the chosen entries are than the nearest ones, at most."""
    code = code.double()
    nearest = code[torch.bucketize(x, (code[1:] + code[:-1]) / 2)]
    return ((x - code[codes.long()]).abs() - (x - nearest).abs()).max().item()


def verify_threads(functional: ModuleType, case: Case, expected: list[Tensor]) -> None:
    for n in {1, 2} - {torch.get_num_threads()}:
        with threads(n):
            again = [*quantize(functional, case), dequantize(functional, case)]
        if not all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)):
            raise VerificationError(f"bnbops, {case.name}: {n} threads give other bits than {torch.get_num_threads()}")


def candidates(library: str, functional: ModuleType, case: Case) -> tuple[list[Candidate], list[Candidate]]:
    """The calls to quantize, and those to dequantize. Each reads its input and writes its output once."""
    n = case.A.numel()
    moved = n * (case.A.element_size() + 1) + 4 * case.absmax.numel()
    name, baseline = f"{library}, {case.name}", f"bitsandbytes, {case.name}"
    to_codes = [Candidate(name, functools.partial(quantize, functional, case), n, moved, baseline)]
    to_values = [Candidate(name, functools.partial(dequantize, functional, case), n, moved, baseline)]
    if library == "bnbops":
        # No ratio: bitsandbytes has no out= on the CPU, and its page faults are not the arithmetic's.
        run = functools.partial(dequantize, functional, case, torch.zeros_like(case.A))
        to_values.insert(0, Candidate(f"{name}, out=", run, n, moved))
    return to_codes, to_values


def reuse_memory() -> None:
    """Makes glibc keep freed memory, so that no call spends its time in page faults of its result.

    Raises:
        OSError: the C library is another one.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)):
        raise OSError("--reuse-memory needs glibc's malloc")


def whole_blocks(elements: int) -> int:
    return max(1, elements // max(BLOCKSIZES)) * max(BLOCKSIZES)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    options = parser(__doc__, ["bitsandbytes"])
    options.add_argument("--elements", type=count, default=count("16Mi"), help="rounded to whole blocks")
    options.add_argument("--reuse-memory", action="store_true", help="no page faults in results (see README.md)")
    args = options.parse_args(argv)
    elements = whole_blocks(min(args.elements, 2**14) if args.quick else args.elements)
    rounds = args.rounds or (3 if args.quick else 11)
    if args.reuse_memory:
        reuse_memory()
    memory = Memory(count("1Mi" if args.quick else "64Mi"))

    peers = {name: module for name in args.peers if (module := import_peer(name))}
    sections = list(run(elements, rounds, memory, peers))
    if args.json:
        save(args.json, sections)
    return sections


def run(elements: int, rounds: int, memory: Memory, peers: dict[str, ModuleType]) -> Iterator[dict[str, Any]]:
    """A section for quantize_blockwise, and one for dequantize_blockwise."""
    libraries = {"bnbops": bnbops.functional} | {name: module.functional for name, module in peers.items()}
    to_codes, to_values = [memory.candidate()], [memory.candidate()]
    for case in cases(elements, memory.device):
        for library, functional in libraries.items():
            verify(library, functional, case)
            quantizers, dequantizers = candidates(library, functional, case)
            to_codes += quantizers
            to_values += dequantizers
        print(f"verified {case.name}: {', '.join(libraries)}", flush=True)

    for title, turns in (("quantize_blockwise", to_codes), ("dequantize_blockwise", to_values)):
        take_turns(turns, rounds, memory)
        yield report(f"{title}, {elements} elements", "the speed of bitsandbytes", turns)


if __name__ == "__main__":
    try:
        main()
    except VerificationError as error:
        sys.exit(f"verification failed: {error}")
