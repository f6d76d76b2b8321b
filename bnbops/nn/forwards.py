"""Values that a module computes once while it is in `forward`, however often it reads them: for each thread its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class _Value(NamedTuple):
    value: Tensor
    sources: Sequence[Tensor]  # which are kept, so that others have other ids
    versions: list[tuple[int, int]]


@dataclass
class _Reader:
    calls: int = 0  # of the forward that are under way
    values: dict[bool, _Value] = field(default_factory=dict)  # one made in inference mode is of no use to autograd


class _ThreadsForwards(threading.local):
    """Of one thread: threads share modules, and each has its own mode, and its own forwards under way."""

    def __init__(self) -> None:
        self.readers: WeakKeyDictionary[nn.Module, _Reader] = WeakKeyDictionary()


_forwards = _ThreadsForwards()


def begin(owner: nn.Module) -> None:
    """A forward begins in which the value of `owner` is to be computed once."""
    _forwards.readers.setdefault(owner, _Reader()).calls += 1


def end(owner: nn.Module) -> None:
    """It ends, or has failed, possibly before it began."""
    if (reader := _forwards.readers.get(owner)) is None:
        return
    reader.calls -= 1
    if reader.calls == 0:
        del _forwards.readers[owner]


def once(owner: nn.Module, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
    """The value of `owner`, which is computed from `sources`."""
    reader = _forwards.readers.get(owner)
    if reader is None:
        return compute()
    mode = torch.is_inference_mode_enabled()
    found = reader.values.get(mode)
    # Other sources may be loaded meanwhile; what is written while the value is computed makes it old.
    versions = [(id(source), 0 if source.is_inference() else source._version) for source in sources]
    if found is None or found.versions != versions:
        found = reader.values[mode] = _Value(compute(), sources, versions)
    return found.value
