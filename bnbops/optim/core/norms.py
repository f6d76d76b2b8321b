"""Norms of whole parameters, and the trust ratios made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bnbops.dtensors import is_dtensor

_LARGEST = torch.finfo(torch.float32).max


def whole_squared_norms(squared_norms: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Squared norms of whole tensors from those of this rank's parts: sums them over the shards of each parameter.

    Args:
        squared_norms: fp64 `[..., n]`, last dimension by parameter, of the parts that this rank holds.
        params: the n parameters; DTensors tell by mesh and placements which ranks hold the other parts. Plain tensors
            are whole.

    Returns:
        fp64 `[..., n]`, the same on every rank; `squared_norms` itself if nothing is sharded.
    """
    sharded: dict[tuple[Any, int], list[bool]] = defaultdict(lambda: [False] * len(params))
    for i, param in enumerate(params):
        if not is_dtensor(param):
            continue
        for dim, placement in enumerate(param.placements):
            if not placement.is_replicate():
                sharded[param.device_mesh, dim][i] = True
    for (mesh, dim), among in sharded.items():
        from torch.distributed._functional_collectives import all_reduce

        # Every rank takes part with the same parameters, those of which it has an empty shard included.
        total, end, parts = all_reduce(squared_norms, "sum", (mesh, dim)), 0, []
        for is_among, run in groupby(among):  # not by a mask, which would have to be copied to the device
            begin, end = end, end + len(list(run))
            parts.append((total if is_among else squared_norms)[..., begin:end])
        squared_norms = torch.cat(parts, dim=-1)
    return squared_norms


def trust_ratio(weight: Tensor, update: Tensor, max_unorm: float, clip: bool) -> Tensor:
    """`max_unorm * weight / update`, at most 1 if `clip`; 1 where a norm is 0.

    Args:
        weight: norms `[n]` of the parameters.
        update: norms `[n]` of what the ratio scales.
        max_unorm: the ratio that is kept; positive.
        clip: whether ratios above 1 count as 1, as in bitsandbytes.

    Returns:
        fp32 `[n]`.
    """
    ratio = torch.where((weight > 0) & (update > 0), max_unorm * weight / update, 1.0)
    return ratio.clamp(max=1.0 if clip else _LARGEST).float()
