"""Layout of an optimizer's state tensors: which precision a parameter gets, and the shapes that follow."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bnbops.dtensors import is_dtensor, local
from bnbops.facts import NORM_HISTORY, STATE_BLOCK, UNCODED, Rule
from bnbops.lasting import lasting
from bnbops.optim.core.codec import (
    absmax_name,
    absmax_shape,
    chosen_codec,
    codec_of,
    dtype_of,
    fill,
    flat_absmax_shape,
    scale_keys,
    scales_of,
)
from bnbops.optim.paging.memory import Allocate

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What a state has once, not for each element, and its shape: whole on every rank, never paged.
PER_PARAMETER: Mapping[str, tuple[int, ...]] = {"step": (), "gnorm_vec": (NORM_HISTORY,)}

logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """Options, and what states the parameters have that have them."""

    config: dict[str, Any]  # the options
    rule: Rule  # whose operators take the step
    names: tuple[str, ...]  # of its states
    needed: tuple[str, ...]  # keys that a parameter's state must have

    @classmethod
    def of(cls, config: dict[str, Any], rule: Rule) -> Plan:
        names = rule.state_names
        clips = config["percentile_clipping"] != 100
        needed = ("step", *names, "gnorm_vec") if clips else ("step", *names)
        return cls(config, rule, names, needed)

    def codecs(self, state: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Of a parameter's states, in their order."""
        return tuple(codec_of(state, name) for name in self.names)


def names_of(state: Mapping[str, object]) -> list[str]:
    """What a parameter's state has for each element; the rest is scales, and what it has once."""
    scales = scale_keys(state)
    return [name for name in state if name not in PER_PARAMETER and name not in scales]


def wanted_codecs(param: Tensor, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The codecs that a parameter's options give these states: decided on what all ranks know of it, never on one's
    shard."""
    chosen = {name: chosen_codec(config["state_codec"], name) for name in names}
    least = config["min_8bit_vector_size" if param.dim() == 1 else "min_8bit_size"]
    wants = config["optim_bits"] == 8 and param.dim() > 0 and param.numel() >= least
    if wants and any(codec != UNCODED for codec in chosen.values()):
        if shards_whole_blocks(param):
            return chosen
        log_32bit(param)
    return dict.fromkeys(chosen, UNCODED)


def log_32bit(param: Tensor) -> None:
    """Warns, once, that a sharded parameter has 32-bit states although it was to have 8-bit ones."""
    if is_dtensor(param) and not any(param.device_mesh.get_coordinate() or ()):  # one rank speaks for all
        _log_32bit(tuple(param.shape), param.placements, tuple(param.device_mesh.shape))


@cache
def _log_32bit(shape: tuple[int, ...], placements: tuple[Any, ...], mesh: tuple[int, ...]) -> None:
    logger.warning(
        "a parameter of shape %s gets 32-bit states: its placements %s on a mesh of shape %s cut it within blocks of "
        "%d elements. Shards of rows never do; those of a vector, or of dimension 1, do not if they have whole blocks.",
        *(list(shape), placements, mesh, STATE_BLOCK),
    )


def shards_whole_blocks(param: Tensor) -> bool:
    """Whether the blocks of each rank's part of a parameter are blocks of the whole, and their scales on that rank.

    They are for shards of rows (dimension 0). Those of the dimension along which blocks lie, which is the next one, or
    a vector's only one, have to cut the parameter where they cut the scales: evenly, if they are over several
    dimensions of a mesh.
    """
    if not is_dtensor(param):
        return True
    along = _along(param.shape)
    placements: Iterable[Any] = param.placements  # those that shard have a `dim`
    cuts = [
        (ranks, placement)
        for ranks, placement in zip(param.device_mesh.shape, placements, strict=True)
        if ranks > 1 and not placement.is_replicate() and placement.dim >= along
    ]
    if any(placement.dim != along for _, placement in cuts):
        return False
    pieces = math.prod(ranks for ranks, _ in cuts)
    strides = [getattr(placement, "split_factor", 1) for _, placement in cuts]  # of _StridedShard
    if len(cuts) <= 1 and all(stride == 1 for stride in strides):
        return pieces == 1 or cuts_between_blocks(param.shape, pieces)
    scales, rest = divmod(math.prod(param.shape[along:]), STATE_BLOCK)
    even = rest == 0 and scales % pieces == 0 and param.shape[along] % pieces == 0
    return even and all(pieces % stride == 0 for stride in strides)


def cuts_between_blocks(shape: torch.Size, ranks: int) -> bool:
    """Whether torch cuts the dimension along which blocks lie where it cuts the scales."""
    along = _along(shape)
    scales = absmax_shape(shape)[along]
    return -(shape[along] // -ranks) * math.prod(shape[along + 1 :]) == -(scales // -ranks) * STATE_BLOCK


def _along(shape: torch.Size) -> int:
    """The dimension along which blocks lie."""
    return 0 if len(shape) == 1 else 1


def _zeros(
    param: Tensor, shape_of: Callable[[torch.Size], tuple[int, ...]], dtype: torch.dtype, allocate: Allocate | None
) -> Tensor:
    """Zeros of the shape that a parameter's shape gives, sharded as the parameter is."""
    part = local(param)
    shape = shape_of(part.shape)
    zeros = allocate(shape, dtype) if allocate else torch.zeros(shape, dtype=dtype, device=part.device)
    return like(param, zeros, torch.Size(shape_of(param.shape))) if is_dtensor(param) else zeros


def like(tensor: DTensor, part: Tensor, shape: torch.Size) -> DTensor:
    """This rank's part of a DTensor that is sharded as another one, contiguous.

    As fully_shard makes them: DTensor.from_local() would move an offloaded part to the mesh's device.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(shape, torch.empty(shape, dtype=part.dtype, device="meta").stride(), part.dtype)
    return DTensor(part, DTensorSpec(tensor.device_mesh, tensor.placements, tensor_meta=meta), requires_grad=False)


def in_memory(tensor: Tensor, allocate: Allocate) -> Tensor:
    """A copy of a tensor in memory that `allocate` gives; of a DTensor, with this rank's part there."""
    if not is_dtensor(tensor):
        return allocate(tensor.shape, tensor.dtype).copy_(tensor)
    return like(tensor, in_memory(tensor.to_local(), allocate), tensor.shape)


def _new_codecs(
    param: Tensor, state: Mapping[str, Tensor], names: Iterable[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """The codecs of states to come. Those that are there tell whether the parameter's are coded, if their options have
    a codec for them."""
    if scales_of(state):
        return {name: chosen_codec(config["state_codec"], name) for name in names}
    if any(chosen_codec(config["state_codec"], name) != UNCODED for name in names_of(state)):
        return dict.fromkeys(names, UNCODED)
    return wanted_codecs(param, config, names)


@lasting()
def missing_tensors(
    param: Tensor, state: Mapping[str, Tensor], plan: Plan, *, initial: Mapping[str, float], allocate: Allocate | None
) -> dict[str, Tensor]:
    """What a parameter's state lacks: all of it before the first step, later a buffer that an option asks for.

    "step" is a 0-dim fp32 count. States have the parameter's shape, codes with fp32 scales of `absmax_shape`, or fp32.
    "gnorm_vec" has the squared norms of the last gradients, fp32 [100].

    Args:
        param: the parameter.
        state: what there is; new states are coded if it is, in its layout of blocks.
        plan: the parameter's options, and the states to have.
        initial: values of states that do not begin with 0.
        allocate: makes the zeros; ordinary memory if None.
    """
    device, new = local(param).device, {}
    if "step" not in state:
        new["step"] = torch.zeros((), dtype=torch.float32, device=device)
    names = [name for name in plan.names if name not in state]
    flat = any(scales.dim() == 1 for scales in scales_of(state).values())
    for name, codec in _new_codecs(param, state, names, plan.config).items():
        new[name] = _zeros(param, tuple, dtype_of(codec), allocate)
        if codec != UNCODED:
            shape = flat_absmax_shape if flat else absmax_shape
            new[absmax_name(name, codec)] = _zeros(param, shape, torch.float32, allocate)
        if initial.get(name):
            fill(new, name, initial[name])
    if "gnorm_vec" in plan.needed and "gnorm_vec" not in state:
        # Infinite where there was no gradient yet: those clip nothing.
        new["gnorm_vec"] = torch.full((NORM_HISTORY,), math.inf, dtype=torch.float32, device=device)
    return new
