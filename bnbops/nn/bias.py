"""The bias of a quantized linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

cast_for_good = False  # while bnbops is installed as bitsandbytes, whose layers do it


def bias_in(module: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    """The module's bias in the dtype of its input."""
    bias = module.bias
    if bias is None or bias.dtype == dtype:
        return bias
    if cast_for_good and isinstance(bias, nn.Parameter) and not torch.compiler.is_compiling():
        bias.data = bias.data.to(dtype)
        return bias
    return bias.to(dtype)
