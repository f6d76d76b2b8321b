"""The kinds of quantized weights that there are, and those that a model has."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from bnbops.nn.four_bit.quantization import Quantization4bit
from bnbops.nn.int8.quantization import QuantizationInt8
from bnbops.nn.parametrize import ParametrizedWeight
from bnbops.nn.weights.module import QuantizedWeight, is_quantized
from bnbops.nn.weights.quantization import Quantization

KINDS: tuple[type[Quantization], ...] = (Quantization4bit, QuantizationInt8)
FORMATS = tuple(name for kind in KINDS for name in kind.formats)


def kind_of(quant: str) -> type[Quantization]:
    """The kind that has the format.

    Raises:
        ValueError: none has.
    """
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
