"""How many bytes `fully_shard` sends in a train step, told from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Traffic:
    """Bytes of one train step, forward and backward, that each rank sends (and receives as many).

    `gathered` and `scattered` assume what a ring does: of a collective's bytes all but this rank's own part.
    `unsharded` is the largest wrapped module with all its parameters whole: what a rank holds for a moment beside its
    shards.
    """

    gathered: int  # parameters, by all-gather
    scattered: int  # gradients, by reduce-scatter
    unsharded: int
    collectives: int  # calls

    @property
    def total(self) -> int:
        return self.gathered + self.scattered


def traffic(
    model: nn.Module,
    units: Sequence[nn.Module],
    ranks: int,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> Traffic:
    """What FSDP2 moves in one step of a model of which it wraps `units`, then the model itself.

    A wrapped module's parameters are gathered in one collective, each padded to as many rows on every rank; what has
    no gradient is not reduced. The model's own stay whole between forward and backward, the units' unless told.

    Args:
        model: a module, on the meta device if it is large.
        units: the submodules that `fully_shard` was called on, none within another.
        ranks: of the mesh that shards.
        param_dtype: of MixedPrecisionPolicy: floating-point parameters are gathered in it.
        reduce_dtype: of MixedPrecisionPolicy: gradients are reduced in it; by default in the gathered dtype.
        reshard_after_forward: as given to `fully_shard`.

    Raises:
        ValueError: no ranks, or a unit that is not inside the model.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be a positive whole number, got {ranks!r}")
    inside = set(model.modules())
    if strange := [type(unit).__name__ for unit in units if unit not in inside]:
        raise ValueError(f"units must be submodules of the model; {', '.join(strange)} are not")
    seen: set[nn.Parameter] = set()
    gathered = scattered = unsharded = collectives = 0
    for unit in (*units, model):
        params = [param for param in unit.parameters() if param not in seen]
        seen.update(params)
        whole = sum(_padded(param, ranks) * _dtype(param, param_dtype).itemsize for param in params)
        trained = [param for param in params if param.requires_grad]
        grads = sum(_padded(param, ranks) * _dtype(param, reduce_dtype or param_dtype).itemsize for param in trained)
        times = 2 if unit is not model and reshard_after_forward else 1
        gathered += times * whole
        scattered += grads
        unsharded = max(unsharded, whole)
        collectives += times * bool(params) + bool(trained)
    return Traffic(_sent(gathered, ranks), _sent(scattered, ranks), unsharded, collectives if ranks > 1 else 0)


def _padded(param: nn.Parameter, ranks: int) -> int:
    """Elements of a parameter with as many rows on every rank."""
    rows = param.shape[0] if param.dim() else 1
    return -(rows // -ranks) * ranks * math.prod(param.shape[1:])


def _dtype(param: nn.Parameter, policy: torch.dtype | None) -> torch.dtype:
    return policy if policy is not None and param.is_floating_point() else param.dtype


def _sent(size: int, ranks: int) -> int:
    return size // ranks * (ranks - 1)
