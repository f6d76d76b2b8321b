"""Data parallelism that the compiler sees through: parameters are DTensors, and reading one gathers it.

A module's parameters stay sharded in `_parameters`. The module's class gets a property of each parameter's name that
gathers the parameter where `forward` reads it; autograd then scatters the gradient, averaged over the ranks. There are
no hooks and no state, so `bnbops.compiled_train_step` captures collectives, backward and optimizer in one graph.

Source: Zhang et al., "SimpleFSDP" (arXiv:2411.00284).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

Module = TypeVar("Module", bound=nn.Module)

_PLACEMENTS: dict[str, tuple[Placement, ...]] = {
    "fully_shard": (Shard(0),),
    "replicate": (Replicate(),),
    "hybrid_shard": (Replicate(), Shard(0)),
}


class _Precision(NamedTuple):
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None


def data_parallel(
    model: Module,
    mesh: DeviceMesh,
    mode: str = "fully_shard",
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Module:
    """Distributes a model's parameters, in place, so that a train step with its collectives can be one graph.

    Every rank then trains on its own batch; gradients are averaged over the ranks. Parameters become those of the
    mesh's first rank, buffers are left alone. Names and shapes stay: `state_dict()` and `parameters()` have DTensors,
    as with `fully_shard`. Only `module.weight`, read as an attribute, is the whole parameter, in a new tensor at each
    read: initialize the model before, and hand optimizers what `model.parameters()` gives.

    Frozen parameters and parameters of integers (quantized weights) are gathered as they are, and reduce nothing.

    Args:
        model: any module with its parameters on the mesh's device.
        mesh: one dimension, the ranks; for "hybrid_shard" two: copies, and the ranks that share one.
        mode: "fully_shard" keeps rows of every parameter on each rank (ZeRO 3), "replicate" all of it (as DDP does),
            "hybrid_shard" shards within the second dimension of the mesh and replicates over the first.
        param_dtype: floating parameters are gathered in this dtype, and the floating inputs of `model` are cast to it.
        reduce_dtype: gradients are averaged in this dtype, by default in that of the gathered parameter.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown mode, a mesh of other dimensions than the mode needs, dtypes that are not floating, or
            parameters that are on another device, on the meta device or distributed already. The model is unchanged.
    """
    precision = _Precision(param_dtype, reduce_dtype)
    _check_arguments(mesh, mode, precision)
    _check_parameters(model, mesh)
    distributed: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        names = tuple(name for name, param in module._parameters.items() if param is not None)
        for name in names:
            param = module._parameters[name]
            if param not in distributed:
                distributed[param] = _distribute(param, mesh, _PLACEMENTS[mode])
            module._parameters[name] = distributed[param]
        if names:
            module.__class__ = _gathering(type(module), names, precision)
    if param_dtype is not None:
        model.register_forward_pre_hook(_cast_to(param_dtype), with_kwargs=True)
    return model


def _check_arguments(mesh: DeviceMesh, mode: str, precision: _Precision) -> None:
    if mode not in _PLACEMENTS:
        raise ValueError(f"mode must be one of {', '.join(_PLACEMENTS)}, got {mode!r}")
    if mesh.ndim != (needed := len(_PLACEMENTS[mode])):
        raise ValueError(
            f"mode {mode!r} needs a mesh of {needed} dimension{'s'[: needed - 1]}, got {mesh.ndim}: {mesh}; pass "
            + ("a slice of it, such as mesh['dp']" if needed == 1 else "(copies, ranks that share one)")
        )
    for name, dtype in precision._asdict().items():
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating dtype or None, got {dtype}")


def _check_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, DTensor):
            raise ValueError(
                f"parameter '{name}' is distributed already (a DTensor); apply data_parallel once, to a whole model"
            )
        if param.is_meta:
            raise ValueError(f"parameter '{name}' is on the meta device; give it data, with model.to_empty() and init")
        if param.device.type != mesh.device_type:
            raise ValueError(f"parameter '{name}' is on {param.device}, the mesh on {mesh.device_type}; move the model")


def _distribute(param: nn.Parameter, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    if param.dim() == 0:
        placements = (Replicate(),) * mesh.ndim
    return nn.Parameter(distribute_tensor(param.data, mesh, placements), requires_grad=param.requires_grad)


@cache
def _gathering(cls: type[nn.Module], names: tuple[str, ...], precision: _Precision) -> type[nn.Module]:
    """A subclass whose instances gather the parameters of these names when they read them."""

    def gathered(name: str) -> property:
        return property(lambda self: _gather(self._parameters[name], precision))

    def extra_repr(self: nn.Module) -> str:
        """Of the module without these properties: one rank may print it, and layers look whether there is a bias."""
        plain = cls.__new__(cls)
        vars(plain).update(vars(self))
        return plain.extra_repr()

    members = {name: gathered(name) for name in names} | {"extra_repr": extra_repr}
    return type(f"DataParallel{cls.__name__}", (cls,), members)


def _gather(param: Tensor | None, precision: _Precision) -> Tensor | None:
    if param is None:
        return None
    if not isinstance(param, DTensor):
        raise RuntimeError(
            f"a parameter of shape {list(param.shape)} has been replaced by a plain tensor after data_parallel; "
            "distribute it as the others are (torch.distributed.checkpoint.state_dict.set_model_state_dict does)"
        )
    forward = backward = None
    if param.is_floating_point():
        forward, backward = precision.param_dtype, precision.reduce_dtype or precision.param_dtype
    whole = param.redistribute(
        placements=[Replicate()] * param.device_mesh.ndim, forward_dtype=forward, backward_dtype=backward
    )
    return whole.to_local(grad_placements=[Partial("avg")] * param.device_mesh.ndim)


def _cast_to(dtype: torch.dtype) -> Callable[..., tuple[Any, Any]]:
    """A forward pre-hook."""

    def cast(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))

    return cast
