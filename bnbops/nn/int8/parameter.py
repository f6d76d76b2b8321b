"""Int8Params: a weight that becomes int8, with a scale for each row, when it is moved to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from bnbops.functional.int8 import quantize_weight
from bnbops.lasting import lasting
from bnbops.nn.weights.memory import as_float16, give_back
from bnbops.nn.weights.numbers import from_bits, is_finite, to_bits
from bnbops.nn.weights.parameter import QuantizedParameter


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and fp32 scales of a float weight, rounded to float16 before; ValueError if that cannot be."""
    weight = weight.detach()
    if weight.is_cpu:
        give_back(weight.nbytes)  # of the weights before this one
    rounded = as_float16(weight)
    if not is_finite(rounded):
        raise ValueError(
            "the weight has a value that float16 cannot hold (NaN, infinite or beyond 65504 in magnitude); 8-bit "
            "weights are rounded to float16 before they are quantized"
        )
    return quantize_weight(rounded)


class Int8Params(QuantizedParameter):
    """A weight `[rows, columns]` that its first `.to(device)`, `.cuda()` or `.cpu()` quantizes to int8, in place.

    The scale of a row is its largest magnitude, and a code c stands for `c * scale / 127` (LLM.int8, arXiv:2208.07339,
    section 2). As in bitsandbytes the weight is rounded to float16 before.

    Args:
        data: a float weight, or int8 codes; empty by default.
        requires_grad: whether a float weight needs a gradient; int8 codes never do.
        has_fp16_weights: the weight stays a float one, which its module quantizes in each forward.
        CB: ignored; the codes are the data.
        SCB: fp32 scales `[rows]` of int8 data; ignored for float data.

    Other keyword arguments are ignored: `Int8Params(data, **other.__dict__)` works.
    """

    has_fp16_weights: bool
    _scales: Tensor | None  # fp32; or int32 bits: `weight_scale` of the module that holds this weight

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.has_fp16_weights = has_fp16_weights
        scales = kwargs.get("_scales", getattr(data, "_scales", None)) if SCB is None else SCB
        self.SCB = scales if data.dtype == torch.int8 else None
        return self

    _scaled = True
    _values_by = "bnbops.functional.int8_vectorwise_dequant(weight.data, weight.SCB)"

    @property
    def _holds_codes(self) -> bool:
        return self.dtype == torch.int8

    def _values(self, dtype: torch.dtype | None) -> Tensor:
        if self.SCB is None:
            raise RuntimeError("this Int8Params holds codes, but has no scales: set its SCB")
        floats = torch.ops.bnbops.int8_vectorwise_dequant(self.data, self.SCB)
        return floats if dtype is None else floats.to(dtype)

    @property
    def CB(self) -> Tensor | None:
        """The int8 codes, or None before quantization."""
        return self.data if self.dtype == torch.int8 else None

    @CB.setter
    def CB(self, codes: Tensor | None) -> None:
        if codes is not None:
            self.data = codes

    @property
    def SCB(self) -> Tensor | None:
        """fp32 scales `[rows]`, or None before quantization."""
        return None if self._scales is None else from_bits(self._scales.detach())

    @SCB.setter
    def SCB(self, scales: Tensor | None) -> None:
        self._scales = None if scales is None else from_bits(scales.detach())

    @property
    def _quantizes(self) -> bool:
        return not self._holds_codes and not self.has_fp16_weights

    def _quantize_on(self, device: torch.device) -> Int8Params:
        with lasting(self):
            codes, scales = quantize_rows(self.detach().to(device))
            self._become(type(self)(codes, SCB=scales))
        return self

    def _with(self, data: Tensor, copy: bool = False) -> Int8Params:
        scales = self.SCB
        if scales is not None and not scales.is_meta:
            scales = scales.to(data.device, copy=copy)
        return type(self)(data, self.requires_grad, self.has_fp16_weights, SCB=scales)

    def _scale_tensors(self) -> dict[str, Tensor]:
        return {} if self.SCB is None else {"scale": to_bits(self.SCB).view(-1)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        rebuild, arguments = self.__reduce_ex__(2)
        return rebuild(*copy.deepcopy(arguments, memo))

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.data, self.requires_grad, self.has_fp16_weights, self._scales)


def _rebuild(cls: type, data: Tensor, requires_grad: bool, has_fp16_weights: bool, scales: Tensor | None) -> Int8Params:
    self = cls(data, requires_grad, has_fp16_weights)
    self._scales = scales  # in a copy of a module it is the copy of `weight_scale`
    return self


torch.serialization.add_safe_globals([Int8Params, _rebuild])  # they run no code of a file
