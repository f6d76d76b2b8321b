"""Calls of operators whose kernels for autograd are in Python, which takes as long as a small product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from bnbops.tracing import is_compiling


def call(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """`op(*args, **kwargs)`. Past its kernel for autograd, as in inference mode, where that has nothing to do: nothing
    is differentiated, neither backward nor forward, and no compiler is to see the guard."""
    if is_compiling() or _is_transformed() or (torch.is_grad_enabled() and _requires_grad(*args, *kwargs.values())):
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def _is_transformed() -> bool:
    """Whether torch.func, or forward-mode differentiation, is at work: the operators refuse it."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _requires_grad(*values: Any) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)
