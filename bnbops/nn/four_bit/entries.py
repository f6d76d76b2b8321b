"""A 4-bit weight in a state dict, by bitsandbytes' names: `key` has the codes, `key.absmax` and so on what describes
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import FORMATS_4BIT
from bnbops.functional.quant_state import PACKED, QuantState
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.weights.numbers import is_finite

_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATISTICS = (*_TENSORS, *(PACKED + quant_type for quant_type in FORMATS_4BIT))


def keys_of(key: str, state: QuantState) -> list[str]:
    """What `entries` has beside the codes."""
    tensors = _TENSORS if state.nested else _TENSORS[:2]
    return [f"{key}.{name}" for name in (*tensors, f"{PACKED}{state.quant_type}")]


def entries(key: str, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """`key` with the packed weight as [n, 1], and `key.absmax` and so on."""
    described = {f"{key}.{name}": tensor.detach() for name, tensor in state.as_dict(packed=True).items()}
    return {key: packed.detach().view(-1, 1)} | described


def take_statistics(state_dict: dict[str, Any], key: str) -> dict[str, Tensor]:
    """Removes from the dict, and returns by name, what belongs to the packed weight `key`."""
    found = [name for name in STATISTICS if f"{key}.{name}" in state_dict]
    return {name: state_dict.pop(f"{key}.{name}") for name in found}


def weight_of(
    data: Any, statistics: Mapping[str, Tensor], shape: tuple[int, ...], device: torch.device | None = None
) -> Params4bit | None:
    """The quantized weight that entries describe, on a device or its own; None for floats, yet to be quantized;
    ValueError for what cannot become a weight of this shape."""
    if not isinstance(data, Tensor):
        raise ValueError(f"expected a tensor, got {type(data).__name__}")
    if statistics:
        weight = Params4bit.from_prequantized(data, dict(statistics), device=device)
        if (found := tuple(weight.quant_state.shape)) != shape:
            raise ValueError(
                f"the quantized weight has shape {list(found)}, expected {list(shape)}: make a new layer for it, or "
                "resize before quantization"
            )
        return weight
    if not data.is_floating_point() or tuple(data.shape) != shape:
        codes = "; int8 codes are for a Linear8bitLt or an Embedding8bit" if data.dtype == torch.int8 else ""
        raise ValueError(
            f"expected floats of shape {list(shape)}, or packed codes with their quantization state, got {data.dtype} "
            f"of shape {list(data.shape)}{codes}"
        )
    if not is_finite(data):
        raise ValueError("NaN and infinite values cannot be quantized")
    return None
