"""Layout of an optimizer's state tensors: which precision a parameter gets, and the shapes that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

BLOCKSIZE = 256
NORMS_KEPT = 100  # of gradients, for percentile clipping
UNPAGED = ("step", "gnorm_vec")  # too small to be worth it

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # of zeros


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


def _zeros(param: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, allocate: Allocate | None) -> Tensor:
    """Zeros of a global shape, sharded as the parameter is."""
    if not is_sharded(param):
        return allocate(shape, dtype) if allocate else torch.zeros(shape, dtype=dtype, device=param.device)
    from torch.distributed import tensor as dtensor

    zeros = dtensor.zeros(*shape, dtype=dtype, device_mesh=param.device_mesh, placements=param.placements)
    return in_memory(zeros, allocate) if allocate else zeros


def in_memory(tensor: Tensor, allocate: Allocate) -> Tensor:
    """A copy of a tensor in memory that `allocate` gives; of a DTensor, with this rank's part there."""
    if not is_sharded(tensor):
        return allocate(tensor.shape, tensor.dtype).copy_(tensor)
    from torch.distributed.tensor import DTensor

    part = in_memory(tensor.to_local(), allocate)
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def layout_of(state: Mapping[str, Tensor], names: Iterable[str]) -> tuple[bool, bool] | None:
    """Whether existing states are quantized, and whether in flat blocks; None if there are none."""
    for name in names:
        if name in state:
            absmax = state.get(absmax_name(name))
            return absmax is not None, absmax is not None and absmax.dim() == 1
    return None


def missing_tensors(
    param: Tensor,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    config: Mapping[str, Any],
    *,
    known: Iterable[str],
    initial: Mapping[str, float],
    allocate: Allocate | None,
) -> dict[str, Tensor]:
    """What a parameter's state lacks: all of it before the first step, later a buffer that an option asks for.

    "step" is a 0-dim fp32 count. States have the parameter's shape, uint8 with fp32 scales of `absmax_shape`, or fp32.
    "gnorm_vec" has the squared norms of the last gradients, fp32 [100].

    Args:
        param: the parameter.
        state: what there is; new states have its precision and layout of blocks.
        names: the states to have.
        config: the parameter's options.
        known: states that tell the precision, if they are there.
        initial: values of states that do not begin with 0.
        allocate: makes the zeros; ordinary memory if None.
    """
    device, new = local(param).device, {}
    if "step" not in state:
        new["step"] = torch.zeros((), dtype=torch.float32, device=device)
    by_options = wants_8bit(param, config["optim_bits"], config["min_8bit_size"]), False
    quantized, flat = layout_of(state, known) or by_options
    for name in names:
        if name in state:
            continue
        value = initial.get(name, 0.0)
        new[name] = _zeros(param, param.shape, torch.uint8 if quantized else torch.float32, allocate)
        if quantized:
            shape = (-(param.numel() // -BLOCKSIZE),) if flat else absmax_shape(param.shape)
            new[absmax_name(name)] = _zeros(param, shape, torch.float32, allocate)
        if value:
            local(new[name]).fill_(255 if quantized else value)  # 255 is the code of 1
            if quantized:
                local(new[absmax_name(name)]).fill_(value)
    if config["percentile_clipping"] != 100 and "gnorm_vec" not in state:
        # Infinite where there was no gradient yet: those clip nothing.
        new["gnorm_vec"] = torch.full((NORMS_KEPT,), math.inf, dtype=torch.float32, device=device)
    return new


def copied(param: Tensor, state: Mapping[str, Tensor], allocate: Allocate | None) -> dict[str, Tensor]:
    """A state's copy where `missing_tensors` would have put it."""
    device = local(param).device
    return {
        key: in_memory(tensor, allocate) if allocate and key not in UNPAGED else tensor.detach().clone().to(device)
        for key, tensor in state.items()
    }


def check_state(
    param: Tensor, state: Mapping[str, object], names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> str | None:
    """What is wrong with a state loaded for a parameter, or None. States in `optional` may be missing."""
    present = [name for name in dict.fromkeys((*names, *optional)) if name not in optional or name in state]
    quantized = any(absmax_name(name) in state for name in present)
    expected = {"step", *present, *(absmax_name(name) for name in present if quantized)}
    if state.keys() - {"gnorm_vec"} != expected:
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
        elif key == "gnorm_vec":
            shapes, dtype = [(NORMS_KEPT,)], torch.float32
        elif key in present:
            shapes, dtype = [tuple(param.shape)], torch.uint8 if quantized else torch.float32
        else:
            shapes, dtype = [rows, flat], torch.float32
        if tuple(tensor.shape) not in shapes or tensor.dtype != dtype:
            found, wanted = f"{tensor.dtype} of shape {list(tensor.shape)}", f"{dtype} of shape {list(shapes[0])}"
            return f"'{key}' is {found}, expected {wanted}"
    return None
