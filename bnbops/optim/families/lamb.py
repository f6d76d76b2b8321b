"""LAMB (You et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import (
    MIN_8BIT_SIZE,
    CommonAndPaged,
    check_unsupported,
    non_negative,
    takes_common_keywords,
)
from bnbops.optim.core.precision import variant
from bnbops.optim.core.transform import Transform, TrustRatio

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class LAMB(Optimizer):
    """LAMB: Adam's step, as long as `max_unorm` times its parameter's norm, whatever the precision.

    bitsandbytes 0.50 differs: its 8-bit LAMB applies no ratio at all, its 32-bit LAMB only ratios below 1
    (`trust_clip=True`), and both ignore `bias_correction` and `adam_w_mode`.

    Args:
        params: parameters or param groups; float32, bfloat16 or float16. Gradients may also be float32.
        lr: learning rate, a float or a 0-dim tensor.
        bias_correction: correct both averages for beginning with zeros.
        betas: decay rates of the averages of gradient and squared gradient; also as a string, "(0.9, 0.999)".
        eps: added to the denominator.
        weight_decay: times the parameter is added to the step (`adam_w_mode`) or to the gradient.
        amsgrad: must be False.
        adam_w_mode: see `weight_decay`.
        optim_bits, args, min_8bit_size: see `Optimizer`.
        max_unorm: the trust ratio is `max_unorm * |p| / |step|`; 1 is the paper's, 0 switches it off.
        trust_clip: let the trust ratio be 1 at most.
        keywords: is_paged, percentile_clipping, block_wise, maximize and paged_directory; see `Optimizer`.

    Raises:
        ValueError: a value out of range, or one that is not supported.
    """

    _rules = (RULES["lamb"],)
    _checks: ClassVar = {"max_unorm": non_negative}

    @takes_common_keywords
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        max_unorm: float = 1.0,
        *,
        trust_clip: bool = False,
        **keywords: Unpack[CommonAndPaged],
    ) -> None:
        check_unsupported(type(self).__name__, amsgrad=amsgrad)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "adam_w_mode": adam_w_mode}
        defaults |= {"max_unorm": max_unorm, "trust_clip": trust_clip}
        super().__init__(params, defaults, optim_bits=optim_bits, args=args, min_8bit_size=min_8bit_size, **keywords)

    def _transform(self, group: Mapping[str, Any]) -> Transform | None:
        return TrustRatio(group["max_unorm"], group["trust_clip"]) if group["max_unorm"] else None


LAMB8bit = variant(LAMB, bits=8, without=("optim_bits",))
LAMB32bit = variant(LAMB, bits=32, without=("optim_bits",))
