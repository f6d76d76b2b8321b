"""Adam (Kingma & Ba 2015, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonKeywords, check_unsupported, takes_common_keywords
from bnbops.optim.core.precision import variant

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Adam(Optimizer):
    """Adam with 32-bit or 8-bit states (`optim_bits`).

    Weight decay is decoupled, as in AdamW and in bitsandbytes' Adam; torch.optim.Adam adds it to the gradient.

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: learning rate, a float or a 0-dim tensor.
        betas: decay rates of the averages of gradient and squared gradient; also as a string, "(0.9, 0.999)".
        eps: added to the denominator.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
        amsgrad: must be False.
        optim_bits, args, min_8bit_size, is_paged: see `Optimizer`.
        keywords: percentile_clipping, block_wise, maximize and paged_directory; see `Optimizer`.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _rules = (RULES["adam"],)

    @takes_common_keywords
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
    ) -> None:
        check_unsupported(type(self).__name__, amsgrad=amsgrad)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, is_paged, args=args, min_8bit_size=min_8bit_size, **keywords)


Adam8bit = variant(Adam, bits=8)
Adam32bit = variant(Adam, bits=32)
PagedAdam = variant(Adam, paged=True)
PagedAdam8bit = variant(Adam, bits=8, paged=True)
PagedAdam32bit = variant(Adam, bits=32, paged=True)
