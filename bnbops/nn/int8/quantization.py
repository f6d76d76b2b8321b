"""int8 weights: what `quantize_` makes, and what a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from bnbops.functional.int8 import quantize_weight
from bnbops.nn.int8.module import check_scales, take_entries
from bnbops.nn.int8.parameter import Int8Params
from bnbops.nn.layers.embedding_8bit import Embedding8bit
from bnbops.nn.layers.linear_8bit import Linear8bitLt
from bnbops.nn.weights.memory import as_float16
from bnbops.nn.weights.numbers import to_bits
from bnbops.nn.weights.quantization import Quantization


class QuantizationInt8(Quantization):
    formats = ("int8",)
    bits = 8
    becomes: ClassVar = {"linear": "Linear8bitLt", "embedding": "Embedding8bit"}
    bytes_per_element = 1.0

    @staticmethod
    def keys(key: str) -> list[str]:
        prefix = key.removesuffix("weight")
        return [prefix + "SCB", prefix + "weight_format"]

    @staticmethod
    def format_of(statistics: Mapping[str, Tensor]) -> str | None:
        return "int8" if "SCB" in statistics else None

    @staticmethod
    def registered(key: str, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        return to_bits(read(key.removesuffix("weight") + "SCB")).view(-1) if name == "scale" else None

    def check(self) -> None:
        others = [field for field in fields(self) if field.name not in ("quant", "threshold")]
        if extra := [field.name for field in others if getattr(self, field.name) != field.default]:
            raise ValueError(
                f"{', '.join(extra)}: not for int8, which has one scale a row and no options but threshold"
            )
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative or NaN, got {self.threshold}")
        super().check()

    def largest(self, dtype: torch.dtype) -> float:
        """The weight goes by way of fp16."""
        return torch.finfo(torch.float16).max

    def parameter(self, data: Tensor) -> Int8Params:
        codes, scales = quantize_weight(as_float16(data).contiguous())
        return Int8Params(codes, requires_grad=False, SCB=scales)

    def loaded(
        self, data: Tensor, statistics: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> tuple[Int8Params, QuantizationInt8]:
        _, scales = take_entries({**statistics}, "")
        if data.dtype != torch.int8 or tuple(data.shape) != shape:
            raise ValueError(f"expected int8 codes {list(shape)}, got {data.dtype} {list(data.shape)}")
        check_scales(scales, shape[0])
        return Int8Params(data, requires_grad=False, SCB=scales.to(data.device)), self

    def linear(self, columns: int, rows: int) -> nn.Linear:
        return Linear8bitLt(columns, rows, False, has_fp16_weights=False, threshold=self.threshold, device="meta")

    def embedding(self, old: nn.Embedding) -> nn.Embedding:
        return Embedding8bit(old.num_embeddings, old.embedding_dim, dtype=old.weight.dtype, device="meta")
