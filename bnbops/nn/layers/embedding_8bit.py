"""Embeddings with int8 rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bnbops.nn.int8.module import Int8Module
from bnbops.nn.layers.frozen_table import FrozenTable
from bnbops.nn.weights.codes import codes_as_they_are


class Embedding8bit(Int8Module, FrozenTable):
    """`torch.nn.Embedding` with int8 rows, each with a scale of its own; only the rows looked up are dequantized.

    The weight is quantized by the first `.to(device)` ("cpu" counts) and frozen.

    Args:
        num_embeddings: number of rows.
        embedding_dim: size of a row.
        device: of the float weight.
        dtype: of the float weight and of the output. Casts of the module change the output's, as they change that of a
            float embedding.

    Shape: indices `[*]`, int32 or int64, to `[*, embedding_dim]`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._hold(has_fp16_weights=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding8bit:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        """The dequantized rows of the indices.

        Raises:
            RuntimeError: the weight is not quantized.
        """
        with codes_as_they_are():
            weight, scales = self._quantized_weight()
            if input.is_nested:
                return self._over_nested(input)
            rows = F.embedding(input, weight)
        stats = F.embedding(input, scales.unsqueeze(1))
        return torch.ops.bnbops.int8_vectorwise_dequant(rows, stats.flatten()).to(self.dtype)
