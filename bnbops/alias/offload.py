"""What Accelerate's offloading lacks: it looks for all that a layer registers in the model's state dict, but that has
bitsandbytes' entries for the scales of a quantized layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any

from bnbops.nn.kinds import registered

_own: dict[type, Callable[[Any, str], Any]] = {}


def add(module: ModuleType) -> None:
    """To `accelerate.utils.offload`."""
    mapping = module.PrefixedDataset  # of one layer's tensors
    if mapping in _own:
        return
    read = _own[mapping] = mapping.__getitem__

    @wraps(read)
    def __getitem__(self: Any, key: str) -> Any:
        try:
            return read(self, key)
        except KeyError:
            scales = registered(key, partial(read, self))
            if scales is None:
                raise
            return scales

    mapping.__getitem__ = __getitem__


def remove(module: ModuleType) -> None:
    mapping = module.PrefixedDataset
    if mapping in _own:
        mapping.__getitem__ = _own.pop(mapping)
