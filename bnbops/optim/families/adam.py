"""Adam (Kingma & Ba 2015, algorithm 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonKeywords
from bnbops.optim.core.precision import declared, variant


class Adam(Optimizer):
    """Adam with 32-bit or 8-bit states (`optim_bits`).

    Weight decay is decoupled, as in AdamW and in bitsandbytes' Adam; torch.optim.Adam adds it to the gradient.

    Args:
        params, lr, optim_bits, args, min_8bit_size, is_paged, keywords: see `Optimizer`.
        betas: decay rates of the averages of gradient and squared gradient; also as a string, "(0.9, 0.999)".
        eps: added to the denominator.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
        amsgrad: must be False.
    """

    _rules = (RULES["adam"],)

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        **keywords: Unpack[CommonKeywords],
    ) -> None: ...


Adam8bit = variant(Adam, bits=8)
Adam32bit = variant(Adam, bits=32)
PagedAdam = variant(Adam, paged=True)
PagedAdam8bit = variant(Adam, bits=8, paged=True)
PagedAdam32bit = variant(Adam, bits=32, paged=True)
