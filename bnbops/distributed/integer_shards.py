"""Parameters of integers under `fully_shard` of torch before 2.13.

Codes and scales of quantized weights are frozen parameters of integers. There FSDP2 makes each sharded parameter as one
with gradients and takes them away again, for integers an error, and mixed precision casts integers, too. When
torch 2.13 is the oldest that bnbops supports, this module can go, with its line in `bnbops/distributed/__init__.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnbops.versions import torch_is


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


def allow() -> None:
    """Lets FSDP2 shard parameters of integers; called once, with FSDP2 imported."""
    if torch_is("2.13"):
        return
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    FSDPParam._init_sharded_param = _without_gradients(FSDPParam._init_sharded_param)
    FSDPParam.to_sharded_post_forward = _without_gradients(FSDPParam.to_sharded_post_forward)
    FSDPParam.init_dtype_attrs = _without_casts(FSDPParam.init_dtype_attrs)
