"""Signum (Bernstein et al. 2018, algorithm 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged
from bnbops.optim.core.precision import declared, variant


class Signum(Optimizer):
    """Signum: the sign of a running average of gradients, with decoupled weight decay. One state a parameter.

    Every element moves by `lr`, as in `Lion`, which steps along another average than it keeps. Tiger (Su 2023) is
    Signum with a `momentum` of 0.945 to 0.965.

    Args:
        params, lr, optim_bits, args, min_8bit_size, keywords: see `Optimizer`.
        momentum: what remains of the average in a step.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
    """

    _rules = (RULES["signum"],)

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        **keywords: Unpack[CommonAndPaged],
    ) -> None: ...


Signum8bit = variant(Signum, bits=8, without=("optim_bits",))
Signum32bit = variant(Signum, bits=32, without=("optim_bits",))
