"""AdamW (Loshchilov & Hutter 2019, algorithm 2): Adam's operator with another default."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonKeywords
from bnbops.optim.core.precision import declared, variant
from bnbops.optim.families.adam import Adam


class AdamW(Adam):
    """`Adam` with weight_decay = 0.01 by default; the arguments are the same."""

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        **keywords: Unpack[CommonKeywords],
    ) -> None: ...


AdamW8bit = variant(AdamW, bits=8)
AdamW32bit = variant(AdamW, bits=32)
PagedAdamW = variant(AdamW, paged=True, without=("is_paged",))
PagedAdamW8bit = variant(AdamW, bits=8, paged=True, without=("is_paged",))
PagedAdamW32bit = variant(AdamW, bits=32, paged=True, without=("is_paged",))
