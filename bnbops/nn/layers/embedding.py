"""Embeddings whose weight gets 32-bit optimizer states, also from an 8-bit optimizer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bnbops.optim.core.manager import GlobalOptimManager


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` with a Xavier uniform start and 32-bit optimizer states.

    A row of an embedding is seldom touched, and its gradients differ in size by orders of magnitude between frequent
    and rare tokens, which 8-bit states bear badly (Dettmers et al. 2022, section 2.3). The optimizer that is given the
    weight keeps its state in 32 bits, whatever its `optim_bits`; the same goes for copies and unpickled ones.

    The arguments are `torch.nn.Embedding`'s. bnbops' optimizers refuse `sparse` gradients.

    Shape: indices `[*]`, int32 or int64, to `[*, embedding_dim]` in the weight's dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        _freeze: bool = False,
    ) -> None:
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse),
            *(_weight, _freeze, device, dtype),
        )
        self._keep_states_in_32_bits()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_states_in_32_bits()  # copies and unpickled modules have not been through __init__

    def _keep_states_in_32_bits(self) -> None:
        GlobalOptimManager.get_instance().add_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Draws the weight from the Xavier uniform distribution (Glorot & Bengio 2010); the padding row is zeros."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` followed by a layer norm (Dettmers et al. 2022, section 2.3).

    The arguments and shapes are `Embedding`'s. The norm, `norm`, computes in fp32 or more unless the module itself is
    cast to less; the output has the weight's dtype.
    """

    @functools.wraps(Embedding.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        norm_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.norm = nn.LayerNorm(self.embedding_dim, device=self.weight.device, dtype=norm_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The normalized rows of the indices."""
        rows = super().forward(input)
        return self.norm(rows.to(self.norm.weight.dtype)).to(rows.dtype)
