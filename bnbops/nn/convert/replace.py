"""A quantized weight, and layers for it, in the place of a float one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from bnbops.facts import FORMATS_4BIT
from bnbops.functional.quant_state import PACKED
from bnbops.lasting import lasting
from bnbops.nn.convert.materialize import Change
from bnbops.nn.convert.places import Place, find
from bnbops.nn.kinds import KINDS
from bnbops.nn.weights.parameter import QuantizedParameter
from bnbops.nn.weights.quantization import Quantization


@lasting()
def quantizing(model: nn.Module, names: Sequence[str], data: Tensor, quantization: Quantization) -> Change:
    """Quantizes the value of a float weight. The change that is returned puts it there under all its names."""
    places = [find(model, name) for name in names]
    return _change(model, places, quantization.parameter(data.T if places[0].transposed else data), quantization)


@lasting()
def holding(
    model: nn.Module, names: Sequence[str], data: Tensor, statistics: Mapping[str, Tensor], quantization: Quantization
) -> Change:
    """As `quantizing`, for the entries of a state dict: codes, and what describes them by bitsandbytes' names without a
    prefix ("absmax" and so on, or "SCB" and "weight_format").

    Raises:
        ValueError: entries of another format than the quantization's, of another shape than the weight's, or that do
            not describe the codes.
    """
    places = [find(model, name) for name in names]
    found = next(filter(None, (kind.format_of(statistics) for kind in KINDS)), None)
    if found is None:
        expected = f"{PACKED}{' or ...'.join(FORMATS_4BIT)}"
        raise ValueError(f"it comes with {', '.join(sorted(statistics))}, but without {expected}")
    if found != quantization.quant:
        raise ValueError(f"the codes are {found}, expected {quantization.quant}")
    return _change(model, places, *quantization.loaded(data, statistics, places[0].shape))


def _change(
    model: nn.Module, places: Sequence[Place], weight: QuantizedParameter, quantization: Quantization
) -> Change:
    if places[0].kind == "expert":
        return partial(quantization.parametrize, places[0].module, places[0].attribute, weight)
    layers = {place.module: quantization.layer(place) for place in places}
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
