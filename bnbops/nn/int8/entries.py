"""The entries of an int8 weight in a state dict: "weight", "SCB" and "weight_format"."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bnbops.nn.four_bit.entries import take_statistics
from bnbops.nn.weights.finite import are_scales


def take_entries(state_dict: dict[str, Any], prefix: str) -> tuple[Tensor | None, Tensor | None]:
    """The weight, and its scales, which are removed from the dict.

    Raises:
        ValueError: entries that are no tensors, of another layout or of a 4-bit weight.
    """
    key = prefix + "weight"
    weight, scales = state_dict.get(key), state_dict.pop(prefix + "SCB", None)
    layout = state_dict.pop(prefix + "weight_format", "row")
    layout = layout.tolist() if isinstance(layout, Tensor) else layout
    if layout not in (0, [0], "row"):
        raise ValueError(f"{key}_format is {layout}; only weights by rows (0) can be loaded")
    if take_statistics(state_dict, key):
        raise ValueError(f"{key} is quantized to 4 bits, which a Linear4bit or an Embedding4bit loads")
    for name, value in ((key, weight), (f"{prefix}SCB", scales)):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    return weight, scales


def check_scales(scales: Tensor, rows: int, name: str = "SCB") -> None:
    """Refuses what cannot be the scales of a weight with so many rows.

    Raises:
        ValueError: it says why.
    """
    if scales.numel() != rows:
        raise ValueError(f"{name} has {scales.numel()} scales, but the weight has {rows} rows")
    if not scales.is_floating_point():
        raise ValueError(f"{name} is {scales.dtype}, expected float scales")
    if not are_scales(scales):
        raise ValueError(f"{name} has scales that are negative, infinite or NaN")
