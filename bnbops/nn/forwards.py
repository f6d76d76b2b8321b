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
    """A value, and the tensors that it was made from with their versions: others may be loaded meanwhile."""

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    value: Tensor

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        same = len(sources) == len(self.sources) and all(map(lambda a, b: a is b, sources, self.sources))
        return same and _versions(sources) == self.versions


def _versions(sources: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(0 if source.is_inference() else source._version for source in sources)


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
    if found is None or not found.is_of(sources):
        versions = _versions(sources)  # before it is computed: what is written meanwhile makes it old
        found = reader.values[mode] = _Value(tuple(sources), versions, compute())
    return found.value
