"""Fakes of the norm operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check, check_contiguous, check_device, check_dtype, check_float, check_one_element

_HISTORY = 100

# Norms are not differentiable: they must not require a gradient that no formula computes.
_library = torch.library.Library("bnbops", "IMPL")
_library.impl("squared_norms", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("bnbops::squared_norms")
def squared_norms(tensors: list[Tensor]) -> Tensor:
    check(len(tensors) > 0, "squared_norms: needs at least one tensor")
    for i, tensor in enumerate(tensors):
        check_float(f"squared_norms: tensors[{i}]", tensor)
        check_device(f"squared_norms: tensors[{i}]", tensor, tensors[0])
    return torch.empty(len(tensors), dtype=torch.float64, device=tensors[0].device)


@torch.library.register_fake("bnbops::percentile_clip_")
def percentile_clip_(
    gnorm_vec: list[Tensor],
    squared_norms: Tensor,
    steps: list[Tensor],
    *,
    percentile: int,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    op, count = "percentile_clip_", len(gnorm_vec)
    check(0 <= percentile < _HISTORY, f"{op}: percentile must be in [0, {_HISTORY}), got {percentile}")
    check(len(steps) == count, f"{op}: steps has {len(steps)} tensors for {count} in gnorm_vec")
    what = f"{op}: squared_norms"
    check_dtype(what, squared_norms, torch.float64)
    check_contiguous(what, squared_norms)
    check(
        squared_norms.dim() == 1 and squared_norms.numel() == count,
        f"{what} must have shape [{count}], one number for each of gnorm_vec, got {list(squared_norms.shape)}",
    )
    for i, (history, step) in enumerate(zip(gnorm_vec, steps, strict=True)):
        what = f"{op}: gnorm_vec[{i}]"
        check_dtype(what, history, torch.float32)
        check_device(what, history, squared_norms)
        check_contiguous(what, history)
        shape = list(history.shape)
        check(shape == [_HISTORY], f"{what} must have shape [{_HISTORY}], got {shape}")
        what = f"{op}: steps[{i}]"
        check_dtype(what, step, torch.float32)
        check_one_element(what, step)
        check_device(what, step, squared_norms)
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is not None:
            check_dtype(f"{op}: {name}", tensor, torch.float32)
            check_one_element(f"{op}: {name}", tensor)
            if tensor.device.type != "cpu":
                check_device(f"{op}: {name}", tensor, squared_norms)
    return squared_norms.new_empty(count, dtype=torch.float32)
