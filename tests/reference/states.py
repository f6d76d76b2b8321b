"""8-bit optimizer states: blocks of 256 elements that share a scale, along rows or along the flat tensor.

T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2.1. A scale tensor of
two dimensions means blocks that end with their row, one of one dimension flat blocks.
"""

import math

import torch
from torch import Tensor

from bnbops.facts import STATE_BLOCK
from bnbops.testing.expect import expect_encoded as assert_encoded
from bnbops.testing.expect import expect_within as assert_within
from bnbops.testing.references.blockwise import block_absmax, decode, of_each_element
from bnbops.testing.references.blockwise import normalised as state_normalised
from reference.quantize import nearest_by_midpoints

__all__ = ["assert_encoded", "assert_within", "decode", "of_each_element", "state_normalised"]


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
