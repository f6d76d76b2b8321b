"""The bias of a linear layer with an int8 weight."""

from __future__ import annotations

from torch import Tensor, nn

from bnbops.facts import FLOATS
from bnbops.tracing import is_compiling

cast_for_good = False  # while bnbops is installed as bitsandbytes, whose layers do it


def bias_for(module: nn.Linear, x: Tensor) -> Tensor | None:
    """The module's bias in the dtype of its input."""
    bias = module.bias
    if bias is None or bias.dtype == x.dtype:
        return bias
    if cast_for_good and isinstance(bias, nn.Parameter) and not is_compiling() and _fits(module, x):
        bias.data = bias.data.to(x.dtype)
        return bias
    return bias.to(x.dtype)


def _fits(module: nn.Linear, x: Tensor) -> bool:
    """Whether the product will not refuse x: a failed call must not have cast anything."""
    return x.dtype in FLOATS and x.dim() > 0 and x.shape[-1] == module.in_features and x.device == module.weight.device
