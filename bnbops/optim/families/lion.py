"""Lion (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonKeywords, takes_common_keywords
from bnbops.optim.core.precision import variant

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Lion(Optimizer):
    """Lion: the sign of an average of gradients, with decoupled weight decay.

    Every element moves by `lr`, so rates are 3 to 10 times smaller than Adam's, and decays as many times larger.

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: learning rate, a float or a 0-dim tensor.
        betas: decay rates of the average in the step, and of the average that is kept; also as a string.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
        optim_bits, args, min_8bit_size, is_paged: see `Optimizer`.
        keywords: percentile_clipping, block_wise, maximize and paged_directory; see `Optimizer`.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _rules = (RULES["lion"],)

    @takes_common_keywords
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
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, is_paged, args=args, min_8bit_size=min_8bit_size, **keywords)


Lion8bit = variant(Lion, bits=8, without=("optim_bits",))
Lion32bit = variant(Lion, bits=32, without=("optim_bits",))
PagedLion = variant(Lion, paged=True, without=("is_paged",))
PagedLion8bit = variant(Lion, bits=8, paged=True, without=("optim_bits", "is_paged"))
PagedLion32bit = variant(Lion, bits=32, paged=True, without=("optim_bits", "is_paged"))
