"""How states are coded: the keys, types and values of codes and scales. Whoever reads or writes one asks here.

A state is a tensor of its parameter's shape: float32, or codes. Codes have scales, which the parameter's state dict
holds under a key that names the codec, so that it tells by itself how each of its states is coded.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbops.dtensors import local
from bnbops.facts import CODECS, DEFAULT_CODEC, STATE_BLOCK, STATES, UNCODED

BITSANDBYTES = "dynamic8"  # the codec of bitsandbytes, which names no codec in the key of its scales

# ---- keys ------------------------------------------------------------------------------------------------------------


def absmax_name(state: str, codec: str = BITSANDBYTES) -> str:
    """Key of the scales of a state that has this codec."""
    return f"{state}_absmax" if codec == BITSANDBYTES else f"{state}_{codec}_absmax"


# By a state's name: the codecs that it may have, each with the key that tells it.
_KEYS = {name: tuple((codec, absmax_name(name, codec)) for codec in CODECS) for name in STATES}


def codec_of(state: Container[str], name: str) -> str:
    """The codec of a parameter's state; UNCODED if it has no scales."""
    for codec, key in _KEYS.get(name, ()):
        if key in state:
            return codec
    return UNCODED


def codecs_of(state: Mapping[str, object]) -> dict[str, str]:
    """The states of a parameter that are codes, and their codecs."""
    found = {name: codec_of(state, name) for name in state}
    return {name: codec for name, codec in found.items() if codec != UNCODED}


def scales_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The scales of the states that are codes, by the states' names."""
    return {name: state[absmax_name(name, codec)] for name, codec in codecs_of(state).items()}


def scale_keys(state: Mapping[str, object]) -> set[str]:
    """The keys of all scales."""
    return {absmax_name(name, codec) for name, codec in codecs_of(state).items()}


def codec_argument(codecs: Iterable[str]) -> dict[str, str]:
    """The keyword argument that tells an operator the codecs of its states; nothing if none of them is coded."""
    codecs = tuple(codecs)
    coded = [codec for codec in codecs if codec != UNCODED]
    if not coded:
        return {}
    return {"codec": coded[0] if all(codec == coded[0] for codec in coded) else ",".join(codecs)}


def chosen_codec(option: str | Mapping[str, str], name: str) -> str:
    """The codec that the option "state_codec" has for a state: one for all, or a mapping, in which others have the
    default."""
    return option if isinstance(option, str) else option.get(name, DEFAULT_CODEC)


# ---- types and shapes ------------------------------------------------------------------------------------------------


def dtype_of(codec: str) -> torch.dtype:
    """Of a state that has this codec."""
    return torch.float32 if codec == UNCODED else CODECS[codec].dtype


def absmax_shape(shape: torch.Size) -> tuple[int, ...]:
    """Shape of the scales of a parameter: one for every 256 elements of a row, rows being dimension 0; a vector is one
    row."""
    return flat_absmax_shape(shape) if len(shape) == 1 else (shape[0], -(math.prod(shape[1:]) // -STATE_BLOCK))


def flat_absmax_shape(shape: torch.Size) -> tuple[int]:
    """Shape of the scales in bitsandbytes' layout: one for every 256 elements of the whole."""
    return (-(math.prod(shape) // -STATE_BLOCK),)


def as_bytes(codes: Tensor) -> Tensor:
    """The same memory, as numbers of codes. (torch lacks many functions for the types of some codes.)"""
    return _viewed(codes, torch.uint8)


def in_bytes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state as state dicts have it: its codes are bytes, which can be gathered and compared anywhere."""
    coded = codecs_of(state)
    return {key: as_bytes(x) if key in coded and x.dtype == dtype_of(coded[key]) else x for key, x in state.items()}


def in_types(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state as operators take it."""
    coded = codecs_of(state)
    return {key: _viewed(x, dtype_of(coded[key])) if key in coded else x for key, x in state.items()}


def _viewed(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes if codes.dtype == dtype else codes.view(dtype)


# ---- values ----------------------------------------------------------------------------------------------------------


def code(name: str, codec: str, value: float) -> int:
    """The number of a state's code for a value that is among them, such as 0 and 1."""
    return CODECS[codec].code(value, STATES[name].role)


def decoded(state: Mapping[str, Tensor], name: str) -> Tensor:
    """The values of a state, fp32 of its shape: of a DTensor, this rank's. A state without codes is its values."""
    codec, tensor = codec_of(state, name), local(state[name])
    if codec == UNCODED:
        return tensor
    codes, scales = _viewed(tensor, dtype_of(codec)), local(state[absmax_name(name, codec)])
    return torch.ops.bnbops.decode_state(codes, scales, codec, STATES[name].role.name)


def encoded(name: str, values: Tensor, codec: str, *, flat: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a state, as a step writes them.

    Args:
        name: the state's.
        values: fp32, of the parameter's shape.
        codec: one that has codes.
        flat: blocks of the whole, not of each row.

    Returns:
        Codes of the values' shape; fp32 scales `[rows, blocks]`, or `[blocks]` if `flat` or of a vector.
    """
    return torch.ops.bnbops.encode_state(values, codec, STATES[name].role.name, flat)


def fill(state: Mapping[str, Tensor], name: str, value: float) -> None:
    """Sets a whole state to a value."""
    codec, tensor = codec_of(state, name), local(state[name])
    if codec == UNCODED:
        tensor.fill_(value)
    else:
        local(state[absmax_name(name, codec)]).fill_(value)
        as_bytes(tensor).fill_(code(name, codec, 1.0) if value else 0)  # times a scale of 0, any code is 0


def fill_some(state: Mapping[str, Tensor], name: str, value: float, mask: Tensor) -> None:
    """Sets the elements of a state under a mask to a value; the others keep theirs."""
    codec, tensor = codec_of(state, name), local(state[name])
    if codec == UNCODED:
        tensor.masked_fill_(mask, value)
    elif value == 0:  # a code whatever the scale
        as_bytes(tensor).masked_fill_(mask, code(name, codec, 0.0))
    else:
        scales = local(state[absmax_name(name, codec)])
        flat = scales.dim() == 1
        codes, new_scales = encoded(name, decoded(state, name).masked_fill_(mask, value), codec, flat=flat)
        _, hit = encoded(name, mask.float(), codec, flat=flat)  # 1 for a block that has such an element: others stay
        ones = torch.full_like(as_bytes(tensor), code(name, codec, 1.0)).view(tensor.dtype)
        in_hit = torch.ops.bnbops.decode_state(ones, hit, codec, STATES[name].role.name) > 0
        as_bytes(tensor).copy_(torch.where(in_hit, as_bytes(codes), as_bytes(tensor)))
        scales.copy_(torch.where(hit > 0, new_scales, scales))


def write(state: Mapping[str, Tensor], name: str, values: Tensor) -> None:
    """Sets a state to values, fp32 of its shape: of a DTensor, this rank's."""
    codec, tensor = codec_of(state, name), local(state[name])
    if codec == UNCODED:
        tensor.copy_(values.view(tensor.shape))
    else:
        scales = local(state[absmax_name(name, codec)])
        codes, new_scales = encoded(name, values, codec, flat=scales.dim() == 1)
        tensor.copy_(codes)
        scales.copy_(new_scales)
