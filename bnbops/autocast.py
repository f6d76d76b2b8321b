"""What autocast does to the arguments of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(device: str) -> bool:
    """Whether a kind of device is under autocast; some, such as "meta", know of none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def to_autocast_dtype(x: Tensor, device: str) -> Tensor:
    """As torch.nn.functional.linear takes it under a device's autocast."""
    castable = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if castable else x
