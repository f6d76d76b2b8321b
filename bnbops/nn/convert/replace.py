"""A quantized weight, and layers for it, in the place of a float one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bnbops.functional import quantize_4bit
from bnbops.lasting import lasting
from bnbops.nn.convert.format import QuantizationFormat, logical_shape
from bnbops.nn.convert.materialize import Change
from bnbops.nn.convert.plan import Place
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.int8.entries import check_scales
from bnbops.nn.int8.parameter import Int8Params
from bnbops.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized


def find(model: nn.Module, name: str) -> Place:
    path, _, attribute = name.rpartition(".")
    return Place(path, model.get_submodule(path), attribute)


@lasting()
def quantize_weight(model: nn.Module, names: Sequence[str], data: Tensor, format: QuantizationFormat) -> Change:
    """Quantizes the value of a float weight. The change that is returned puts it there under all its names."""
    places = [find(model, name) for name in names]
    first = places[0]
    if first.kind == "expert":
        return _expert_change(first, data, format)
    return _layers_change(model, places, format.parameter(data.T if first.transposed else data), format)


@lasting()
def hold_quantized(
    model: nn.Module, names: Sequence[str], data: Tensor, statistics: Mapping[str, Tensor], format: QuantizationFormat
) -> Change:
    """As `quantize_weight`, for the entries of a state dict: codes, and what describes them by bitsandbytes' names
    without a prefix ("absmax" and so on, or "SCB" and "weight_format").

    Raises:
        ValueError: entries of another quantization than the format's, of another shape than the weight's, or that do
            not describe the codes.
    """
    places = [find(model, name) for name in names]
    first, shape = places[0], tuple(logical_shape(places[0]))
    if (found := _kind_of(statistics)) != format.quant:
        raise ValueError(f"the codes are {found}, expected {format.quant}")
    if format.quant == "int8":
        return _layers_change(model, places, _int8_weight(data, statistics, shape), format)
    weight = Params4bit.from_prequantized(data, dict(statistics))
    state = weight.quant_state
    if tuple(state.shape) != shape:
        raise ValueError(f"the quantized weight has shape {list(state.shape)}, expected {list(shape)}")
    if first.kind == "expert":
        return _packed_change(first, weight.data, statistics)
    stored = {"double_quant": state.nested, "blocksize": state.blocksize, "quant_storage": weight.quant_storage}
    return _layers_change(model, places, weight, replace(format, **stored))


def _kind_of(statistics: Mapping[str, Tensor]) -> str:
    if "SCB" in statistics:
        return "int8"
    prefix = "quant_state.bitsandbytes__"
    if (name := next((name for name in statistics if name.startswith(prefix)), None)) is None:
        raise ValueError(f"it comes with {', '.join(sorted(statistics))}, but without {prefix}nf4 or ...fp4")
    return name.removeprefix(prefix)


def _int8_weight(codes: Tensor, statistics: Mapping[str, Tensor], shape: tuple[int, ...]) -> Int8Params:
    if (layout := statistics.get("weight_format")) is not None and layout.item() != 0:
        raise ValueError(f"weight_format is {layout.item()}; only weights by rows (0) can be loaded")
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape:
        raise ValueError(f"expected int8 codes {list(shape)}, got {codes.dtype} {list(codes.shape)}")
    check_scales(statistics["SCB"], shape[0])
    return Int8Params(codes, requires_grad=False, SCB=statistics["SCB"].to(codes.device))


def _layers_change(
    model: nn.Module, places: Sequence[Place], weight: nn.Parameter, format: QuantizationFormat
) -> Change:
    layers = {place.module: format.layer(place) for place in places}
    for layer in layers.values():
        layer.weight = weight

    def change() -> None:
        for place in places:
            _keep(place.module, layers[place.module])
            model.set_submodule(place.path, layers[place.module])

    return change


def _keep(old: nn.Module, new: nn.Module) -> None:
    """The bias, the mode, the hooks on calls, and what a user has attached to the layer."""
    keep_calls(old, new)
    if type(old) not in (nn.Linear, nn.Embedding):
        new.source_cls = type(old)  # as Transformers calls it, to know a Conv1D when it is dequantized
    vars(new).update({name: value for name, value in vars(old).items() if name not in vars(new)})


def keep_calls(old: nn.Module, new: nn.Module) -> None:
    """What a call does beside the weight's part: the bias, the mode, hooks."""
    if "bias" in old._parameters:
        new.bias = old.bias
    new.training = old.training
    for name, value in vars(old).items():
        if "hook" in name and ("forward" in name or "backward" in name):
            vars(new)[name] = value  # the very dict of hooks, so that their handles can remove them


def _expert_change(place: Place, data: Tensor, format: QuantizationFormat) -> Change:
    options = {"compress_statistics": format.double_quant, "quant_type": format.quant, "blocksize": format.blocksize}
    if data.is_meta:
        return partial(replace_parameter_4bit, place.module, place.attribute, **options)
    packed, state = quantize_4bit(data.contiguous(), quant_storage=format.quant_storage, **options)
    return _packed_change(place, packed, state.as_dict())


def _packed_change(place: Place, packed: Tensor, statistics: Mapping[str, object]) -> Change:
    def change() -> None:
        setattr(place.module, place.attribute, nn.Parameter(packed, requires_grad=False))
        replace_parameter_4bit_prequantized(place.module, place.attribute, dict(statistics), packed.device)

    return change
