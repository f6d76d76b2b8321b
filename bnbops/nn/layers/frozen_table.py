"""Embeddings whose table is quantized, and so frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FrozenTable(nn.Embedding):
    """What the quantized embeddings make of `nn.Embedding.from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **options: Any,
    ) -> FrozenTable:
        """An embedding of a float table, to be quantized by `.to(device)`.

        Args:
            embeddings: `[num_embeddings, embedding_dim]`.
            freeze: must be True.
            padding_idx: as in torch.
            max_norm: must be None: it changes rows that are looked up.
            norm_type, scale_grad_by_freq, sparse: of no consequence; they are about max_norm and gradients.

        Other keyword arguments are the constructor's, such as `quant_type`.

        Raises:
            ValueError: another number of dimensions, `freeze=False` or a `max_norm`.
        """
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must have 2 dimensions, got shape {list(embeddings.shape)}")
        if not freeze or max_norm is not None:
            what = "freeze=False" if not freeze else f"max_norm={max_norm}"
            raise ValueError(
                f"{what}: the table of an {cls.__name__} is quantized, so it never changes; use nn.Embedding"
            )
        module = cls(*embeddings.shape, dtype=embeddings.dtype, device="meta", **options)
        module.padding_idx = padding_idx
        module.weight = nn.Parameter(embeddings, requires_grad=False)
        return module
