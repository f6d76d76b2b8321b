"""What a kind of quantized weights offers to `quantize_` and to who loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bnbops.nn.convert.places import Place
from bnbops.nn.weights.numbers import is_within


@dataclass(frozen=True)
class Quantization:
    """The options of `quantize_`, and what they make of a weight. Each kind of weights has a subclass; its row is in
    `bnbops.nn.kinds`. It defines:

    bytes_per_element: of a weight with its scales.
    parameter(data): the quantized weight.
    linear(columns, rows), embedding(old): layers on the meta device, without a bias.
    parametrize(module, name, parameter): puts a weight in the place of an expert parameter, if the kind has a form.
    loaded(data, statistics, shape): the quantized weight of a state dict, and the options that its layers are to be
        made by; ValueError for entries that are not those of a weight of this shape.
    keys(key): what a state dict may have of the weight `key` beside the codes.
    format_of(statistics): the format of codes that come with these, by their keys without that of the weight, or None.
    registered(key, name, read): a tensor that the module of the weight `key` registers as `weight_<name>`, or None;
        `read` gives an entry by its key, or raises KeyError.
    """

    quant: str
    double_quant: bool = True
    blocksize: int = 64
    compute_dtype: torch.dtype | None = None
    quant_storage: torch.dtype = torch.uint8
    threshold: float = 6.0

    formats: ClassVar[tuple[str, ...]]  # what `quant` may be
    bits: ClassVar[int]
    becomes: ClassVar[Mapping[str, str]]  # what a "linear", an "embedding" and perhaps an "expert" becomes, in words

    def check(self) -> None:
        """Refuses, by a ValueError, options that do not exist, or not together. Layers' constructors know the rules."""
        self.linear(64, 64)

    def check_weight(self, place: Place) -> None:
        """The rules that depend on its size."""

    def largest(self, dtype: torch.dtype) -> float:
        """The largest magnitude in a weight of this dtype that can be quantized."""
        return torch.finfo(dtype).max

    def check_values(self, name: str, weight: Tensor) -> None:
        """Quantization would make something else of NaN and infinity."""
        limit = self.largest(weight.dtype)
        if not is_within(weight, limit):
            raise ValueError(f"{name} has a value that is NaN, infinite or beyond {limit:g}, so it cannot be quantized")

    def layer(self, place: Place) -> nn.Module:
        """What replaces the module, on the meta device, without weight and bias."""
        if place.kind == "embedding":
            return self.embedding(place.module)
        rows, columns = place.shape
        return self.linear(columns, rows)
