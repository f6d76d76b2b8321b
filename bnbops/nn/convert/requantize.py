"""The weight of a quantized module as floats, and floats in the format of that weight: what merging adapters needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnbops.dtensors import is_dtensor
from bnbops.nn.four_bit.module import Weight4bit
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.int8.module import Int8Module
from bnbops.nn.int8.parameter import Int8Params
from bnbops.nn.weights.finite import is_finite


def is_quantized(module: nn.Module) -> bool:
    """Whether the module has a weight in 4 or 8 bits (not one that stays a float, or is to be quantized yet)."""
    if isinstance(module, Weight4bit):
        return module._format is not None
    return isinstance(module, Int8Module) and module.weight.dtype == torch.int8


def dequantized_weight(module: Weight4bit | Int8Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight in its shape.

    Args:
        module: one that `is_quantized`.
        dtype: by default that of the weight before it was quantized; fp32 for 8 bits, which do not keep it.

    Raises:
        RuntimeError: the weight is sharded, and not gathered at the moment.
    """
    if is_dtensor(module.weight):
        raise RuntimeError(
            f"the weight of this {type(module).__name__} is sharded: call unshard() on the module that fully_shard was "
            "given, and reshard() afterwards; to merge adapters, load the model into one process"
        )
    if isinstance(module, Weight4bit):
        weight, absmax, blocksize, quant_type, nested = module._arguments()
        dtype = module._format.dtype if dtype is None else dtype
        return torch.ops.bnbops.dequantize_4bit(weight, absmax, blocksize, quant_type, module._shape, dtype, **nested)
    weight = torch.ops.bnbops.int8_vectorwise_dequant(*module._quantized_weight())
    return weight if dtype is None else weight.to(dtype)


def check_finite(weight: Tensor) -> None:
    """Quantization would make something else of NaN and infinity."""
    if not is_finite(weight):
        raise ValueError("the weight has NaN or infinite values, so it cannot be quantized")


@torch.no_grad()
def requantized_weight(module: Weight4bit | Int8Module, weight: Tensor) -> Params4bit | Int8Params:
    """A float weight as this module would hold it: with its quant_type, blocksize, storage and so on. The module is not
    changed.

    Raises:
        ValueError: a weight with values that are NaN or infinite (8 bits: or beyond 65504).
    """
    check_finite(weight)
    if not isinstance(module, Weight4bit):
        return Int8Params(weight, requires_grad=False).to(module.weight.device)
    new = Params4bit(
        weight,
        blocksize=module._format.blocksize,
        compress_statistics=module.weight_nested_absmax is not None,
        quant_type=module._format.quant_type,
        quant_storage=module.quant_storage,
    ).to(module.weight.device)
    new.quant_state.dtype = module._format.dtype
    return new
