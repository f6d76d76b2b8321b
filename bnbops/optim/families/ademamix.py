"""AdEMAMix (Pagliardini, Ablin & Grangier 2024, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonKeywords, schedule_length
from bnbops.optim.core.precision import declared, variant


class AdEMAMix(Optimizer):
    """AdEMAMix: Adam with a second, much slower average of gradients, added `alpha` times. Decoupled weight decay.

    Args:
        params, lr, optim_bits, min_8bit_size, is_paged, keywords: see `Optimizer`.
        betas: decay rates of the fast average, of the squared gradient, and of the slow average; also as a string.
        alpha: weight of the slow average.
        t_alpha: steps over which `alpha` grows from 0; None for none.
        t_beta3: steps over which the slow average's rate grows from the fast one's; None for none.
        eps: added to the denominator.
        weight_decay: parameters shrink by `lr * weight_decay` a step.
    """

    _rules = (RULES["ademamix"],)
    _checks: ClassVar = {"t_alpha": schedule_length, "t_beta3": schedule_length}

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] | str = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = MIN_8BIT_SIZE,
        is_paged: bool = False,
        **keywords: Unpack[CommonKeywords],
    ) -> None: ...

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        unscheduled = {name: group[name] or 0 for name in ("t_alpha", "t_beta3")}
        return super()._options({**group, **unscheduled})


AdEMAMix8bit = variant(AdEMAMix, bits=8, without=("optim_bits",))
AdEMAMix32bit = variant(AdEMAMix, bits=32, without=("optim_bits",))
PagedAdEMAMix = variant(AdEMAMix, paged=True, without=("is_paged",))
PagedAdEMAMix8bit = variant(AdEMAMix, bits=8, paged=True, without=("optim_bits", "is_paged"))
PagedAdEMAMix32bit = variant(AdEMAMix, bits=32, paged=True, without=("optim_bits", "is_paged"))
