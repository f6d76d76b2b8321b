"""Gradient descent with and without momentum (Sutskever et al. 2013, equations 1 and 2; torch.optim.SGD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.facts import RULES, Rule
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged, require
from bnbops.optim.core.precision import declared, variant


def check_nesterov(options: Mapping[str, Any]) -> None:
    """Nesterov's momentum, as torch has it, needs a momentum and no dampening.

    Raises:
        ValueError: it has not.
    """
    require(
        not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0),
        f"nesterov=True needs momentum > 0 and dampening = 0, got momentum={options['momentum']}, "
        f"dampening={options['dampening']}",
    )


def undampened(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group whose gradients are not dampened where there is no momentum, as in torch.optim.SGD."""
    return {**group, "dampening": group["dampening"] if group["momentum"] else 0.0}


class SGD(Optimizer):
    """Gradient descent with 32-bit or 8-bit momentum; the steps are those of torch.optim.SGD.

    Weight decay is added to the gradient. A momentum of 0 needs no buffer; where a scheduler raises it later, buffers
    are added and begin with zeros.

    Args:
        params, lr, optim_bits, args, min_8bit_size, keywords: see `Optimizer`.
        momentum: what remains of the buffer in a step.
        dampening: `1 - dampening` of the gradient goes into the buffer, all of it in the first step.
        weight_decay: times the parameter is added to the gradient.
        nesterov: step along the gradient plus `momentum` times the new buffer. (bitsandbytes ignores it.)
    """

    _rules = (RULES["momentum"], RULES["sgd"])

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = MIN_8BIT_SIZE,
        **keywords: Unpack[CommonAndPaged],
    ) -> None: ...

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        check_nesterov(options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["momentum" if group["momentum"] else "sgd"]


SGD8bit = variant(SGD, bits=8, without=("optim_bits",))
SGD32bit = variant(SGD, bits=32, without=("optim_bits",))
