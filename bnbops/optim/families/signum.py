"""Signum (Bernstein et al. 2018, algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged, takes_common_keywords
from bnbops.optim.core.precision import variant

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Signum(Optimizer):
    """Signum: the sign of a running average of gradients, with decoupled weight decay. One state a parameter.

    Every element moves by `lr`, as in `Lion`, which steps along another average than it keeps. Tiger (Su 2023) is
    Signum with a `momentum` of 0.945 to 0.965.

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: learning rate, a float or a 0-dim tensor.
        momentum: what remains of the average in a step.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
        optim_bits, args, min_8bit_size: see `Optimizer`.
        keywords: is_paged, percentile_clipping, block_wise, maximize and paged_directory; see `Optimizer`.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _rules = (RULES["signum"],)

    @takes_common_keywords
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
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            **keywords,
        )


Signum8bit = variant(Signum, bits=8, without=("optim_bits",))
Signum32bit = variant(Signum, bits=32, without=("optim_bits",))
