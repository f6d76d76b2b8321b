"""Models of Transformers: 32-bit states for embeddings; of quantized ones the number of parameters, what they save, and
their floats again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbops.nn.convert.replace import keep_calls
from bnbops.nn.kinds import KINDS, quantized_weights
from bnbops.nn.parametrize import ParametrizedWeight
from bnbops.nn.weights.module import QuantizedModule
from bnbops.optim import GlobalOptimManager


def keep_embeddings_in_32_bits(model: nn.Module) -> list[str]:
    """Optimizers that are made, or have been, keep the states of the model's embeddings in 32 bits.

    Call it before the first step and, in a program that resumes, before the states are loaded. It holds for the weight
    that an `nn.Embedding` has by then, so also for a head that is tied to it. An embedding whose ``optim_bits`` is
    overridden already is left alone.

    Args:
        model: any module; `PeftModel`s too.

    Returns:
        The names of the embeddings that it was said of.

    Warns:
        UserWarning: an optimizer has built the state of such a weight.
    """
    manager = GlobalOptimManager.get_instance()
    overridden = {id(param) for param, config in manager.overrides().items() if "optim_bits" in config}
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        if weight is not None and id(weight) not in overridden:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
            names.append(name)
    return names


def number_of_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`num_parameters` of a model in Transformers, where a quantized weight counts as the float one does."""
    sizes: dict[int, int] = {}
    for _, weight in quantized_weights(model):
        codes, *scales = weight.tensors().values()
        sizes |= {id(codes): math.prod(weight.weight_shape)} | dict.fromkeys(map(id, scales), 0)
    total, counted = 0, set()
    for module in model.modules():
        excluded = exclude_embeddings and isinstance(module, nn.Embedding)
        for parameter in [each for each in module._parameters.values() if each is not None]:
            if id(parameter) not in counted and not excluded and (parameter.requires_grad or not only_trainable):
                total += sizes.get(id(parameter), parameter.numel())
            counted.add(id(parameter))
    return total


def without_tied_copies(model: nn.Module) -> dict[str, Any] | None:
    """The state dict with each quantized weight under one name, as safetensors needs it. None if none has two."""
    owners: dict[int, str] = {}
    copies = []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule) and owners.setdefault(id(module.weight), path) != path:
            copies.append(f"{path}.weight")
    if not copies:
        return None
    left_out = {*copies, *(key for name in copies for kind in KINDS for key in kind.keys(name))}
    return {key: value for key, value in model.state_dict().items() if key not in left_out}


@torch.no_grad()
def dequantize_(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes every quantized layer, and every parametrized expert weight, a float one, in place.

    `dtype`: of the float weights; None for that which they had before quantization (int8: fp32).
    """
    weights: dict[int, nn.Parameter] = {}  # one for all who share a quantized one
    for path, module in list(model.named_modules()):
        for name in list(getattr(module, "parametrizations", ())):
            if ParametrizedWeight.find(module, name) is not None:
                weight = _parameter(getattr(module, name), dtype)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, weight)
        if isinstance(module, QuantizedModule):
            if id(module.weight) not in weights:
                weight = module.dequantized()
                weight = weight if _source_class(module) is None else weight.T.contiguous()  # as Conv1D held it
                weights[id(module.weight)] = _parameter(weight, dtype)
            model.set_submodule(path, _float_layer(module, weights[id(module.weight)]))


def _parameter(weight: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(weight.dtype if dtype is None else dtype))


def _source_class(module: nn.Module) -> type[nn.Module] | None:
    """Conv1D, if it was one."""
    return getattr(module, "source_cls", None)


def _float_layer(old: nn.Module, weight: nn.Parameter) -> nn.Module:
    dtype = weight.dtype
    if isinstance(old, nn.Embedding):
        new = nn.Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx, device="meta", dtype=dtype)
    elif (source := _source_class(old)) is not None:
        with torch.device("meta"):  # Conv1D takes no device
            new = source(old.out_features, old.in_features)
    else:
        new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta", dtype=dtype)
    new.weight = weight
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
    keep_calls(old, new)
    return new if hook is None else add_hook_to_module(new, hook)
