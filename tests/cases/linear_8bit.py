"""A small Linear8bitLt and inputs that the tests share."""

import torch
from torch import Tensor, nn

from bnbops.nn import Int8Params, Linear8bitLt


def layer(has_fp16_weights: bool = False, threshold: float = 3.0, **options: object) -> Linear8bitLt:
    """40 -> 24 features; quantized, unless its weight is a float one."""
    torch.manual_seed(0)
    return Linear8bitLt(40, 24, has_fp16_weights=has_fp16_weights, threshold=threshold, **options).to("cpu")


def inputs(*rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*rows, 40, generator=torch.Generator().manual_seed(1))
    x[..., 5] *= 9
    return x.to(dtype)


def assert_quantized(module: nn.Module) -> None:
    """The weight and the module show the same scales, which are a parameter of the module."""
    assert type(module.weight) is Int8Params and module.weight.dtype == torch.int8
    assert module.weight_scale.dtype == torch.int32 and dict(module.named_parameters())["weight_scale"] is not None
    assert module.weight.SCB.data_ptr() == module.weight_scale.data_ptr() == module.SCB.data_ptr()
    assert module.weight.SCB.dtype == module.SCB.dtype == torch.float32
    assert not module.weight.requires_grad and not module.weight_scale.requires_grad
