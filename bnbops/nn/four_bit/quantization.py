"""4-bit weights: what `quantize_` makes, and what a checkpoint has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from bnbops.facts import FORMATS_4BIT
from bnbops.functional.quant_state import PACKED, QuantState
from bnbops.nn.convert.places import Place
from bnbops.nn.four_bit.entries import STATISTICS, weight_of
from bnbops.nn.four_bit.format import NAMES, check_settings, tensors_of
from bnbops.nn.four_bit.parameter import SETTINGS, Params4bit
from bnbops.nn.layers.embedding_4bit import Embedding4bit
from bnbops.nn.layers.linear_4bit import Linear4bit
from bnbops.nn.parametrize import parametrize_4bit
from bnbops.nn.weights.quantization import Quantization


class Quantization4bit(Quantization):
    formats = FORMATS_4BIT
    bits = 4
    becomes: ClassVar = {"linear": "Linear4bit", "embedding": "Embedding4bit", "expert": "a 4-bit parametrization"}

    parametrize = staticmethod(parametrize_4bit)

    @staticmethod
    def keys(key: str) -> list[str]:
        return [f"{key}.{name}" for name in STATISTICS]

    @staticmethod
    def registered(key: str, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        if name not in NAMES:
            return None
        found = {}
        for each in STATISTICS:
            with contextlib.suppress(KeyError):
                found[each] = read(f"{key}.{each}")
        if not found:
            raise KeyError(key)
        return tensors_of(QuantState.from_dict(found, device="cpu"))[name]

    @staticmethod
    def format_of(statistics: Mapping[str, Tensor]) -> str | None:
        return next((name.removeprefix(PACKED) for name in statistics if name.startswith(PACKED)), None)

    def check(self) -> None:
        if self.threshold != 6.0:
            raise ValueError(f"threshold is an option of int8, not of {self.quant}")
        super().check()

    def check_weight(self, place: Place) -> None:
        try:
            check_settings(place.shape, self.blocksize, self.quant, self.quant_storage)
        except ValueError as error:
            raise ValueError(f"{place.name} cannot be quantized: {error}") from None

    @property
    def bytes_per_element(self) -> float:
        return 0.5 + (1 if self.double_quant else 4) / self.blocksize

    @property
    def _settings(self) -> dict[str, object]:
        own = (self.blocksize, self.double_quant, self.quant, self.quant_storage)
        return dict(zip(SETTINGS, own, strict=True))

    def parameter(self, data: Tensor) -> Params4bit:
        return Params4bit(data, **self._settings)._quantize_on(data.device)  # also on meta, where .to() does not

    def loaded(
        self, data: Tensor, statistics: Mapping[str, Tensor], shape: tuple[int, ...]
    ) -> tuple[Params4bit, Quantization4bit]:
        weight = weight_of(data, statistics, shape)
        state = weight.quant_state
        stored = {"double_quant": state.nested, "blocksize": state.blocksize, "quant_storage": weight.quant_storage}
        return weight, replace(self, **stored)

    def linear(self, columns: int, rows: int) -> nn.Linear:
        return Linear4bit(columns, rows, False, compute_dtype=self.compute_dtype, device="meta", **self._settings)

    def embedding(self, old: nn.Embedding) -> nn.Embedding:
        kept = {"padding_idx": old.padding_idx, "dtype": old.weight.dtype, "device": "meta"}
        return Embedding4bit(old.num_embeddings, old.embedding_dim, **kept, **self._settings)
