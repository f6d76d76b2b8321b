"""Lion (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonKeywords
from bnbops.optim.core.precision import declared, variant


class Lion(Optimizer):
    """Lion: the sign of an average of gradients, with decoupled weight decay.

    Every element moves by `lr`, so rates are 3 to 10 times smaller than Adam's, and decays as many times larger.

    Args:
        params, lr, optim_bits, args, min_8bit_size, is_paged, keywords: see `Optimizer`.
        betas: decay rates of the average in the step, and of the average that is kept; also as a string.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
    """

    _rules = (RULES["lion"],)

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] | str = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        **keywords: Unpack[CommonKeywords],
    ) -> None: ...


Lion8bit = variant(Lion, bits=8, without=("optim_bits",))
Lion32bit = variant(Lion, bits=32, without=("optim_bits",))
PagedLion = variant(Lion, paged=True, without=("is_paged",))
PagedLion8bit = variant(Lion, bits=8, paged=True, without=("optim_bits", "is_paged"))
PagedLion32bit = variant(Lion, bits=32, paged=True, without=("optim_bits", "is_paged"))
