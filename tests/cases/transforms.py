"""A family whose steps need whole matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbops.optim import SGD
from bnbops.optim.core.transform import Along, Run, Transform


def orthogonal(x: Tensor) -> Tensor:
    """Nearly, by three iterations of Newton and Schulz; what is no matrix stays as it is."""
    if x.dim() != 2:
        return x
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x


class Orthogonal(Transform):
    whole = True

    def __call__(self, run: Run) -> Along:
        assert all(x.shape == owner.shape and x.isfinite().all() for x, owner in self.seen(run))
        return Along(directions=[orthogonal(x) for x in run.directions])

    @staticmethod
    def seen(run: Run) -> list[tuple[Tensor, Tensor]]:
        traced = torch.compiler.is_compiling() or type(run.directions[0]) is not Tensor
        return [] if traced else list(zip(run.directions, run.owners, strict=True))


class OrthogonalSGD(SGD):
    def _transform(self, group: Mapping[str, Any]) -> Transform | None:
        return Orthogonal()
