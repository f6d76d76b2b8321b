"""Layout of an optimizer's state tensors: which precision a parameter gets, and the shapes that follow."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

BLOCKSIZE = 256


def absmax_name(state: str) -> str:
    """Name of the scales that belong to an 8-bit state."""
    return f"{state}_absmax"


def absmax_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the scales of a parameter: one for every 256 elements of a row, rows being dimension 0."""
    return shape[0], -(math.prod(shape[1:]) // -BLOCKSIZE)


def wants_8bit(param: Tensor, optim_bits: int, min_8bit_size: int) -> bool:
    """Whether a parameter's state is quantized: decided on its global shape, never on a shard's."""
    return optim_bits == 8 and param.dim() >= 2 and param.numel() >= min_8bit_size


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. The import costs a second, so plain tensors do not get that far."""
    if type(tensor) is Tensor or type(tensor) is Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _zeros(param: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of a global shape, sharded as the parameter is."""
    if is_sharded(param):
        from torch.distributed import tensor as dtensor

        return dtensor.zeros(*shape, dtype=dtype, device_mesh=param.device_mesh, placements=param.placements)
    return torch.zeros(shape, dtype=dtype, device=param.device)


def new_state(param: Tensor, names: tuple[str, ...], quantized: bool) -> dict[str, Tensor]:
    """A parameter's state before its first step: all zeros.

    "step" is a 0-dim fp32 count. Each state has the parameter's shape, uint8 with fp32 scales of `absmax_shape`, or
    fp32 without.
    """
    state = {"step": torch.zeros((), dtype=torch.float32, device=local(param).device)}
    for name in names:
        state[name] = _zeros(param, param.shape, torch.uint8 if quantized else torch.float32)
        if quantized:
            state[absmax_name(name)] = _zeros(param, absmax_shape(param.shape), torch.float32)
    return state


def check_state(param: Tensor, state: dict[str, object], names: tuple[str, ...]) -> str | None:
    """What is wrong with a state loaded for a parameter, or None."""
    quantized = any(absmax_name(name) in state for name in names)
    expected = {"step", *names, *(absmax_name(name) for name in names if quantized)}
    if state.keys() != expected:
        missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
        return f"its keys do not fit: missing {missing}, unexpected {extra}"
    if bad := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        return f"{bad} are not tensors"
    if quantized and param.dim() == 0:
        return "a parameter without dimensions has no 8-bit state"
    rows, flat = absmax_shape(param.shape) if quantized else (), (-(param.numel() // -BLOCKSIZE),)
    for key, tensor in state.items():
        if key == "step":
            shapes, dtype = [(), (1,)], torch.float32
        elif key in names:
            shapes, dtype = [tuple(param.shape)], torch.uint8 if quantized else torch.float32
        else:
            shapes, dtype = [rows, flat], torch.float32
        if tuple(tensor.shape) not in shapes or tensor.dtype != dtype:
            found, wanted = f"{tensor.dtype} of shape {list(tensor.shape)}", f"{dtype} of shape {list(shapes[0])}"
            return f"'{key}' is {found}, expected {wanted}"
    return None
