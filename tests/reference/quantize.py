"""What an 8-bit code means, and nearest-entry quantization by brute force.

The maps follow T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561), and block-wise
scaling follows T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2.
Everything is float64: a result of the library is compared with the real number, not with another rounding of it.
"""

import torch
from torch import Tensor

MAX_ABSMAX = torch.finfo(torch.float32).max  # an infinite block is scaled by this


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


def blocks(x: Tensor, blocksize: int) -> list[Tensor]:
    """Flat blocks in logical order; the last one may be short."""
    return list(x.double().flatten().split(blocksize)) if x.numel() else []


def block_absmax(block: Tensor) -> float:
    """The largest magnitude. NaN does not count, infinity counts as the largest float."""
    magnitudes = [abs(x) for x in block.tolist() if x == x]
    return min(max(magnitudes, default=0.0), MAX_ABSMAX)


def normalise(block: Tensor) -> Tensor:
    """The block over its absmax, within [-1, 1]. NaN, and every element of an all-zero block, counts as zero."""
    absmax = block_absmax(block)
    return (block / absmax).nan_to_num(nan=0.0).clamp(-1, 1) if absmax > 0 else torch.zeros_like(block)


def normalised(x: Tensor, blocksize: int) -> Tensor:
    """Each element over the absmax of its block (fp64, shape of `x`): what the encoder looks up."""
    parts = [normalise(block) for block in blocks(x, blocksize)]
    return torch.cat(parts).view(x.shape) if parts else x.double()


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
    absmax = torch.tensor([block_absmax(block) for block in blocks(x, blocksize)], dtype=torch.float32)
    return nearest(normalised(x, blocksize), code), absmax


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """One fp32 product per element, rounded once more to `dtype`."""
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()].view(codes.shape)
    return (code[codes.long()] * scale).to(dtype)


def assert_nearest(x: Tensor, codes: Tensor, code: Tensor, *, slack: float | Tensor) -> None:
    """Each entry chosen is nearest to `x`, or `x` lies within `slack` (absolute) of the midpoint that decides.

    Past a midpoint by d, the other neighbour is 2 d farther away than the nearest one; equal entries are equally good.
    """
    x, code = x.double().flatten(), code.double()
    nearest = code[nearest_by_midpoints(x, code).long()]
    excess = (x - code[codes.flatten().long()]).abs() - (x - nearest).abs()
    worst = (excess - 2 * torch.as_tensor(slack).flatten()).amax() if x.numel() else torch.tensor(0.0)
    assert worst <= 0, f"a code misses the nearest entry by {worst:.3g} more than the slack allows"
