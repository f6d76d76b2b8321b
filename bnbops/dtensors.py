"""Tensors that may be DTensors, without importing DTensor where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. The import costs a second, so plain tensors do not get that far."""
    if type(tensor) is Tensor or type(tensor) is Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def distributed(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A rank's part as a DTensor of a global shape, contiguous."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size(shape)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=strides)


def redistributed(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor with other placements; a plain tensor is whole on every rank."""
    if not is_dtensor(tensor):
        from torch.distributed.tensor import DTensor

        tensor = DTensor.from_local(tensor, mesh, run_check=False)  # replicated
    return tensor.redistribute(placements=placements)
