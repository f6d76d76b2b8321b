"""What comes between a step's direction and the step along it, in Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bnbops.lasting import lasting
from bnbops.optim.core.call import Call
from bnbops.optim.core.norms import trust_ratio, whole_squared_norms
from bnbops.optim.core.parallel import gathered, own_parts
from bnbops.tracing import is_traced

_LINE = 16  # elements of a cache line
LARGEST_RUN = 2**26  # elements whose directions there are at once, unless one parameter has more: 256 MiB


class DirectionMemory:
    """Memory for directions on the CPU that one step leaves to the next: faulting in fresh memory takes longer than all
    else. It is as large as the largest run; what exceeds `LARGEST_RUN` is not kept."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def directions(self, params: list[Tensor]) -> list[Tensor]:
        """Float32 tensors of the parameters' shapes and devices, with anything in them."""
        sizes = [-(param.numel() // -_LINE) * _LINE for param in params]
        if is_traced() or sum(sizes) > LARGEST_RUN or any(param.device.type != "cpu" for param in params):
            return [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in params]
        if self._kept is None or self._kept.numel() < sum(sizes):
            with lasting():
                self._kept = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")
        parts = self._kept[: sum(sizes)].split(sizes)
        return [part[: x.numel()].view(x.shape) for part, x in zip(parts, params, strict=True)]


class Run(NamedTuple):
    """Some parameters of a call, and the directions that their rule gives."""

    directions: list[Tensor]  # float32: of this rank's part, or whole
    params: list[Tensor]  # this rank's part, contiguous
    owners: list[Tensor]  # the parameters as the user has them, sharded or not


class Along(NamedTuple):
    """What parameters are stepped along."""

    directions: list[Tensor] | None = None  # None: as they were
    trust: Tensor | None = None  # fp32 [n], a ratio for each parameter; for rules whose `trust` is "direction"


class Transform:
    """Makes other directions of those that a rule gives, or a ratio for each parameter.

    A family's `_transform` returns one for a param group. It is called with the states moved on, so it must not raise
    for what could have been refused before (`_check_params`, `_check_options`). In compiled steps it is traced.

    Attributes:
        whole: whether it needs whole tensors; those of sharded parameters are gathered then, and this rank's part of
            what it returns is taken. Elements that are to be left alone, as their gradient is not finite, are NaN in
            parts, and 0 in whole tensors; so they are whatever it returns, and others are that it makes NaN.
    """

    whole: ClassVar[bool] = False

    def __call__(self, run: Run) -> Along:
        raise NotImplementedError


class TrustRatio(Transform):
    """Steps as long as `max_unorm` times the parameter; see `trust_ratio`."""

    def __init__(self, max_unorm: float, clip: bool) -> None:
        self.max_unorm, self.clip = max_unorm, clip

    def __call__(self, run: Run) -> Along:
        local_norms = torch.ops.bnbops.squared_norms(run.params + run.directions)
        weight, update = whole_squared_norms(local_norms.view(2, -1), run.owners).sqrt()
        return Along(trust=trust_ratio(weight, update, self.max_unorm, self.clip))


def take(call: Call, transform: Transform, factors: Mapping[str, Tensor], memory: DirectionMemory) -> None:
    """Takes a call's step through a transform, some parameters after the other.

    Args:
        call: whose operator has checked its arguments.
        transform: between the two halves.
        factors: the first half's keyword arguments that are made from norms, one number a parameter.
        memory: for the directions.
    """
    for part in _runs([param.numel() for param in call.whole]):
        of_part = {name: x.narrow(0, part.start, part.stop - part.start) for name, x in factors.items()}
        directions = memory.directions(call.params[part])
        call.direct(part, directions, of_part)
        along = _transformed(transform, Run(directions, call.params[part], call.whole[part]))
        call.apply(part, along.directions or directions, {} if along.trust is None else {"trust": along.trust})
    call.written()


def _runs(sizes: list[int]) -> Iterator[slice]:
    """By whole sizes, so that all ranks have the same."""
    begin, total = 0, 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > LARGEST_RUN:
            yield slice(begin, i)
            begin, total = i, 0
        total += size
    yield slice(begin, len(sizes))


def _transformed(transform: Transform, run: Run) -> Along:
    given = run.directions
    if transform.whole:
        given = gathered([torch.where(x.isnan(), 0.0, x) for x in given], run.owners)
    along = transform(run._replace(directions=given))
    if along.directions is None:
        return along
    new = own_parts(along.directions, run.owners) if transform.whole else along.directions
    kept = [torch.where(old.isnan(), old, x).contiguous() for old, x in zip(run.directions, new, strict=True)]
    return along._replace(directions=kept)
