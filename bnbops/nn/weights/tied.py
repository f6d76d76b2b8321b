"""What modules that share a quantized weight know of each other, and how state dicts name a weight that is shared."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from torch import nn


def hold(weight: nn.Parameter, module: nn.Module) -> None:
    """Remembers, weakly, that the module has this weight."""
    weight.__dict__.setdefault("_holders", weakref.WeakSet()).add(module)


def others(weight: nn.Parameter, module: nn.Module) -> list[Any]:
    """The other modules that have this weight."""
    known = weight.__dict__.get("_holders", ())
    return [other for other in known if other is not module and other._parameters.get("weight") is weight]


def saved_as(weight: nn.Parameter, state_dict: dict[str, Any], key: str) -> str:
    """The key by which the first module with this weight has saved it to this state dict; `key` if none has."""
    held, first = weight.__dict__.get("_saved_as", (None, key))
    if held is not None and held() is state_dict and first in state_dict:
        return first
    with contextlib.suppress(TypeError):  # a plain dict, which torch does not pass, cannot be referenced weakly
        weight.__dict__["_saved_as"] = weakref.ref(state_dict), key
    return key


def entries_before(weight: nn.Parameter, missing_keys: list[str], entries: list[str]) -> list[str]:
    """The names of what describes a weight in a state dict: `entries` if this is the first module with this weight that
    `load_state_dict` comes to in a call, which is known by its list of missing keys, and then the same again.

    They are what a module misses whose tied weight a saver left out as a duplicate: what its state dict had before the
    call, though the other module may have loaded another format into the weight meanwhile.
    """
    call, names = weight.__dict__.get("_entries_before", (None, entries))
    if call is missing_keys:
        return names
    weight.__dict__["_entries_before"] = missing_keys, entries
    return entries
