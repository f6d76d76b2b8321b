"""`bitsandbytes.utils`: a quantization's description as a tensor of a state dict, and back; tools for models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bnbops.functional.quant_state import _pack as pack_dict_to_tensor
from bnbops.functional.quant_state import _unpack as unpack_tensor_to_dict

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {n: name for name, n in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Puts other layers in the place of `torch.nn.Linear`s, in place. `bnbops.nn.quantize_` quantizes them, too.

    Args:
        model: it is changed, and returned.
        linear_replacement: makes a layer of input features, output features and whether there is a bias.
        skip_modules: names that layers to be kept have in the module they are in.
        copy_weights: give the new layer the parameters of the old one.
        post_processing_function: name of a method of the old layer to call, with that layer, if it has it.
    """
    for name, module in model.named_children():
        replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        if copy_weights:
            new.weight, new.bias = module.weight, module.bias
        setattr(model, name, new)
        if post_processing_function is not None and (process := getattr(module, post_processing_function, None)):
            process(module)
    return model


def sync_gpu(t: Tensor) -> None:
    """Waits for the device of a tensor."""
    if t.device.type != "cpu":
        torch.accelerator.synchronize(t.device)
