"""RMSprop (Tieleman & Hinton 2012, lecture 6e; torch.optim.RMSprop)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES, Rule
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged
from bnbops.optim.core.precision import declared, variant


class RMSprop(Optimizer):
    """RMSprop with 32-bit or 8-bit states; the steps are those of torch.optim.RMSprop.

    Weight decay is added to the gradient. Where a scheduler raises momentum from 0, buffers are added then.

    Args:
        params, lr, optim_bits, args, min_8bit_size, keywords: see `Optimizer`.
        alpha: decay rate of the average of the squared gradient.
        eps: added to the denominator.
        weight_decay: times the parameter is added to the gradient.
        momentum: what remains of the last step in the next. (bitsandbytes ignores it.)
        centered: must be False.
    """

    _rules = (RULES["rmsprop"], RULES["rmsprop_momentum"])

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        **keywords: Unpack[CommonAndPaged],
    ) -> None: ...

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["rmsprop_momentum" if group["momentum"] else "rmsprop"]


RMSprop8bit = variant(RMSprop, bits=8, without=("optim_bits",))
RMSprop32bit = variant(RMSprop, bits=32, without=("optim_bits",))
