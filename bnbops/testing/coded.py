"""What codes of optimizer states mean, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbops.facts import STATE_BLOCK, Codec, Role
from bnbops.testing.expect import absmax_of, blocked, expect, expect_close, expect_nearest, normalise


def decoded(codes: Tensor, absmax: Tensor, codec: Codec, role: Role) -> Tensor:
    """The values of codes, float32: blocks of each row, or of the whole where absmax has one dimension."""
    rows = _rows(codes.view(torch.uint8), absmax)
    scale = absmax.reshape(rows.shape[0], absmax.shape[-1]).repeat_interleave(STATE_BLOCK, dim=1)[:, : rows.shape[1]]
    return (_values(codec, role, codes)[rows.long()] * scale).view(codes.shape)


def expect_coded(codes: Tensor, absmax: Tensor, x: Tensor, codec: Codec, role: Role, what: str) -> None:
    """That codes and scales are those of the values x: each code the nearest, what is positive stays so."""
    expect(codes.dtype == codec.dtype and codes.shape == x.shape, f"{what} of the wrong shape or dtype")
    blocks = blocked(_rows(x, absmax), STATE_BLOCK)
    expect_close(absmax.reshape(blocks.shape[:2]), absmax_of(blocks), f"absmax of {what}")
    normalised = normalise(blocks).flatten(1)[:, : _rows(x, absmax).shape[1]]
    values = _values(codec, role, x)
    if role.divisor:
        normalised = torch.where(normalised > 0, normalised.clamp_min(values[values > 0].min()), normalised)
    expect_nearest(codes.view(torch.uint8), normalised, values.nan_to_num(nan=2.0), what)  # which is far from all


def _values(codec: Codec, role: Role, like: Tensor) -> Tensor:
    return torch.tensor(codec.values(role), dtype=torch.float32, device=like.device)


def _rows(x: Tensor, absmax: Tensor) -> Tensor:
    """The rows that blocks do not cross: of the tensor, or the whole as one where absmax has one dimension."""
    rows = 1 if absmax.dim() == 1 else x.shape[0]
    return x.reshape(rows, x.numel() // max(rows, 1))
