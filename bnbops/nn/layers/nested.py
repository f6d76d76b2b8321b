"""Nested tensors, such as nn.TransformerEncoder makes of a padded batch, for layers that know plain tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def over_nested(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a layer that takes every position by itself makes of a nested tensor: one in the same layout."""
    if x.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(forward(x.values()), x.offsets(), x.lengths())
    return torch.nested.as_nested_tensor([forward(part) for part in x.unbind()])
