"""8-bit optimizer states: blocks of 256 elements that share a scale, along rows or along the flat tensor.

T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2.1. A scale tensor of
two dimensions means blocks that end with their row, one of one dimension flat blocks.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from reference.quantize import MAX_ABSMAX, assert_nearest, nearest_by_midpoints

BLOCKSIZE = 256


def row_absmax(shape: torch.Size) -> Tensor:
    """A zero absmax in the row layout: [R, ceil(inner / 256)]."""
    return torch.zeros(shape[0], -(-math.prod(shape[1:]) // BLOCKSIZE))


def flat_absmax(shape: torch.Size) -> Tensor:
    """A zero absmax in the flat layout: [ceil(numel / 256)]."""
    return torch.zeros(-(-math.prod(shape) // BLOCKSIZE))


def blocked(x: Tensor, absmax: Tensor) -> Tensor:
    """The blocks of `x` that share a scale, [absmax.numel(), 256]; short ones are filled with zeros."""
    rows = x.reshape(1 if absmax.ndim == 1 else len(x), -1) if x.numel() else x.reshape(0, BLOCKSIZE)
    return pad(rows, (0, -rows.shape[1] % BLOCKSIZE)).view(-1, BLOCKSIZE)


def of_each_element(absmax: Tensor, x: Tensor) -> Tensor:
    """Each block's number at every element of `x`."""
    if x.numel() == 0:
        return absmax.new_zeros(x.shape)
    rows = 1 if absmax.ndim == 1 else len(x)
    repeated = absmax.view(rows, -1).repeat_interleave(BLOCKSIZE, dim=1)
    return repeated[:, : x.numel() // rows].reshape(x.shape)


def decode(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """The fp32 values of an 8-bit state."""
    return code[codes.long()] * of_each_element(absmax, codes)


def block_absmax(x: Tensor, like: Tensor) -> Tensor:
    """The largest magnitude of each block (float64). NaN does not count, infinity counts as the largest float."""
    magnitudes = x.double().abs().nan_to_num(nan=0.0, posinf=MAX_ABSMAX).clamp(max=MAX_ABSMAX)
    return blocked(magnitudes, like).amax(dim=1).view(like.shape)


def state_absmax(x: Tensor, like: Tensor) -> Tensor:
    """The absmax of `x` (fp32) in the layout of `like`."""
    return block_absmax(x, like).float()


def state_normalised(x: Tensor, like: Tensor) -> Tensor:
    """Each element of `x` over the absmax of its block: what the encoder looks up. Blocks of zeros stay zero."""
    absmax = of_each_element(block_absmax(x, like), x)
    return (x.double() / absmax).nan_to_num(nan=0.0).clamp(-1, 1)


def encode(x: Tensor, like: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x`, and their absmax in the layout of `like`."""
    return nearest_by_midpoints(state_normalised(x, like), code), state_absmax(x, like)


def assert_within(actual: Tensor, expected: Tensor, error: Tensor, what: str) -> None:
    """`actual` is `expected`, known to within `error`."""
    actual = actual.double()
    off = torch.where(actual == expected, 0.0, (actual - expected).abs())
    wrong = ~(off <= error)
    assert not wrong.any(), f"{what}: off by {(off / error)[wrong].max():.3g} times what rounding explains"


def assert_encoded(
    codes: Tensor, absmax: Tensor, x: Tensor, error: Tensor, code: Tensor, what: str, divisor: bool = False
) -> None:
    """`codes` are the nearest to `x` over the absmax of its block, for an `x` known to within `error`.

    A `divisor` that is positive takes a positive entry: the next step divides by it.
    """
    block_error = block_absmax(error, absmax)
    assert_within(absmax, block_absmax(x, absmax), block_error, f"{what}_absmax")
    normalised = state_normalised(x, absmax)
    if divisor:
        smallest = code[code > 0].min().double()
        positive = x > error.clamp_min(2.0**-126)
        either = ((x > 0) | (error > 0)) & (code[codes.long()] == smallest)  # within `error` of 0, or of an underflow
        normalised = torch.where(positive | either, normalised.clamp_min(smallest), normalised)
    scale = of_each_element(absmax.double(), x)
    error = error + normalised.abs() * of_each_element(block_error, x)
    slack = 10 * 2**-23 * normalised.abs() + torch.where(scale > 0, error / scale, 0.0)  # see test_quantize.SLACK
    assert_nearest(normalised, codes, code, slack=slack)
