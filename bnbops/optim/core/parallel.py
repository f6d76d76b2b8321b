"""What torch's parallel engines make of parameters and gradients, as far as a step has to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bnbops.dtensors import distributed, is_dtensor, local, redistributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_param(param: Tensor) -> None:
    """Refuses parameters that no step could be right for.

    Raises:
        ValueError: a DTensor of partial sums, or what FullyShardedDataParallel (FSDP1) has left of a parameter.
    """
    if is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a parameter of shape {list(param.shape)} is a partial sum on each rank, with placements "
            f"{param.placements}; redistribute() it as Shard or Replicate before it becomes a parameter"
        )
    if getattr(param, "_fsdp_flattened", False):
        # A piece of a row here, a few rows or nothing there: 8-bit states have no rows, norms lack the other ranks, and
        # FSDP1's own full state dict mixes up the states of Adam on the CPU (torch 2.13).
        raise ValueError(
            f"FullyShardedDataParallel (FSDP1) has flattened a parameter: this rank has {param.numel()} elements, "
            "without rows. Optimizers of bnbops need whole parameters or DTensors; shard the model with FSDP2, "
            "torch.distributed.fsdp.fully_shard(), before the optimizer is made"
        )


def local_grad(param: DTensor, grad: Tensor) -> Tensor:
    """This rank's part of a sharded parameter's gradient, sharded alike.

    Backward may leave a gradient otherwise, above all as partial sums of a replicated parameter.

    Raises:
        RuntimeError: the gradient is no DTensor, or on another mesh.
    """
    if not is_dtensor(grad) or grad.device_mesh != param.device_mesh:
        found = f"one on {grad.device_mesh}" if is_dtensor(grad) else "a plain tensor"
        raise RuntimeError(
            f"the gradient of a DTensor of shape {list(param.shape)} must be a DTensor on its {param.device_mesh}, got "
            f"{found}; distribute_tensor() makes it one"
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return grad.to_local()


def gathered(parts: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Whole tensors of which each rank has the part that it has of a parameter."""
    return [
        distributed(x, param.device_mesh, param.placements, param.shape).full_tensor() if is_dtensor(param) else x
        for x, param in zip(parts, params, strict=True)
    ]


def own_parts(tensors: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """Of whole tensors, the part that this rank has of their parameters, where it has it."""
    return [
        local(redistributed(x, param.device_mesh, param.placements)).to(local(param).device) if is_dtensor(param) else x
        for x, param in zip(tensors, params, strict=True)
    ]
