"""Layout of an optimizer's state tensors: which precision a parameter gets, and the shapes that follow."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bnbops.lasting import lasting
from bnbops.sharded import is_sharded, local

BLOCKSIZE = 256
NORMS_KEPT = 100  # of gradients, for percentile clipping
UNPAGED = ("step", "gnorm_vec")  # too small to be worth it

logger = logging.getLogger(__name__)

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # of zeros


def absmax_name(state: str) -> str:
    """Name of the scales that belong to an 8-bit state."""
    return f"{state}_absmax"


def absmax_shape(shape: torch.Size) -> tuple[int, int]:
    """Shape of the scales of a parameter: one for every 256 elements of a row, rows being dimension 0."""
    return shape[0], -(math.prod(shape[1:]) // -BLOCKSIZE)


def flat_absmax_shape(shape: torch.Size) -> tuple[int]:
    """Shape of the scales in bitsandbytes' layout: one for every 256 elements of the whole."""
    return (-(math.prod(shape) // -BLOCKSIZE),)


def wants_8bit(param: Tensor, optim_bits: int, min_8bit_size: int) -> bool:
    """Whether a parameter's state is quantized: decided on what all ranks know of it, never on one's shard."""
    if optim_bits != 8 or param.dim() < 2 or param.numel() < min_8bit_size:
        return False
    if shards_whole_blocks(param):
        return True
    if not any(param.device_mesh.get_coordinate() or ()):  # one rank speaks for all
        _log_32bit(tuple(param.shape), param.placements, tuple(param.device_mesh.shape))
    return False


@cache
def _log_32bit(shape: tuple[int, ...], placements: tuple[Any, ...], mesh: tuple[int, ...]) -> None:
    logger.warning(
        "a parameter of shape %s gets 32-bit states: its placements %s on a mesh of shape %s cut rows within blocks of "
        "%d elements. Shards of dimension 0 never do; those of dimension 1 do not if they have whole blocks.",
        *(list(shape), placements, mesh, BLOCKSIZE),
    )


def shards_whole_blocks(param: Tensor) -> bool:
    """Whether the blocks of each rank's part of a parameter are blocks of the whole, and their scales on that rank.

    They are for shards of rows (dimension 0). A single shard of dimension 1 has to cut rows where it cuts the scales.
    """
    if not is_sharded(param):
        return True
    sizes = param.device_mesh.shape
    cuts = [
        (ranks, placement)
        for ranks, placement in zip(sizes, param.placements, strict=True)
        if ranks > 1 and not placement.is_replicate() and placement.dim != 0
    ]
    if not cuts:
        return True
    ranks, placement = cuts[0]
    if len(cuts) > 1 or placement.dim != 1 or getattr(placement, "split_factor", 1) != 1:
        return False
    columns, scales = param.shape[1], absmax_shape(param.shape)[1]
    return -(columns // -ranks) * math.prod(param.shape[2:]) == -(scales // -ranks) * BLOCKSIZE


def _zeros(
    param: Tensor, shape_of: Callable[[torch.Size], tuple[int, ...]], dtype: torch.dtype, allocate: Allocate | None
) -> Tensor:
    """Zeros of the shape that a parameter's shape gives, sharded as the parameter is."""
    part = local(param)
    shape = shape_of(part.shape)
    zeros = allocate(shape, dtype) if allocate else torch.zeros(shape, dtype=dtype, device=part.device)
    return _like(param, zeros, torch.Size(shape_of(param.shape))) if is_sharded(param) else zeros


def _like(tensor: Tensor, part: Tensor, shape: torch.Size) -> Tensor:
    """This rank's part of a DTensor that is sharded as another one, contiguous.

    As fully_shard makes them: DTensor.from_local() would move an offloaded part to the mesh's device.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(shape, torch.empty(shape, dtype=part.dtype, device="meta").stride(), part.dtype)
    return DTensor(part, DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta), requires_grad=False)


def in_memory(tensor: Tensor, allocate: Allocate) -> Tensor:
    """A copy of a tensor in memory that `allocate` gives; of a DTensor, with this rank's part there."""
    if not is_sharded(tensor):
        return allocate(tensor.shape, tensor.dtype).copy_(tensor)
    return _like(tensor, in_memory(tensor.to_local(), allocate), tensor.shape)


def layout_of(state: Mapping[str, Tensor], names: Iterable[str]) -> tuple[bool, bool] | None:
    """Whether existing states are quantized, and whether in flat blocks; None if there are none."""
    for name in names:
        if name in state:
            absmax = state.get(absmax_name(name))
            return absmax is not None, absmax is not None and absmax.dim() == 1
    return None


@lasting()
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
        new[name] = _zeros(param, tuple, torch.uint8 if quantized else torch.float32, allocate)
        if quantized:
            new[absmax_name(name)] = _zeros(param, flat_absmax_shape if flat else absmax_shape, torch.float32, allocate)
        if value:
            local(new[name]).fill_(255 if quantized else value)  # 255 is the code of 1
            if quantized:
                local(new[absmax_name(name)]).fill_(value)
    if config["percentile_clipping"] != 100 and "gnorm_vec" not in state:
        # Infinite where there was no gradient yet: those clip nothing.
        new["gnorm_vec"] = torch.full((NORMS_KEPT,), math.inf, dtype=torch.float32, device=device)
    return new


@lasting()
def copied(
    param: Tensor, state: Mapping[str, Tensor], allocate: Allocate | None, move: bool = True
) -> dict[str, Tensor]:
    """A state's copy where `missing_tensors` would have put it. Without `move` only what is paged leaves its device."""
    device = local(param).device

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device if move else tensor.device)

    return {
        key: in_memory(tensor, allocate) if allocate and key not in UNPAGED else copy(tensor)
        for key, tensor in state.items()
    }


def placed(param: Tensor, key: str, tensor: Tensor) -> Tensor:
    """A loaded state tensor where its parameter is: sharded alike, or whole.

    Of a whole tensor, which every rank has, each takes its part; of one that is sharded otherwise, the ranks exchange
    parts.

    Raises:
        ValueError: it is on another mesh, or a part of something whole.
    """
    if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"'{key}' is a partial sum on each rank, which no state is; load what state_dict() returned")
    if not is_sharded(param) or key in UNPAGED:
        if is_sharded(tensor) and not all(placement.is_replicate() for placement in tensor.placements):
            raise ValueError(
                f"'{key}' is sharded ({tensor.placements}), but not its parameter of shape {list(param.shape)}: load "
                "its full_tensor() (StateDictOptions(full_state_dict=True) makes a state dict of whole tensors)"
            )
        return local(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    if not is_sharded(tensor):
        part = tensor.to(local(param).device)
        tensor = DTensor.from_local(part, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.device_mesh != mesh:
        raise ValueError(
            f"'{key}' is sharded over {tensor.device_mesh}, its parameter of shape {list(param.shape)} over {mesh}: "
            "save and load it with torch.distributed.checkpoint, or load its full_tensor()"
        )
    return tensor.redistribute(placements=param.placements)


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
    if quantized and not shards_whole_blocks(param):
        return f"8-bit states cannot be sharded as the parameter is, {param.placements}: it would have 32-bit states"
    scales = [absmax_shape(param.shape)] if quantized else []
    if not is_sharded(param):
        scales.append(flat_absmax_shape(param.shape))
    for key, tensor in state.items():
        if key == "step":
            shapes, dtype = [(), (1,)], torch.float32
        elif key == "gnorm_vec":
            shapes, dtype = [(NORMS_KEPT,)], torch.float32
        elif key in present:
            shapes, dtype = [tuple(param.shape)], torch.uint8 if quantized else torch.float32
        else:
            shapes, dtype = scales, torch.float32
        if tuple(tensor.shape) not in shapes or tensor.dtype != dtype:
            found, wanted = f"{tensor.dtype} of shape {list(tensor.shape)}", f"{dtype} of shape {list(shapes[0])}"
            return f"'{key}' is {found}, expected {wanted}"
    return None
