"""Embeddings with a frozen table of 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbops.functional.four_bit import of_type
from bnbops.nn.four_bit.module import Module4bit
from bnbops.nn.layers.frozen_table import FrozenTable
from bnbops.nn.weights.codes import codes_as_they_are


class Embedding4bit(Module4bit, FrozenTable):
    """`torch.nn.Embedding` whose weight `.to(device)` quantizes to 4 bits.

    Rows are looked up and dequantized one by one, never the whole table; any `embedding_dim` serves. Everything else
    is as in `Linear4bit`, the state dict, too.

    Args:
        num_embeddings: number of rows.
        embedding_dim: size of a row.
        dtype: of the float weight, and of the output.
        quant_type, quant_storage, compress_statistics, blocksize: as for `Linear4bit`.
        device: of the float weight; nothing is quantized yet.
        padding_idx: a row that starts as zeros; they stay zeros, exactly, when quantized.

    Shape: indices `[*]`, int32 or int64, to `[*, embedding_dim]`.

    Raises:
        ValueError: a quant_type, quant_storage or blocksize that does not exist.
        RuntimeError: in `forward`, before quantization, or from the operator `embedding_4bit`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        padding_idx: int | None = None,
        compress_statistics: bool = False,
        blocksize: int = 64,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._make_4bit(blocksize, compress_statistics, quant_type, quant_storage)

    def forward(self, input: Tensor) -> Tensor:
        """The dequantized rows of the indices."""
        with codes_as_they_are():
            weight = self._arguments()
            if input.is_nested:
                return self._over_nested(input)
            return torch.ops.bnbops.embedding_4bit(input, dtype=self.dtype, **weight)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with `quant_type="fp4"`."""

    __init__ = of_type(Embedding4bit.__init__, "fp4")


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with `quant_type="nf4"`."""

    __init__ = of_type(Embedding4bit.__init__, "nf4")
