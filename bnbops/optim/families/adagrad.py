"""Adagrad (Duchi, Hazan & Singer 2011; torch.optim.Adagrad)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged, non_negative
from bnbops.optim.core.precision import declared, variant


class Adagrad(Optimizer):
    """Adagrad with 32-bit or 8-bit sums; the steps are those of torch.optim.Adagrad.

    Args:
        params, lr, optim_bits, args, min_8bit_size, keywords: see `Optimizer`.
        lr_decay: the rate of step t is `lr / (1 + (t - 1) * lr_decay)`. (bitsandbytes refuses others than 0.)
        weight_decay: times the parameter is added to the gradient.
        initial_accumulator_value: what the sum of squared gradients begins with. (bitsandbytes refuses others than 0.)
        eps: added to the denominator.
    """

    _rules = (RULES["adagrad"],)
    _checks: ClassVar = {"initial_accumulator_value": non_negative}

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        **keywords: Unpack[CommonAndPaged],
    ) -> None: ...

    def _initial(self, group: dict[str, Any]) -> dict[str, float]:
        return {"sum": group["initial_accumulator_value"]}


Adagrad8bit = variant(Adagrad, bits=8, optim_bits=8)
Adagrad32bit = variant(Adagrad, bits=32)
