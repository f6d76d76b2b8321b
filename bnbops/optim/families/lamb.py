"""LAMB (You et al. 2020, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import (
    MIN_8BIT_SIZE,
    CommonAndPaged,
    non_negative,
)
from bnbops.optim.core.precision import declared, variant
from bnbops.optim.core.transform import Transform, TrustRatio


class LAMB(Optimizer):
    """LAMB: Adam's step, as long as `max_unorm` times its parameter's norm, whatever the precision.

    bitsandbytes 0.50 differs: its 8-bit LAMB applies no ratio at all, its 32-bit LAMB only ratios below 1
    (`trust_clip=True`), and both ignore `bias_correction` and `adam_w_mode`.

    Args:
        params, lr, optim_bits, args, min_8bit_size, keywords: see `Optimizer`.
        bias_correction: correct both averages for beginning with zeros.
        betas: decay rates of the averages of gradient and squared gradient; also as a string, "(0.9, 0.999)".
        eps: added to the denominator.
        weight_decay: times the parameter is added to the step (`adam_w_mode`) or to the gradient.
        amsgrad: must be False.
        adam_w_mode: see `weight_decay`.
        max_unorm: the trust ratio is `max_unorm * |p| / |step|`; 1 is the paper's, 0 switches it off.
        trust_clip: let the trust ratio be 1 at most.
    """

    _rules = (RULES["lamb"],)
    _checks: ClassVar = {"max_unorm": non_negative}

    @declared
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
    ) -> None: ...

    def _transform(self, group: Mapping[str, Any]) -> Transform | None:
        return TrustRatio(group["max_unorm"], group["trust_clip"]) if group["max_unorm"] else None


LAMB8bit = variant(LAMB, bits=8, without=("optim_bits",))
LAMB32bit = variant(LAMB, bits=32, without=("optim_bits",))
