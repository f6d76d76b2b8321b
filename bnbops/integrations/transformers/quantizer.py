"""The quantizer that Transformers calls while it loads a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from bnbops._library import cuda_library
from bnbops.integrations.transformers.config import METHOD, BnbOpsConfig
from bnbops.integrations.transformers.conversion import Deserialize, Quantize, weight_converters
from bnbops.integrations.transformers.models import dequantize_, number_of_parameters, without_tied_copies
from bnbops.nn.convert.places import find, places_by_tensor
from bnbops.nn.convert.plan import Reason, matches, plan_by_rule, skip_rule, with_prefixes
from bnbops.nn.convert.resizing import guard_resizing
from bnbops.nn.weights.quantization import Quantization


class BnbOpsHfQuantizer(HfQuantizer):
    """Quantizes a float checkpoint tensor by tensor, or loads a quantized one.

    Attributes:
        quantized: names of the weights that have been quantized, or loaded so.
    """

    requires_calibration = False
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options = self._options(quantization_config)
        self.quantized: set[str] = set()
        self.problems: dict[str, str] = {}
        self.merged: set[tuple[str, ...]] = set()  # sources of converters whose result is quantized
        self._groups: dict[str, list[str]] = {}  # by each name of a weight that is to be quantized, all of them
        self._ties: dict[str, list[str]] = {}  # the same of weights that are tied
        self._conversions: list[Any] = []

    def _options(self, quantization_config: Any) -> BnbOpsConfig:
        return quantization_config

    @property
    def quantization(self) -> Quantization:
        return self.options.quantization

    # ---- before the model is made ------------------------------------------------------------------------------

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses devices that are not there, and the disk."""
        places = device_map.values() if isinstance(device_map, dict) else []
        for place in places:
            if place == "disk":
                raise ValueError(
                    "the device map puts modules on the disk, from where quantized layers cannot be computed: leave "
                    "more room on the other devices (max_memory), or quantize less"
                )
            kind = "cuda" if isinstance(place, int) else torch.device(place).type
            if kind == "cuda" and not torch.cuda.is_available():
                raise ValueError(f'the device map has {place!r}, but this torch sees no GPU: pass device_map="cpu"')
            if kind == "cuda":
                cuda_library()
            elif kind != "cpu":
                raise ValueError(f"the device map has {place!r}, but bnbops computes on CPUs and CUDA GPUs only")

    # ---- before weights are loaded -------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        with _tied(model):
            shared = [[place.name for place in places] for places in places_by_tensor(model).values()]
            self._ties = {name: names for names in shared for name in names}
            if self.pre_quantized:
                return  # the checkpoint tells what is quantized
            plan = plan_by_rule(
                model, self.options.quant, self._rule(model), self.options.embeddings, self.options.experts
            )
            for names in shared:
                place = find(model, names[0])
                if place.kind and place.subject in plan.convert:
                    self.quantization.check_weight(place)
                    self._groups |= dict.fromkeys(names, names)
        if plan.unasked:
            reasons = "\n".join(f"  {name}: {plan.leave[name]}" for name in plan.unasked)
            warnings.warn(f"these weights stay as they are:\n{reasons}", stacklevel=2)
        if not self._groups:
            raise ValueError(f"there is nothing to quantize in this {type(model).__name__}:\n{plan}")

    def _rule(self, model: nn.Module) -> Reason:
        """What is to be left: what `skip` says, and what Transformers keeps in fp32."""
        skipped, kept = skip_rule(model, self.options.skip), list(getattr(model, "_keep_in_fp32_modules", None) or [])

        def reason(place: Any) -> str | None:
            names = with_prefixes(place.subject)
            in_fp32 = any(matches(names, pattern) for pattern in kept)
            return skipped(place) or ("Transformers keeps it in fp32" if in_fp32 else None)

        return reason

    def sharers(self, name: str) -> list[str]:
        """All names of a weight; itself first."""
        names = (self._ties if self.pre_quantized else self._groups).get(name, [name])
        return [name, *(other for other in names if other != name)]

    def leave(self, name: str) -> None:
        """Does not quantize a weight."""
        for each in self.sharers(name):
            self._groups.pop(each, None)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._groups

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element, for the sizes in a device map."""
        quantized = param_name in self._groups
        if self.pre_quantized:
            quantized = param.dim() > 1 and find(model, param_name).kind in ("linear", "expert")
        return self.quantization.bytes_per_element if quantized else param.element_size()

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        return weight_conversions + (weight_converters(self, model) if self.pre_quantized else [])

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        operation = next(iter(getattr(converter, "operations", ())), None)
        if isinstance(operation, Deserialize):
            operation.dtype = dtype
            return None  # it casts float weights, and neither codes nor scales
        return super().get_new_dtype(converter, param, dtype)

    # ---- after weights have been loaded --------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._check_result(model)
        self._groups = {}
        # Saving would apply the reverse of these to codes.
        self._conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            conversion
            for conversion in self._conversions
            if tuple(conversion.source_patterns) not in self.merged and not _is_own(conversion)
        ]
        # PEFT and TRL look at these, to prepare the model for adapters.
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = (self.quantization.bits == bits for bits in (8, 4))
        guard_resizing(model)
        model.num_parameters = partial(number_of_parameters, model)  # Transformers' wants bitsandbytes
        return model

    def _check_result(self, model: nn.Module) -> None:
        if self.problems:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in self.problems.items())
            what = "does not fit its quantization config" if self.pre_quantized else "cannot be quantized"
            raise ValueError(f"the checkpoint {what} ({self.options.quant}):\n{reasons}")
        if self.pre_quantized and not self.quantized:
            raise ValueError(
                f"config.json says that the checkpoint is quantized ({self.options.quant}), but it has no quantized "
                "weight: if it is a float one, remove quantization_config from config.json"
            )
        if left := [name for name in self._groups if name not in self.quantized]:
            warnings.warn(f"not quantized, since the checkpoint lacks them: {', '.join(left)}", stacklevel=2)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        return without_tied_copies(model), {}

    def is_serializable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model._weight_conversions = [conversion for conversion in self._conversions if not _is_own(conversion)]
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "num_parameters"):
            vars(model).pop(name, None)
        return model


def _is_own(conversion: Any) -> bool:
    return any(isinstance(operation, Deserialize) for operation in getattr(conversion, "operations", ()))


@contextmanager
def _tied(model: nn.Module) -> Iterator[None]:
    """The model with its tied weights shared, which from_pretrained does only after it has loaded them."""
    undo = []
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        to, tensor = find(model, target), find(model, source).tensor
        if tensor is not None and to.tensor is not None:
            undo.append((to, to.tensor))
            to.module._parameters[to.attribute] = tensor
    try:
        yield
    finally:
        for place, tensor in reversed(undo):
            place.module._parameters[place.attribute] = tensor


def register() -> None:
    """Makes the quantization method known to Transformers."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(BnbOpsConfig)
        register_quantizer(METHOD)(BnbOpsHfQuantizer)
