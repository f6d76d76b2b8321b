"""Numbers in blocks that share a scale (T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
arXiv:2110.02861, section 2): element i of a block means value[code[i]] * absmax.

Scales of two dimensions [R, blocks] mean blocks that end with their row, those of one dimension flat blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnbops.facts import STATE_BLOCK

MAX_ABSMAX = torch.finfo(torch.float32).max  # an infinite block is scaled by this


def number(codes: Tensor) -> Tensor:
    """int64; of fp8 that of its byte."""
    return (codes.view(torch.uint8) if codes.is_floating_point() else codes).long()


def of_each_element(absmax: Tensor, x: Tensor, size: int = STATE_BLOCK) -> Tensor:
    """Each block's number at every element of `x`."""
    if x.numel() == 0:
        return absmax.new_zeros(x.shape)
    rows = x.reshape(1 if absmax.dim() == 1 else len(x), -1)
    repeated = absmax.reshape(len(rows), -1).repeat_interleave(min(size, rows.shape[1]), dim=1)
    return repeated[:, : rows.shape[1]].reshape(x.shape)


def decode(codes: Tensor, absmax: Tensor, values: Tensor, size: int = STATE_BLOCK) -> Tensor:
    """What codes mean: one product an element."""
    return values[number(codes)] * of_each_element(absmax, codes, size)


def block_absmax(x: Tensor, like: Tensor, size: int = STATE_BLOCK) -> Tensor:
    """The largest magnitude of each block (float64). NaN does not count, infinity counts as the largest float."""
    if x.numel() == 0:
        return like.new_zeros(like.shape, dtype=torch.float64)
    magnitudes = x.double().abs().nan_to_num(nan=0.0, posinf=MAX_ABSMAX).clamp(max=MAX_ABSMAX)
    rows = magnitudes.reshape(1 if like.dim() == 1 else len(x), -1)
    size = min(size, rows.shape[1])
    return pad(rows, (0, -rows.shape[1] % size)).view(-1, size).amax(dim=1).view(like.shape)


def normalised(x: Tensor, like: Tensor, size: int = STATE_BLOCK) -> Tensor:
    """Each element over the absmax of its block (float64): what an encoder looks up. Blocks of zeros stay zero."""
    absmax = of_each_element(block_absmax(x, like, size), x, size)
    return (x.double() / absmax).nan_to_num(nan=0.0).clamp(-1, 1)
