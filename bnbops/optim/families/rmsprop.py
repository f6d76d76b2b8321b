"""RMSprop (Tieleman & Hinton 2012, lecture 6e; torch.optim.RMSprop)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnbops.facts import RULES, Rule
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged, check_unsupported, takes_common_keywords
from bnbops.optim.core.precision import variant

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class RMSprop(Optimizer):
    """RMSprop with 32-bit or 8-bit states; the steps are those of torch.optim.RMSprop.

    Weight decay is added to the gradient. Where a scheduler raises momentum from 0, buffers are added then.

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: learning rate, a float or a 0-dim tensor.
        alpha: decay rate of the average of the squared gradient.
        eps: added to the denominator.
        weight_decay: times the parameter is added to the gradient.
        momentum: what remains of the last step in the next. (bitsandbytes ignores it.)
        centered: must be False.
        optim_bits, args, min_8bit_size: see `Optimizer`.
        keywords: is_paged, percentile_clipping, block_wise, maximize and paged_directory; see `Optimizer`.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _rules = (RULES["rmsprop"], RULES["rmsprop_momentum"])

    @takes_common_keywords
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
    ) -> None:
        check_unsupported(type(self).__name__, centered=centered)
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults, optim_bits=optim_bits, args=args, min_8bit_size=min_8bit_size, **keywords)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["rmsprop_momentum" if group["momentum"] else "rmsprop"]


RMSprop8bit = variant(RMSprop, bits=8, without=("optim_bits",))
RMSprop32bit = variant(RMSprop, bits=32, without=("optim_bits",))
