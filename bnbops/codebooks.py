"""The quantization maps of 256 entries: the one place where an 8-bit code gets its value.

Every rounding is spelled out, so a map has the same bits on every machine (`torch.linspace` has not). The C++ library
takes its tables from here too: the build runs this file (`python codebooks.py --header`), which is why it imports
torch alone.
"""

from __future__ import annotations

import itertools
import math
import sys

import torch
from torch import Tensor

__all__ = ["create_dynamic_map", "create_fp8_map", "create_linear_map", "create_normal_map"]

ENTRIES = 256


def _linspace(start: float, end: float, steps: int) -> Tensor:
    """`torch.linspace` with every rounding spelled out: an fp32 step, counted up from `start`, then down from `end`.

    Each value is one fused multiply-add; float64 holds its product exactly, so only the last line rounds.
    """
    first, last = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (start, end))
    step = ((last - first) / (steps - 1)).double()
    index = torch.arange(steps, dtype=torch.float64, device="cpu")
    from_start = first.double() + step * index
    from_end = last.double() - step * (steps - 1 - index)
    return torch.where(index < steps // 2, from_start, from_end).float()


def _padded(values: Tensor) -> Tensor:
    """Sorts `values` and fills up to 256 entries with zeros, so that an 8-bit code can index any map."""
    zeros = torch.zeros(ENTRIES - values.numel(), dtype=torch.float32, device="cpu")
    return torch.cat([values, zeros]).sort(stable=True).values


def _check_bits(total_bits: int) -> None:
    if not 2 <= total_bits <= 8:
        raise ValueError(f"total_bits must be between 2 and 8 (a map has at most 256 entries), got {total_bits}")


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map: leading zero bits choose a decade, the bits after them a linear position in it.

    Decade `i` covers `10**(i - max_exponent_bits + 1) * [0.1, 1]`; its values are the centres of equal cells, twice
    as many as in the decade below. Zero and 1.0 are added.

    Args:
        signed: values of both signs in equal number; else only positive ones, twice as many.
        max_exponent_bits: number of decades. A signed map may name more than its codes reach; it lacks the lowest ones.
        total_bits: width of a code; maps of fewer than 8 bits are padded with zeros.

    Returns:
        fp32 tensor of 256 sorted values in [-1, 1].

    Raises:
        ValueError: the bits do not fit into a code.

    Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561), section 2.
    """
    _check_bits(total_bits)
    fraction_bits = total_bits - 1 - max_exponent_bits
    if max_exponent_bits < 1 or (fraction_bits < 0 and not signed):
        most = "at least 1" if signed else f"between 1 and total_bits - 1 = {total_bits - 1}"
        raise ValueError(f"max_exponent_bits must be {most}, got {max_exponent_bits}")

    def cells(count: int, decade: int) -> Tensor:
        edges = _linspace(0.1, 1.0, count + 1)
        return (10.0 ** (decade - max_exponent_bits + 1)) * ((edges[:-1] + edges[1:]) / 2)

    lowest = max(0, -fraction_bits)  # below it a decade has less than one cell
    magnitudes = [cells(2 ** (i + fraction_bits + (not signed)), i) for i in range(lowest, max_exponent_bits)]
    if fraction_bits > 0:  # codes with no indicator bit at all: a coarser copy of the top decade
        magnitudes.append(cells(2**fraction_bits - 1, max_exponent_bits - 1))
    positive = torch.cat(magnitudes)
    values = torch.cat([positive, -positive]) if signed else positive
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    return _padded(torch.cat([values, ends]))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Equally spaced values from -1 (or 0, unsigned) to 1.

    Args:
        signed: start at -1 instead of 0.
        total_bits: width of a code; the gap up to 256 entries is filled with zeros.
        add_zero: give up one value of a signed 8-bit map so that zero is one of them (always so below 8 bits).

    Returns:
        fp32 tensor of 256 sorted values.
    """
    _check_bits(total_bits)
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    values = _linspace(-1.0 if signed else 0.0, 1.0, count)
    return _padded(values)


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """The values of a small float format with sub-normals, divided by the largest.

    Args:
        signed: one bit is the sign.
        exponent_bits: width of the exponent.
        precision_bits: width of the fraction.
        total_bits: sign, exponent and fraction together.

    Returns:
        fp32 tensor of 256 sorted values in [-1, 1].

    Raises:
        ValueError: the three widths do not add up to `total_bits`.
    """
    _check_bits(total_bits)
    if exponent_bits + precision_bits + int(signed) != total_bits:
        raise ValueError(
            f"sign ({int(signed)}) + exponent_bits ({exponent_bits}) + precision_bits ({precision_bits}) bits must "
            f"add up to total_bits = {total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = [f / 2**precision_bits for f in range(2**precision_bits)]
    magnitudes = [
        fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** (bias + 1 - exponent)
        for exponent, fraction in itertools.product(range(2**exponent_bits), fractions)
    ]
    scale = 2.0 ** (1 - math.frexp(max(magnitudes))[1])  # float32 may not hold the largest
    values = torch.tensor([magnitude * scale for magnitude in magnitudes], dtype=torch.float32, device="cpu")
    values = _padded(torch.cat([values, -values]) if signed else values)
    return values / values.max()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution: NormalFloat, filled up with zeros.

    Args:
        offset: probability of the outermost value, above 0.5 and below 1.
        use_extra_value: 8 positive values instead of 7; 7 are negative.

    Returns:
        fp32 tensor of 256 sorted values in [-1, 1].

    Raises:
        ValueError: the offset is no probability of a positive value.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3.
    """
    if not 0.5 < offset < 1:
        raise ValueError(f"offset must be between 0.5 and 1, got {offset}")

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(_linspace(offset, 0.5, count + 1)[:-1].double()).float()

    values = _padded(torch.cat([quantiles(8 if use_extra_value else 7), -quantiles(7)]))
    return values / values.max()


def cpp_header() -> str:
    """The maps that C++ needs, as hexadecimal float literals (`csrc/` includes the result as `codebooks.h`)."""

    def table(name: str, values: Tensor) -> str:
        literals = ", ".join(f"{v.hex()}f" for v in values.tolist())
        return f"constexpr float {name}[{len(values)}] = {{{literals}}};"

    return f"""// Generated from bnbops/codebooks.py by the build.
#pragma once
namespace bnbops {{
{table("kDynamicSigned", create_dynamic_map(signed=True))}
{table("kDynamicUnsigned", create_dynamic_map(signed=False))}
}}  // namespace bnbops
"""


if __name__ == "__main__":
    if sys.argv[1:] != ["--header"]:
        sys.exit("usage: python codebooks.py --header")
    sys.stdout.write(cpp_header())
