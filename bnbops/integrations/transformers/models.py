"""Quantized models of Transformers: how many parameters they have, what they save, and their floats again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbops.nn.convert.replace import keep_calls
from bnbops.nn.convert.requantize import dequantized_weight
from bnbops.nn.four_bit.module import Weight4bit
from bnbops.nn.int8.module import Int8Module
from bnbops.nn.parametrize import Bnb4bitParametrization


def number_of_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`num_parameters` of a model in Transformers, where a quantized weight counts as the float one does."""
    total, counted = 0, set()
    for module in model.modules():
        excluded = exclude_embeddings and isinstance(module, nn.Embedding)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in counted or _is_scale(module, name):
                continue
            counted.add(id(parameter))
            if not excluded and (parameter.requires_grad or not only_trainable):
                total += _float_numel(module, name, parameter)
    return total


def _is_scale(module: nn.Module, name: str) -> bool:
    if isinstance(module, Bnb4bitParametrization):
        return True
    return isinstance(module, Weight4bit | Int8Module) and name.startswith("weight_")


def _float_numel(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    if isinstance(module, Weight4bit) and name == "weight" and module.quant_state is not None:
        return module.quant_state.shape.numel()
    if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Bnb4bitParametrization):
        return module[0].quant_state.shape.numel()
    return parameter.numel()


def without_tied_copies(model: nn.Module) -> dict[str, Any] | None:
    """The state dict with each quantized weight under one name, as safetensors needs it. None if none has two."""
    owners: dict[int, str] = {}
    copies = []
    for path, module in model.named_modules():
        if isinstance(module, Weight4bit | Int8Module) and owners.setdefault(id(module.weight), path) != path:
            copies.append(path)
    if not copies:
        return None
    entries = tuple(f"{path}.{name}" for path in copies for name in ("weight", "weight.", "SCB", "weight_format"))
    return {
        key: value
        for key, value in model.state_dict().items()
        if not any(key == entry or (entry.endswith(".") and key.startswith(entry)) for entry in entries)
    }


@torch.no_grad()
def dequantize_(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes every quantized layer, and every parametrized expert weight, a float one, in place.

    `dtype`: of the float weights; None for that which they had before quantization (int8: fp32).
    """
    weights: dict[int, nn.Parameter] = {}  # one for all who share a quantized one
    for path, module in list(model.named_modules()):
        for name, chain in list(getattr(module, "parametrizations", {}).items()):
            if any(isinstance(part, Bnb4bitParametrization) for part in chain):
                weight = _parameter(getattr(module, name), dtype)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                setattr(module, name, weight)
        if isinstance(module, Weight4bit | Int8Module):
            if id(module.weight) not in weights:
                weights[id(module.weight)] = _parameter(_floats(module), dtype)
            model.set_submodule(path, _float_layer(module, weights[id(module.weight)]))


def _parameter(weight: Tensor, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(weight.dtype if dtype is None else dtype))


def _floats(module: Weight4bit | Int8Module) -> Tensor:
    """The weight as the float layer held it."""
    weight = dequantized_weight(module)
    return weight if _source_class(module) is None else weight.T.contiguous()


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
