"""Checkpoints of bitsandbytes, loaded by bnbops where there is no bitsandbytes."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module

from bnbops.integrations.transformers.config import METHOD, BnbOpsConfig
from bnbops.integrations.transformers.quantizer import BnbOpsHfQuantizer
from bnbops.nn.convert.places import Place
from bnbops.nn.convert.plan import Reason

_METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit")
_turning = threading.Lock()
_replaced: dict[str, type] = {}  # Transformers' own quantizers, while ours are in their place


class BitsAndBytesHfQuantizer(BnbOpsHfQuantizer):
    """The quantizer for a `BitsAndBytesConfig`, which stays the model's, and is saved with it."""

    def _options(self, quantization_config: BitsAndBytesConfig) -> BnbOpsConfig:
        config = quantization_config
        if config.llm_int8_has_fp16_weight:
            raise ValueError("llm_int8_has_fp16_weight is not supported: int8 weights are frozen")
        if config.llm_int8_enable_fp32_cpu_offload:
            raise ValueError(
                "llm_int8_enable_fp32_cpu_offload is not supported: quantized layers work on CPUs, too, so leave it out"
            )
        if config.load_in_8bit:
            return BnbOpsConfig("int8", threshold=config.llm_int8_threshold, experts=False)
        return BnbOpsConfig(
            config.bnb_4bit_quant_type,
            double_quant=config.bnb_4bit_use_double_quant,
            compute_dtype=config.bnb_4bit_compute_dtype,
            quant_storage=config.bnb_4bit_quant_storage,
            experts=False,
        )

    def _rule(self, model: nn.Module) -> Reason:
        """What bitsandbytes' quantizer leaves."""
        names = self.get_modules_to_not_convert(
            model, self.quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )

        def reason(place: Place) -> str | None:
            return None if should_convert_module(place.path, names) else "it is the output head, or to be skipped"

        return reason

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        model.quantization_method = METHOD  # for bitsandbytes' Transformers refuses casts, and moves of 8-bit models
        return model


def load_bitsandbytes_checkpoints(enable: bool = True) -> None:
    """From now on, in this process, bnbops loads what config.json calls a bitsandbytes checkpoint.

    Such a checkpoint has the same names and bytes, so bitsandbytes is not needed. The model keeps its
    `BitsAndBytesConfig`, and `save_pretrained` writes a checkpoint that bitsandbytes reads. A `BitsAndBytesConfig` that
    is passed to `from_pretrained` quantizes with bnbops, too.

    Args:
        enable: False undoes it. Models that are loaded stay as they are.
    """
    with _turning:
        for method in _METHODS:
            if enable and AUTO_QUANTIZER_MAPPING[method] is not BitsAndBytesHfQuantizer:
                _replaced[method] = AUTO_QUANTIZER_MAPPING[method]
                AUTO_QUANTIZER_MAPPING[method] = BitsAndBytesHfQuantizer
            elif not enable and AUTO_QUANTIZER_MAPPING[method] is BitsAndBytesHfQuantizer:
                AUTO_QUANTIZER_MAPPING[method] = _replaced.pop(method)
