"""What becomes of the states of a state dict: they are checked, placed where their parameters are, and copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbops.dtensors import is_dtensor, local, redistributed
from bnbops.facts import CODECS, UNCODED, in_words
from bnbops.lasting import lasting
from bnbops.optim.core.codec import (
    absmax_name,
    absmax_shape,
    codecs_of,
    decoded,
    dtype_of,
    encoded,
    flat_absmax_shape,
    in_bytes,
    in_types,
    scale_keys,
    scales_of,
)
from bnbops.optim.core.state import (
    PER_PARAMETER,
    in_memory,
    like,
    log_32bit,
    names_of,
    shards_whole_blocks,
    wanted_codecs,
)
from bnbops.optim.paging.memory import Allocate

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

_SAMPLE, _FEW = 4096, 8  # elements that are looked at, and different values that states may have by chance


def problem_with(
    optimizer: StatefulOptimizer, param: Tensor, state: Mapping[str, object], any_float: bool = False
) -> str | None:
    """What is wrong with the names, shapes or dtypes of a state loaded for a parameter, or None.

    With `any_float` a 32-bit state may have another floating-point dtype, as `in_precision` will cast it.
    """
    always = set.intersection(*(set(rule.state_names) for rule in optimizer._rules))
    present = [name for name in optimizer._state_names() if name in always or name in state]
    coded = codecs_of(state)
    expected = {"step", *present, *(absmax_name(name, codec) for name, codec in coded.items() if name in present)}
    if state.keys() - {"gnorm_vec"} != expected:
        missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
        return f"its keys do not fit: missing {missing}, unexpected {extra}"
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if bad := [key for key in state if key not in tensors]:
        return f"{bad} are not tensors"
    for name in present:
        dtype = tensors[name].dtype
        keys = tuple(absmax_name(name, codec) for codec in CODECS if dtype in (torch.uint8, dtype_of(codec)))
        if name not in coded and keys:
            return f"'{name}' is {dtype}, which are codes, but {in_words(keys)} is missing, their scales"
    if coded and param.dim() == 0:
        return "a parameter without dimensions has no 8-bit state"
    scales = [absmax_shape(param.shape), flat_absmax_shape(param.shape)] if coded else []
    for key, tensor in tensors.items():
        if key in PER_PARAMETER:
            shapes, dtype = [PER_PARAMETER[key], (1,)] if key == "step" else [PER_PARAMETER[key]], torch.float32
        elif key in present:
            shapes, dtype = [tuple(param.shape)], dtype_of(coded.get(key, UNCODED))
        else:
            shapes, dtype = scales, torch.float32
        castable = any_float and dtype == torch.float32 and tensor.is_floating_point()
        castable |= key in coded and tensor.dtype == torch.uint8  # as `in_bytes` has it
        if tuple(tensor.shape) not in shapes or not (castable or tensor.dtype == dtype):
            found, wanted = f"{tensor.dtype} of shape {list(tensor.shape)}", f"{dtype} of shape {list(shapes[0])}"
            return f"'{key}' is {found}, expected {wanted}"
    return None


def check_complete(key: int, param: Tensor, state: Mapping[str, object], names: Iterable[str]) -> None:
    """Raises ValueError if a parameter's state lacks one of these."""
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"the state of parameter {key} (shape {list(param.shape)}) has no {', '.join(missing)} yet: take a step or "
            "call init_state() before"
        )


def placed_state(param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded state where its parameter is: sharded alike, or whole.

    8-bit states that its sharding would cut within blocks become 32-bit states of the values that they stand for.

    Raises:
        ValueError: a partial sum, on another mesh, or a part of something whole.
    """
    state = in_bytes(state)
    if not keeps_blocks(param, state):
        state = _decoded(param, state)
    return in_types({key: placed(param, key, tensor) for key, tensor in state.items()})


def keeps_blocks(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether each rank's part of a parameter has whole blocks of a state, if they are blocks."""
    scales = scales_of(state)
    if not scales or not is_dtensor(param):
        return True
    return shards_whole_blocks(param) and all(tuple(x.shape) == absmax_shape(param.shape) for x in scales.values())


def check_cast(param: Tensor, state: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a sharded parameter's 32-bit state whose values are 8-bit codes, by the looks of it, or None.

    torch.distributed.checkpoint reads into the live states and casts without a word; a sharding that cuts blocks is all
    it takes for these to have another precision than those that were saved.
    """
    if not is_dtensor(param) or shards_whole_blocks(param):
        return None
    for key, tensor in state.items():
        some = local(tensor).flatten()[:_SAMPLE]
        if key in PER_PARAMETER or tensor.dtype != torch.float32 or some.unique().numel() <= _FEW:
            continue
        if bool(((some >= 0) & (some <= 255) & (some == some.round())).all()):
            return (
                f"the values of '{key}' are 8-bit codes, cast by torch.distributed.checkpoint, as the sharding here "
                f"({param.placements}) cuts their blocks. load_checkpoint of bnbops.distributed decodes them"
            )
    return None


def _decoded(param: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in 32 bits, whole on every rank."""
    for key, tensor in state.items():
        _refuse_partial(key, tensor)
    if not shards_whole_blocks(param):
        log_32bit(param)
    whole = {key: x.full_tensor() if is_dtensor(x) else x for key, x in state.items()}
    scales = scale_keys(whole)
    return {key: decoded(whole, key) for key in whole if key not in scales}


def placed(param: Tensor, key: str, tensor: Tensor) -> Tensor:
    """A loaded state tensor where its parameter is: sharded alike, or whole.

    Of a whole tensor, which every rank has, each takes its part; of one that is sharded otherwise, the ranks exchange
    parts.

    Raises:
        ValueError: a partial sum, on another mesh, or a part of something whole.
    """
    _refuse_partial(key, tensor)
    if not is_dtensor(param) or key in PER_PARAMETER:
        if is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements):
            raise ValueError(
                f"'{key}' is sharded ({tensor.placements}), but not its parameter of shape {list(param.shape)}: load "
                "its full_tensor() (StateDictOptions(full_state_dict=True) makes a state dict of whole tensors)"
            )
        return local(tensor)
    if is_dtensor(tensor) and tensor.device_mesh != param.device_mesh:
        raise ValueError(
            f"'{key}' is sharded over {tensor.device_mesh}, its parameter of shape {list(param.shape)} over "
            f"{param.device_mesh}: save and load it with torch.distributed.checkpoint, or load its full_tensor()"
        )
    tensor = tensor if is_dtensor(tensor) else tensor.to(local(param).device)
    return redistributed(tensor, param.device_mesh, param.placements)


def _refuse_partial(key: str, tensor: Tensor) -> None:
    if is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"'{key}' is a partial sum on each rank, which no state is; full_tensor() adds them up")


def in_precision(param: Tensor, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state of floating-point values in the precision that the options give a parameter."""
    result = {name: x.float() for name, x in state.items()}
    for name, codec in wanted_codecs(param, config, names_of(state)).items():
        if codec == UNCODED:
            continue
        codes, absmax = encoded(name, local(result[name]).to(local(param).device), codec, flat=False)
        if is_dtensor(param):
            codes, absmax = like(param, codes, param.shape), like(param, absmax, torch.Size(absmax_shape(param.shape)))
        result |= {name: codes, absmax_name(name, codec): absmax}
    return result


@lasting()
def copied(
    param: Tensor, state: Mapping[str, Tensor], allocate: Allocate | None, move: bool = True
) -> dict[str, Tensor]:
    """A state's copy where `missing_tensors` would have put it. Without `move` only what is paged leaves its device."""
    device = local(param).device

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device if move else tensor.device)

    return {
        key: in_memory(tensor, allocate) if allocate and key not in PER_PARAMETER else copy(tensor)
        for key, tensor in state.items()
    }
