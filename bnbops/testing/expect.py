"""What the self-check's references say when an operator did something else."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT_MAX = torch.finfo(torch.float32).max


class Difference(Exception):
    """What an operator did and should not have done."""


def expect(condition: Tensor | bool, what: str) -> None:
    if not condition:
        raise Difference(what)


def expect_close(actual: Tensor, expected: Tensor, what: str, magnitude: Tensor | None = None) -> None:
    """Equal up to a few fp32 roundings of terms of a magnitude (the result's, if not given), and one rounding to
    `actual`'s dtype. The samples' values are around 1."""
    expected = expected.double()
    magnitude = expected.abs() if magnitude is None else magnitude
    allowed = torch.finfo(actual.dtype).eps / 2 * expected.abs() + 1e-5 * magnitude + 1e-6
    off = torch.where(actual == expected, 0.0, (actual.double() - expected).abs())
    wrong = ~(off <= allowed)
    if wrong.any():
        raise Difference(f"{what} off by up to {off[wrong].max().item():.3g}")


def expect_nearest(codes: Tensor, normalised: Tensor, code: Tensor, what: str) -> None:
    """Each code is the nearest entry to its value in [-1, 1]; in a tie within rounding, either neighbour."""
    x, code = normalised.reshape(-1, 1).double(), code.double()
    chosen = (x - code[codes.flatten().long()].unsqueeze(1)).abs().squeeze(1)
    nearest = torch.cdist(x, code.unsqueeze(1)).amin(dim=1)
    expect((chosen <= nearest + 1e-5 * x.abs().squeeze(1)).all(), f"{what} not the nearest codebook entry")


def blocked(x: Tensor, size: int) -> Tensor:
    """Cuts the last dimension into blocks: [..., n] -> [..., ceil(n / size), size], padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return padded.view(*x.shape[:-1], padded.shape[-1] // size, size)


def absmax_of(blocks: Tensor) -> Tensor:
    return blocks.abs().nan_to_num(nan=0.0, posinf=_FLOAT_MAX).amax(dim=-1)


def normalise(blocks: Tensor) -> Tensor:
    return (blocks / absmax_of(blocks).unsqueeze(-1)).nan_to_num(nan=0.0).clamp(-1, 1)
