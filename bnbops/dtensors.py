"""Tensors that may be DTensors, without importing DTensor where there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. The import costs a second, so plain tensors do not get that far."""
    if type(tensor) is Tensor or type(tensor) is Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor
