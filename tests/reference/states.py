"""8-bit optimizer states: blocks of 256 elements that share a scale, along rows or along the flat tensor.

T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2.1. A scale tensor of
two dimensions means blocks that end with their row, one of one dimension flat blocks.
"""

import math

import torch
from torch import Tensor

from bnbops.facts import STATE_BLOCK
from bnbops.functional import create_dynamic_map
from bnbops.testing.expect import expect_encoded as assert_encoded
from bnbops.testing.expect import expect_within as assert_within
from bnbops.testing.references.blockwise import block_absmax, decode, of_each_element
from bnbops.testing.references.blockwise import normalised as state_normalised
from reference.quantize import nearest_by_midpoints

__all__ = ["assert_encoded", "assert_within", "decode", "of_each_element", "state_normalised"]


def dynamic_values(signed: bool) -> Tensor:
    """What the codes of "dynamic8" mean: bitsandbytes' map, each decade made a straight line.

    Magnitudes are counted so that a decade has the numbers n ... 2n - 1, the unsigned map's zero being 1. A decade's
    line is fp32, from its first value by the mean distance; a value is rounded once.
    """
    bitsandbytes = create_dynamic_map(signed)
    magnitudes = bitsandbytes[bitsandbytes >= 0]
    values = [magnitudes[:1]]
    number, size = (1, 1) if signed else (2, 2)
    while len(magnitudes) - len(torch.cat(values)) > 1:
        decade = magnitudes[number - (not signed) :][:size].double()
        apart = ((decade[-1] - decade[0]) / max(size - 1, 1)).float().double()
        base = (decade[0] - apart * number).float().double()
        values.append((apart * torch.arange(number, number + size) + base).float())
        number, size = number + size, 2 * size
    positive = torch.cat([*values, torch.ones(1)])
    return torch.cat([-positive[1:-1].flip(0), positive]) if signed else positive


CODEBOOKS = {signed: dynamic_values(signed) for signed in (True, False)}


def row_absmax(shape: torch.Size) -> Tensor:
    """A zero absmax in the row layout: [R, ceil(inner / 256)]."""
    return torch.zeros(shape[0], -(-math.prod(shape[1:]) // STATE_BLOCK))


def flat_absmax(shape: torch.Size) -> Tensor:
    """A zero absmax in the flat layout: [ceil(numel / 256)]."""
    return torch.zeros(-(-math.prod(shape) // STATE_BLOCK))


def state_absmax(x: Tensor, like: Tensor) -> Tensor:
    """The absmax of `x` (fp32) in the layout of `like`."""
    return block_absmax(x, like).float()


def encode(x: Tensor, like: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x`, and their absmax in the layout of `like`."""
    return nearest_by_midpoints(state_normalised(x, like), code), state_absmax(x, like)
