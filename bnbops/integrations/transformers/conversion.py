"""Operations in Transformers' loading of weights: each tensor as it comes from its file becomes a quantized layer.

Layers are replaced where their weight arrives, not before. So a layer whose weight the checkpoint lacks, such as a new
classification head, stays a float one that Transformers initializes.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from bnbops.dtensors import is_dtensor
from bnbops.nn.convert.places import Place, find
from bnbops.nn.convert.replace import holding, quantizing
from bnbops.nn.kinds import KINDS, quantized_weight
from bnbops.nn.weights.memory import give_back
from bnbops.nn.weights.quantization import Quantization

if TYPE_CHECKING:
    from bnbops.integrations.transformers.quantizer import BnbOpsHfQuantizer

Missing = set[str] | None  # names that Transformers still misses


class _Operation(ConversionOps):
    def __init__(self, quantizer: BnbOpsHfQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        """Transformers copies operations for each tensor; the quantizer stays one."""
        return copy(self)

    def _put(self, model: nn.Module, name: str, missing_keys: Missing, make: Any, *arguments: Any) -> None:
        """Replaces what holds the weight `name`, and what shares it. A failure is kept for the end of loading: an
        exception here would reach users as a line in Transformers' report."""
        names = self.quantizer.sharers(name)
        try:
            if is_dtensor(find(model, name).tensor):
                raise ValueError("its weight is sharded, which is not supported while a model loads")
            make(model, names, *arguments, self.quantizer.quantization)()
        except torch.OutOfMemoryError:
            raise
        except KeyError as error:
            self.quantizer.problems[name] = f"there is no {error.args[0]}"
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            self.quantizer.problems[name] = str(error)
        else:
            self.quantizer.quantized.update(names)
        for each in names:
            _mark_initialized(find(model, each))
            if missing_keys is not None:
                missing_keys.discard(each)

    def _compare(self, model: nn.Module, name: str, codes: Tensor) -> None:
        """Of a weight that has come before, by another name that it is tied to."""
        held = find(model, name).tensor.data
        if not torch.equal(codes.reshape(-1).view(torch.uint8), held.reshape(-1).view(torch.uint8)):
            others = ", ".join(self.quantizer.sharers(name)[1:])
            self.quantizer.problems[name] = (
                f"it is tied to {others}, but the checkpoint has another value for it: load the model with "
                "tie_word_embeddings=False in its config, or without embeddings=True"
            )


class Quantize(_Operation):
    """Quantizes a float tensor of the checkpoint."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], model: nn.Module, missing_keys: Missing, **_: Any
    ) -> dict[str, Tensor]:
        others = {}
        for name in list(input_dict):
            value = _single(input_dict.pop(name))
            if not self.quantizer.param_needs_quantization(model, name):
                others[name] = value
            elif name in self.quantizer.quantized:
                self._compare(model, name, self.quantizer.quantization.parameter(value).data)
            elif value.shape != find(model, name).tensor.shape:
                self.quantizer.leave(name)  # Transformers knows what to do about other shapes
                others[name] = value
            else:
                self.quantizer.merged.add(tuple(source_patterns))
                self._put(model, name, missing_keys, self._quantize, value)
                nbytes = value.nbytes if value.is_cpu else 0
                del value
                give_back(nbytes)
        return others

    def _quantize(self, model: nn.Module, names: list[str], value: Tensor, quantization: Quantization) -> Any:
        quantization.check_values(names[0], value)
        return quantizing(model, names, value, quantization)


class Deserialize(_Operation):
    """Puts codes and scales of a quantized checkpoint in the place of a float weight, if that is what it holds."""

    dtype: torch.dtype | None = None  # of the weight if it is a float one

    def __init__(self, quantizer: BnbOpsHfQuantizer, own: str) -> None:
        super().__init__(quantizer)
        self.own = own  # what the weight itself is called among the sources

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, missing_keys: Missing, **_: Any
    ) -> dict[str, Tensor]:
        tensors = {name.removeprefix(f"{self.own}."): _single(input_dict.pop(name)) for name in list(input_dict)}
        weight, place = tensors.pop(self.own, None), find(model, full_layer_name)
        if not tensors and (place.kind is None or weight.is_floating_point()):
            return {full_layer_name: weight.to(self.dtype or weight.dtype) if weight.is_floating_point() else weight}
        if weight is not None and full_layer_name in self.quantizer.quantized:
            self._compare(model, full_layer_name, weight)
            return {}
        self._put(model, full_layer_name, missing_keys, self._hold, place, weight, tensors)
        return {}

    @staticmethod
    def _hold(
        model: nn.Module, names: list[str], place: Place, weight: Any, statistics: Any, quantization: Quantization
    ) -> Any:
        if place.kind is None:
            raise ValueError(f"it is quantized, but a {type(place.module).__name__} cannot hold a quantized weight")
        if weight is None:
            raise ValueError(f"there are scales ({', '.join(sorted(statistics))}), but no codes")
        if not statistics:
            raise ValueError(f"there are codes ({weight.dtype} {list(weight.shape)}), but no scales")
        return holding(model, names, weight, statistics, quantization)


def weight_converters(quantizer: BnbOpsHfQuantizer, model: nn.Module) -> list[WeightConverter]:
    """What loads quantized weights, by bitsandbytes' names."""
    statistics = {"weight": [key for kind in KINDS for key in kind.keys("weight")]}
    for path, module in model.named_modules():
        for place in (Place(path, module, attribute) for attribute in module._parameters):
            if place.kind == "expert":
                own = ".".join(place.name.split(".")[-2:])
                statistics[own] = [key for kind in KINDS if "expert" in kind.becomes for key in kind.keys(own)]
    return [WeightConverter([*names, own], own, [Deserialize(quantizer, own)]) for own, names in statistics.items()]


def _single(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _mark_initialized(place: Place) -> None:
    """Keeps Transformers from drawing anew what is quantized."""
    weight = quantized_weight(place.module, place.attribute)
    for tensor in [place.tensor] if weight is None else weight.tensors().values():  # a failure: it stays as it is
        tensor._is_hf_initialized = True
