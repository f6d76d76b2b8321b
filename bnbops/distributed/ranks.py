"""What ranks do together, or share among them; a process without others is the only one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(value: T) -> list[T]:
    """What every rank has, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(function: Callable[[], T]) -> T:
    """Calls a function on every rank, and raises on every rank if it raises on one."""
    result, problem = None, None
    try:
        result = function()
    except Exception as error:
        problem = error
    problems = gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for number, other in enumerate(problems):
        if other is not None:
            raise RuntimeError(f"rank {number} failed, so this one does nothing: {other}")
    return result


def share(names: Iterable[str]) -> list[str]:
    """This rank's part of what is the same on all."""
    return sorted(names)[rank() :: dist.get_world_size() if dist.is_initialized() else 1]
