"""What an 8-bit code means, and nearest-entry quantization by brute force.

The maps follow T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561), and block-wise
scaling follows T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2.
Everything is float64: a result of the library is compared with the real number, not with another rounding of it.
"""

import torch
from torch import Tensor

from bnbops.testing.expect import expect_nearest as assert_nearest
from bnbops.testing.references import blockwise

__all__ = ["assert_nearest"]


def dynamic_map(signed: bool, decades: int = 7) -> Tensor:
    """Decade `i` is (10^(i - decades), 10^(i - decades + 1)), cut into cells, twice as many as in the decade below.

    A code means the centre of its cell. Zero and 1.0 are entries of their own.
    """
    magnitudes = []
    for i in range(decades):
        cells = 2**i if signed else 2 ** (i + 1)
        top = 10.0 ** (i - decades + 1)
        magnitudes += [top * (0.1 + 0.9 * (j + 0.5) / cells) for j in range(cells)]
    negatives = [-x for x in magnitudes] if signed else []
    return torch.tensor(sorted([*negatives, 0.0, *magnitudes, 1.0]), dtype=torch.float64)


def linear_map(signed: bool) -> Tensor:
    """Equally spaced values: 255 from -1 to 1 with a second zero, or 256 from 0 to 1."""
    values = [i / 127 for i in range(-127, 128)] + [0.0] if signed else [i / 255 for i in range(256)]
    return torch.tensor(sorted(values), dtype=torch.float64)


def fp8_map(exponent_bits: int = 5, precision_bits: int = 2) -> Tensor:
    """The signed values of a minifloat over its largest. Exponent 0 has no implicit one, and the scale 2^-1."""
    largest_exponent = 2**exponent_bits - 1
    magnitudes = []
    for exponent in range(largest_exponent + 1):
        for i in range(2**precision_bits):
            fraction = i / 2**precision_bits
            magnitudes.append(fraction / 2 if exponent == 0 else (1 + fraction) * 2.0**exponent)
    values = [sign * x / max(magnitudes) for x in magnitudes for sign in (-1, 1)]
    return torch.tensor(sorted(values), dtype=torch.float64)


def blocks(x: Tensor, blocksize: int) -> Tensor:
    """A scale for each flat block of `blocksize` elements; the last one may be short."""
    return torch.zeros(-(-x.numel() // blocksize))


def normalised(x: Tensor, blocksize: int) -> Tensor:
    """Each element over the absmax of its flat block (fp64, shape of `x`): what the encoder looks up."""
    return blockwise.normalised(x, blocks(x, blocksize), blocksize)


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """The index of the nearest entry, by trying all of them."""
    return (x.double()[..., None] - code.double()).abs().argmin(dim=-1).to(torch.uint8)


def nearest_by_midpoints(x: Tensor, code: Tensor) -> Tensor:
    """`nearest` for millions of values: the number of midpoints below `x` (float64, exact; `code` is sorted)."""
    code = code.double()
    return torch.bucketize(x.double(), (code[1:] + code[:-1]) / 2).to(torch.uint8)


GRID = 1 / 65535  # half a cell of the table below


def nearest_on_grid(x: Tensor, code: Tensor) -> Tensor:
    """How the golden files were encoded: bitsandbytes' CPU kernel rounds `x` to a table of 65536 points over [-1, 1]
    and takes the entry nearest to the point (measured, see golden/README.md), hence up to `GRID` beside a midpoint."""
    index = ((x.float().clamp(-1, 1) + 1) * 32767.5 + 0.5).floor()
    return nearest_by_midpoints(index / 32767.5 - 1, code)


def quantize(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes of `x`'s shape and one fp32 absmax per flat block."""
    absmax = blockwise.block_absmax(x, blocks(x, blocksize), blocksize).float()
    return nearest(normalised(x, blocksize), code), absmax


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """One fp32 product per element, rounded once more to `dtype`."""
    return blockwise.decode(codes, absmax, code, blocksize).to(dtype)
