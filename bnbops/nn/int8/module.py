"""What modules with an int8 weight share: its scales, casts and state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnbops.dtensors import is_dtensor
from bnbops.functional.quant_state import NO_NUMBERS
from bnbops.nn.four_bit.entries import take_statistics
from bnbops.nn.int8.parameter import Int8Params, quantize_rows
from bnbops.nn.weights.module import QuantizedModule
from bnbops.nn.weights.numbers import are_scales, from_bits, to_bits
from bnbops.nn.weights.tied import hold, others
from bnbops.tracing import traceable_weight


class Int8Module(QuantizedModule):
    """A module with an int8 `weight` and, as a parameter of its own, `weight_scale`: the scales of its rows.

    `weight_scale` holds the bits of the fp32 scales as int32, so that no cast changes them; it is None before
    quantization. The entries of a state dict are "weight", "SCB" and "weight_format".
    """

    _scale_names = ("weight_scale",)
    weight: nn.Parameter
    weight_scale: nn.Parameter | None

    def _hold(self, has_fp16_weights: bool) -> None:
        """Makes the float weight an Int8Params, unless it is to be trained: torch.compile does not trace gradients of
        parameters that have a class of their own."""
        self.has_fp16_weights = has_fp16_weights
        self._shape = tuple(self.weight.shape)
        self.register_parameter("weight_scale", None)
        if has_fp16_weights:
            self.weight.has_fp16_weights = True  # Transformers makes an Int8Params with the attributes of this one
        else:
            self.weight = Int8Params(self.weight.data, requires_grad=False)

    @property
    def is_quantized(self) -> bool:
        return self.weight.dtype == torch.int8

    def _dequantized(self, dtype: torch.dtype | None) -> Tensor:
        weight = torch.ops.bnbops.int8_vectorwise_dequant(*self._quantized_weight())
        return weight if dtype is None else weight.to(dtype)

    def _requantized(self, weight: Tensor) -> Int8Params:
        return Int8Params(weight, requires_grad=False).to(self.weight.device)

    @staticmethod
    def _scales_of(weight: Tensor, scale: Tensor | None) -> Tensor | None:
        """Of the weight that this module holds beside `scale`, in the form that the operators take; None before
        quantization."""
        if weight.dtype != torch.int8:
            return None
        carried = getattr(weight, "_scales", scale)  # plain tensors carry none
        if scale is None or carried is None or carried.dtype != torch.int32:
            return carried  # of a weight that was put into `_parameters`, past this module
        return scale

    @property
    def SCB(self) -> Tensor | None:
        """The fp32 scales `[rows]`; None before quantization."""
        weight, scale = self._held()
        scales = self._scales_of(traceable_weight(weight), scale)
        return None if scales is None else from_bits(scales.detach())

    @property
    def weight_format(self) -> Tensor:
        """bitsandbytes' number for codes that lie in memory row by row."""
        return torch.tensor(0, dtype=torch.uint8, device="cpu")

    def _quantized_weight(self) -> tuple[Tensor, Tensor]:
        """The int8 codes and their scales, fp32 or its bits; RuntimeError if the weight is not quantized."""
        weight, scale = self._held()
        weight = traceable_weight(weight)
        scales = self._scales_of(weight, scale)
        if weight.dtype != torch.int8:
            raise RuntimeError(
                f"the weight of this {type(self).__name__} is not quantized: load it, then move the module with "
                '.to(device), where "cpu" counts, too, and shard it, if at all, only then'
            )
        if scales is None:
            raise RuntimeError(f"the int8 weight of this {type(self).__name__} has no scales; set weight.SCB")
        return weight, scales

    def _accepted(self, param: nn.Parameter | None) -> nn.Parameter | None:
        if isinstance(param, Int8Params) and param.SCB is not None and len(param) != param.SCB.numel():
            raise ValueError(f"the weight has {len(param)} rows, but its SCB has {param.SCB.numel()} scales")
        if isinstance(self._parameters.get("weight"), Int8Params) and type(param) in (nn.Parameter, Int8Params):
            self._check_size(param.shape, "weight" if param.is_floating_point() else "quantized weight")
        return param

    def _adopt(self, weight: nn.Parameter | None) -> None:
        if isinstance(weight, Int8Params):
            self.weight_scale = None
            self._adopt_scales()

    def _adopt_scales(self) -> None:
        """Makes scales that the weight brought along this module's parameter, and the weight show that one."""
        weight = self._parameters["weight"]
        if not isinstance(weight, Int8Params):
            return  # FSDP, for one, puts tensors of its own there
        hold(weight, self)
        scales = weight._scales
        if scales is None or scales.dtype != torch.int32:
            self.weight_scale = None if scales is None else nn.Parameter(to_bits(scales).view(-1), requires_grad=False)
            for other in others(weight, self):
                other.weight_scale = self.weight_scale
        elif self.weight_scale is None:
            self.weight_scale = scales
        weight._scales = self.weight_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if type(self.weight) is nn.Parameter and self.weight.is_floating_point() and not self.has_fp16_weights:
            self.weight = Int8Params(self.weight.data, False)  # a float weight that was assigned, to be quantized
        self._adopt_scales()
        super()._apply(fn, recurse)
        if isinstance(self.weight, Int8Params) and self.weight_scale is not None:
            self.weight._scales = self.weight_scale  # as torch has converted them
        self._adopt_scales()
        return self

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def _is_whole(self) -> bool:
        return self.weight_scale is None or not is_dtensor(self.weight_scale)

    def _entries(self, key: str, keep_vars: bool) -> dict[str, Tensor]:
        """Scales are a copy beside an Int8Params, which has them as int32: torch.save refuses memory of two dtypes."""
        prefix, scales = key.removesuffix("weight"), self.SCB
        if scales is None:
            return {}
        return {prefix + "SCB": scales.clone() if keep_vars else scales, prefix + "weight_format": self.weight_format}

    def _entries_again(self, key: str, first: str, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """Copies: Transformers refuses tensors that share memory, but for the ones that it ties."""
        return self._entries(key, keep_vars=True)

    def _take(
        self, state_dict: dict[str, Any], key: str, assign: bool, missing_keys: list[str]
    ) -> tuple[Int8Params | None, list[str] | None]:
        self._adopt_scales()
        prefix = key.removesuffix("weight")
        weight, scales = take_entries(state_dict, prefix)
        bits = state_dict.get(key + "_scale")
        if weight is None:
            tied = isinstance(self.weight, Int8Params) and others(self.weight, self)
            if scales is not None and not tied:
                raise ValueError(f"{prefix}SCB came without {key}, whose scales they are")
            if self.weight_scale is None:
                return None, None
            # Of a tied weight, savers of duplicates may have left it out.
            return None, [key, *([] if tied or bits is not None else [prefix + "SCB"])]
        if sharded := is_dtensor(self.weight) and not self.has_fp16_weights:
            self._check_own_names(key, weight, weight.dtype == torch.int8, bits is None or scales is not None)
        if scales is None and bits is not None and (weight.dtype == torch.int8 or not self.is_quantized):
            scales = from_bits(bits)
        if weight.shape != self.weight.shape:
            shapes = f"{list(weight.shape)} in the state dict, {list(self.weight.shape)} in the module"
            raise ValueError(f"size mismatch for {key}: {shapes}")
        if weight.is_floating_point() and scales is None and not self.is_quantized:
            return None, None
        weight, scales = self._checked(key, weight, scales)
        if sharded:
            return None, None
        state_dict.pop(key), state_dict.pop(key + "_scale", None)
        device = self._device_for(assign)
        return Int8Params(weight.to(device), SCB=scales.view(-1).to(device)), []

    def _checked(self, key: str, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales that this module can take. Floats are quantized."""
        name, into = key.removesuffix("weight") + "SCB", ""
        if not self.is_quantized:
            into = f"Loading a quantized checkpoint into non-quantized {type(self).__name__}: "
        if weight.is_floating_point() and scales is None:
            try:
                weight, scales = quantize_rows(weight)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        if weight.dtype != torch.int8 or scales is None:
            found = f"{weight.dtype} {'without' if scales is None else 'with'} SCB"
            raise ValueError(
                f"{into}{key} must be int8 with its scales in {name}, or a float tensor alone; it is {found}"
                + ("" if scales is None else f"; {NO_NUMBERS}")
            )
        check_scales(scales, weight.shape[0], name)
        if self.has_fp16_weights and into:
            raise ValueError(
                f"{into}{key} is int8, but the module is to train a float weight: has_fp16_weights must be False"
            )
        return weight, scales

    def _loaded_by_torch(self, before: nn.Parameter) -> None:
        """Makes the weight an Int8Params again, where torch replaced it by a plain parameter."""
        weight = self.weight
        if isinstance(before, Int8Params) and type(weight) is nn.Parameter:
            self.weight = Int8Params(weight.data, weight.requires_grad, before.has_fp16_weights)
            self.weight.grad = weight.grad

    def _has_format_of(self, new: Int8Params) -> bool:
        return self.is_quantized


def take_entries(state_dict: dict[str, Any], prefix: str) -> tuple[Tensor | None, Tensor | None]:
    """The weight, and its scales, which are removed from the dict; ValueError for entries that are no tensors, of
    another layout or of a 4-bit weight."""
    key = prefix + "weight"
    weight, scales = state_dict.get(key), state_dict.pop(prefix + "SCB", None)
    layout = state_dict.pop(prefix + "weight_format", "row")
    layout = layout.tolist() if isinstance(layout, Tensor) else layout
    if layout not in (0, [0], "row"):
        raise ValueError(f"{key}_format is {layout}; only weights by rows (0) can be loaded")
    if take_statistics(state_dict, key):
        raise ValueError(f"{key} is quantized to 4 bits, which a Linear4bit or an Embedding4bit loads")
    for name, value in ((key, weight), (f"{prefix}SCB", scales)):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    return weight, scales


def check_scales(scales: Tensor, rows: int, name: str = "SCB") -> None:
    """Refuses what cannot be the scales of a weight with so many rows, by a ValueError that says why."""
    if scales.numel() != rows:
        raise ValueError(f"{name} has {scales.numel()} scales, but the weight has {rows} rows")
    if not scales.is_floating_point():
        raise ValueError(f"{name} is {scales.dtype}, expected float scales")
    if not are_scales(scales):
        raise ValueError(f"{name} has scales that are negative, infinite or NaN")
