"""What DTensor and FSDP2 lack before torch 2.13. This file can go when that is the oldest torch that bnbops supports.

Codes and scales of quantized weights are frozen parameters of integers. FSDP2 made each sharded parameter as one with
gradients and took them away again, for integers an error, and mixed precision cast integers, too. Where gradients are
off, `redistribute()` of a parameter called `detach_`, which DTensor had no rule for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def let_parameters_detach() -> None:
    """To be called when DTensor has been imported."""
    from torch.distributed.tensor import DTensor

    rules = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    rules[torch.ops.aten.detach_.default] = rules[torch.ops.aten.detach.default]


def let_integers_be_sharded() -> None:
    """To be called when FSDP2 has been imported."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    FSDPParam._init_sharded_param = _without_gradients(FSDPParam._init_sharded_param)
    FSDPParam.to_sharded_post_forward = _without_gradients(FSDPParam.to_sharded_post_forward)
    FSDPParam.init_dtype_attrs = _without_casts(FSDPParam.init_dtype_attrs)


class _IntegersWithoutGradients(TorchFunctionMode):
    """Within it, asking an integer tensor for gradients leaves it as it is."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_ and not (args[0].is_floating_point() or args[0].is_complex()):
            return args[0]
        return func(*args, **(kwargs or {}))


def _without_gradients(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        with _IntegersWithoutGradients():
            method(*args, **kwargs)

    return wrapper


def _without_casts(init_dtypes: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_dtypes)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init_dtypes(self, *args, **kwargs)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    return wrapper
