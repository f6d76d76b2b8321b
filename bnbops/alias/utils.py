"""`bitsandbytes.utils`: how a quantization's description becomes a tensor of a state dict, and back; other layers for
linear ones."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from bnbops.quant_state import _pack as pack_dict_to_tensor
from bnbops.quant_state import _unpack as unpack_tensor_to_dict

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
    skip_modules: Collection[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Puts new layers into the place of a model's linear ones. (`bnbops.nn.quantize_` does that and quantizes.)

    Args:
        model: with linear layers in it, at any depth.
        linear_replacement: makes a layer from the number of input and of output features, and whether there is a bias.
        skip_modules: names of layers to leave, without a path.
        copy_weights: give the new layers the weights and biases of the old ones.
        post_processing_function: name of a method of the new layers, to be called in the end.

    Returns:
        The model.
    """
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if not isinstance(old, nn.Linear) or name in skip_modules:
                continue
            new = linear_replacement(old.in_features, old.out_features, old.bias is not None)
            if copy_weights:
                new.weight, new.bias = old.weight, old.bias
            setattr(parent, name, new)
            if post_processing_function is not None:
                getattr(new, post_processing_function, lambda: None)()
    return model


def sync_gpu(t: Tensor) -> None:
    """Waits for all that a tensor's device has to do."""
    if t.device.type != "cpu":
        torch.accelerator.synchronize(t.device)
