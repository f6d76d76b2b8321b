"""The kinds of quantized weights that there are, those that a model has, and its state dict by the names that modules
register: how sharded models save and load quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from bnbops.nn.four_bit.quantization import Quantization4bit
from bnbops.nn.int8.quantization import QuantizationInt8
from bnbops.nn.parametrize import ParametrizedWeight
from bnbops.nn.weights.module import QuantizedWeight, is_quantized
from bnbops.nn.weights.quantization import Quantization

KINDS: tuple[type[Quantization], ...] = (Quantization4bit, QuantizationInt8)
FORMATS = tuple(name for kind in KINDS for name in kind.formats)


def kind_of(quant: str) -> type[Quantization]:
    """The kind that has the format; ValueError if none has."""
    for kind in KINDS:
        if quant in kind.formats:
            return kind
    raise ValueError(f"quant must be one of {', '.join(FORMATS)}, got {quant!r}")


def quantized_weight(module: nn.Module, name: str = "weight") -> QuantizedWeight | None:
    """What a module has by this name, if it is quantized."""
    return module if name == "weight" and is_quantized(module) else ParametrizedWeight.find(module, name)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """All of a model's, each with the name of the module that registers its tensors."""
    for path, module in model.named_modules():
        weight = module if is_quantized(module) else ParametrizedWeight.of(module)
        if weight is not None:
            yield path, weight


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """A model's parameters and persistent buffers, as they are registered, in the model's memory.

    `state_dict()` of a quantized layer has bitsandbytes' entries, whose shapes cannot be sharded by rows. These can, so
    they are what a sharded model has in its state dict. With them a model that is not sharded

    * hands its tensors to a sharded one: `set_model_state_dict(sharded, plain_state_dict(model), options=...)` with
      `full_state_dict=True`;
    * reads a checkpoint of a sharded one in place: `torch.distributed.checkpoint.load(plain_state_dict(model), ...)`;
    * takes a full state dict of a sharded one by its own `load_state_dict`, and then saves bitsandbytes' entries.
    """
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        nn.Module._save_to_state_dict(module, state, f"{path}." if path else "", keep_vars=False)
    return state


def registered(name: str, read: Callable[[str], Tensor]) -> Tensor | None:
    """A quantized layer's scales by the name that it registers, of bitsandbytes' entries; None for other names. `read`
    gives an entry by its name, or raises KeyError."""
    path, found, own = name.rpartition("weight_")
    tensors = (kind.registered(f"{path}weight", own, read) for kind in KINDS)
    return next((tensor for tensor in tensors if tensor is not None), None) if found else None
