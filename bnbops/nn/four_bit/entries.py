"""A 4-bit weight in a state dict, by bitsandbytes' names: `key` has the codes, `key.absmax` and so on what describes
them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnbops.functional.quant_state import PACKED, QuantState
from bnbops.nn.four_bit.format import NAMES, tensors_of
from bnbops.nn.weights.finite import is_finite

STATISTICS = (
    *("absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *(f"{PACKED}{quant_type}" for quant_type in QuantState.valid_quant_types),
)


def keys(key: str) -> list[str]:
    """All that a state dict may have beside the codes."""
    return [f"{key}.{name}" for name in STATISTICS]


def keys_of(key: str, state: QuantState) -> list[str]:
    """What `entries` has beside the codes."""
    nested = ("nested_absmax", "nested_quant_map") if state.nested else ()
    return [f"{key}.{name}" for name in ("absmax", "quant_map", *nested, f"{PACKED}{state.quant_type}")]


def entries(key: str, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
    """`key` with the packed weight as [n, 1], and `key.absmax` and so on."""
    described = {f"{key}.{name}": tensor.detach() for name, tensor in state.as_dict(packed=True).items()}
    return {key: packed.detach().view(-1, 1)} | described


def take_statistics(state_dict: dict[str, Any], key: str) -> dict[str, Tensor]:
    """Removes from the dict, and returns by name, what belongs to the packed weight `key`."""
    found = [name for name in STATISTICS if f"{key}.{name}" in state_dict]
    return {name: state_dict.pop(f"{key}.{name}") for name in found}


def registered(key: str, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
    """A tensor that the module of the packed weight `key` registers by the name `weight_<name>`; None for other names.
    `read` gives an entry by its key.

    Raises:
        KeyError: there is nothing.
    """
    if name not in NAMES:
        return None
    found = {}
    for each in STATISTICS:
        with contextlib.suppress(KeyError):
            found[each] = read(f"{key}.{each}")
    if not found:
        raise KeyError(key)
    return tensors_of(QuantState.from_dict(found, device="cpu"))[name]


def check_entry(data: Any, statistics: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Refuses what cannot become a weight of this shape: no tensor, or without statistics no floats to quantize.

    Raises:
        ValueError: it says why.
    """
    if not isinstance(data, Tensor):
        raise ValueError(f"expected a tensor, got {type(data).__name__}")
    if statistics:
        return
    if not data.is_floating_point() or tuple(data.shape) != shape:
        codes = "; int8 codes are for a Linear8bitLt or an Embedding8bit" if data.dtype == torch.int8 else ""
        raise ValueError(
            f"expected floats of shape {list(shape)}, or packed codes with their quantization state, got {data.dtype} "
            f"of shape {list(data.shape)}{codes}"
        )
    if not is_finite(data):
        raise ValueError("NaN and infinite values cannot be quantized")
