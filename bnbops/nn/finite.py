"""Whether a weight can be quantized: NaN and infinity cannot."""

from __future__ import annotations

import torch
from torch import Tensor


def is_within(weight: Tensor, limit: float) -> bool:
    """Whether no element is NaN, or larger in magnitude than `limit`; by the extreme values, in which NaN shows."""
    if weight.numel() == 0:
        return True
    smallest, largest = (bound.double() for bound in torch.aminmax(weight))  # fp64 holds the limit exactly
    return bool((smallest >= -limit) & (largest <= limit))


def is_finite(weight: Tensor) -> bool:
    """As `weight.isfinite().all()`, in a tenth of the time."""
    return is_within(weight, torch.finfo(weight.dtype).max)
