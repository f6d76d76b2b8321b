"""The options of quantization, and what they make of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnbops.functional.products_int8 import quantize_weight
from bnbops.nn.convert.plan import FORMATS, Place
from bnbops.nn.convert.sources import as_float16
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.four_bit.scales import check_settings
from bnbops.nn.int8.parameter import Int8Params
from bnbops.nn.layers.embedding_4bit import Embedding4bit
from bnbops.nn.layers.embedding_8bit import Embedding8bit
from bnbops.nn.layers.linear_4bit import Linear4bit
from bnbops.nn.layers.linear_8bit import Linear8bitLt
from bnbops.nn.weights.finite import is_within


def logical_shape(place: Place) -> Sequence[int]:
    """The weight's shape as a quantized layer has it: `[out, in]`."""
    return place.tensor.shape[::-1] if place.transposed else place.tensor.shape


@dataclass(frozen=True)
class QuantizationFormat:
    """The options of `quantize_`, and the layers that they make."""

    quant: str
    double_quant: bool
    blocksize: int
    compute_dtype: torch.dtype | None
    quant_storage: torch.dtype
    threshold: float

    def check(self) -> None:
        """Refuses options that do not exist, or not together. The constructor of a layer knows the rules.

        Raises:
            ValueError: it says which.
        """
        if self.quant not in FORMATS:
            raise ValueError(f"quant must be one of {', '.join(FORMATS)}, got {self.quant!r}")
        if self.quant == "int8":
            fours = {"double_quant": True, "blocksize": 64, "compute_dtype": None, "quant_storage": torch.uint8}
            if extra := [name for name, default in fours.items() if getattr(self, name) != default]:
                raise ValueError(
                    f"{', '.join(extra)}: not for int8, which has one scale a row and no options but threshold"
                )
            if not self.threshold >= 0:
                raise ValueError(f"threshold must not be negative or NaN, got {self.threshold}")
        elif self.threshold != 6.0:
            raise ValueError(f"threshold is an option of int8, not of {self.quant}")
        self.linear(64, 64)

    def check_weight(self, place: Place) -> None:
        """The rules that depend on its size."""
        if self.quant != "int8":
            try:
                check_settings(logical_shape(place), self.blocksize, self.quant, self.quant_storage)
            except ValueError as error:
                raise ValueError(f"{place.name} cannot be quantized: {error}") from None

    def check_values(self, name: str, weight: Tensor) -> None:
        """Quantization would make something else of NaN and infinity, and int8 goes by way of fp16."""
        limit = torch.finfo(torch.float16 if self.quant == "int8" else weight.dtype).max
        if not is_within(weight, limit):
            raise ValueError(f"{name} has a value that is NaN, infinite or beyond {limit:g}, so it cannot be quantized")

    def parameter(self, data: Tensor) -> nn.Parameter:
        """The quantized weight."""
        if self.quant != "int8":
            weight = Params4bit(
                data,
                blocksize=self.blocksize,
                compress_statistics=self.double_quant,
                quant_type=self.quant,
                quant_storage=self.quant_storage,
            )
            return weight._quantize_on(data.device)  # also on the meta device, where .to() does not
        codes, scales = quantize_weight(as_float16(data).contiguous())
        return Int8Params(codes, requires_grad=False, SCB=scales)

    def layer(self, place: Place) -> nn.Module:
        """What replaces the module, on the meta device, without weight and bias."""
        if place.kind == "embedding":
            return self.embedding(place.module)
        rows, columns = logical_shape(place)
        return self.linear(columns, rows)

    def linear(self, columns: int, rows: int) -> nn.Linear:
        sizes = columns, rows, False
        if self.quant == "int8":
            return Linear8bitLt(*sizes, has_fp16_weights=False, threshold=self.threshold, device="meta")
        compressed = {"compress_statistics": self.double_quant, "blocksize": self.blocksize}
        return Linear4bit(
            *sizes,
            compute_dtype=self.compute_dtype,
            quant_type=self.quant,
            quant_storage=self.quant_storage,
            device="meta",
            **compressed,
        )

    def embedding(self, old: nn.Embedding) -> nn.Embedding:
        sizes, kept = (old.num_embeddings, old.embedding_dim), {"dtype": old.weight.dtype, "device": "meta"}
        if self.quant == "int8":
            return Embedding8bit(*sizes, **kept)
        return Embedding4bit(
            *sizes,
            quant_type=self.quant,
            quant_storage=self.quant_storage,
            padding_idx=old.padding_idx,
            compress_statistics=self.double_quant,
            blocksize=self.blocksize,
            **kept,
        )
