"""LARS (You, Gitman & Ginsburg 2017, equation 6 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbops.dtensors import is_dtensor
from bnbops.facts import FLOATS, RULES
from bnbops.optim.core.batch import option
from bnbops.optim.core.call import Call
from bnbops.optim.core.norms import trust_ratio, whole_squared_norms
from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import MIN_8BIT_SIZE, CommonAndPaged, non_negative, require
from bnbops.optim.core.precision import declared, variant
from bnbops.optim.core.state import Plan
from bnbops.optim.families.sgd import check_nesterov, undampened
from bnbops.tracing import is_compiling


class LARS(Optimizer):
    """LARS: `SGD` with every parameter's decayed gradient scaled to `max_unorm` times the parameter's norm.

    The ratio is `max_unorm * |p| / (|g| + weight_decay * |p|)`, whatever the precision; the learning rate stays outside
    the momentum, as in torch.optim.SGD. bitsandbytes 0.50 differs: its 8-bit LARS applies no ratio at all, its 32-bit
    LARS scales momentum's whole step, and only by ratios below 1.

    Args:
        params, lr, optim_bits, args, min_8bit_size, keywords: see `Optimizer`.
        momentum: what remains of the buffer in a step.
        dampening: `1 - dampening` of the gradient goes into the buffer, all of it in the first step.
        weight_decay: times the parameter is added to the gradient.
        nesterov: step along the gradient plus `momentum` times the new buffer.
        max_unorm: see above; 0 switches the ratio off.
        trust_clip: let the ratio be 1 at most.
    """

    _rules = (RULES["lars"],)
    _checks: ClassVar = {"max_unorm": non_negative}

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
        max_unorm: float = 0.02,
        *,
        trust_clip: bool = False,
        **keywords: Unpack[CommonAndPaged],
    ) -> None: ...

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        check_nesterov(options)

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return super()._options(undampened(group))

    def _trust(self, call: Call, clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = call.plan.config
        if config["max_unorm"] == 0:
            return {}
        local_norms = torch.ops.bnbops.squared_norms(call.params + call.grads)
        weight, grad = whole_squared_norms(local_norms.view(2, -1), call.whole).sqrt()
        if clip:
            grad = grad * clip["clip"]
        if call.scalars["grad_scale"] is not None:
            grad = grad / call.scalars["grad_scale"]
        decayed = grad + option(call.plan, call.scalars, "weight_decay") * weight
        return {"trust": trust_ratio(weight, decayed, config["max_unorm"], config["trust_clip"])}


LARS8bit = variant(LARS, bits=8, without=("optim_bits",))
LARS32bit = variant(LARS, bits=32, without=("optim_bits",))


class PytorchLARS(Optimizer):
    """bitsandbytes' LARS in plain torch: `SGD` whose step is no longer than `lr * max_unorm * |p|`.

    Unlike `LARS` it measures and shortens the whole step, momentum included, and never lengthens it. Slow, fp32 buffers
    only, and not for sharded parameters; it is there for comparisons.

    Args:
        params, lr, keywords: see `Optimizer`.
        momentum: what remains of the buffer in a step. (bitsandbytes fails without.)
        dampening: `1 - dampening` of the gradient goes into the buffer, all of it in the first step.
        weight_decay: times the parameter is added to the gradient.
        nesterov: step along the gradient plus `momentum` times the new buffer.
        max_unorm: see above; 0 switches it off.

    Raises:
        ValueError: a value out of range, or sharded parameters (DTensors).
    """

    _rules = (replace(RULES["lars"], name="pytorch_lars"),)
    _checks: ClassVar = {"max_unorm": non_negative}

    @declared
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
        **keywords: Unpack[CommonAndPaged],
    ) -> None: ...

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        if any(map(is_dtensor, group["params"])):
            raise ValueError("PytorchLARS does not support sharded parameters (DTensors); use LARS")

    def _check_options(self, options: Mapping[str, Any]) -> None:
        super()._check_options(options)
        check_nesterov(options)
        require(options["optim_bits"] == 32, f"PytorchLARS has 32-bit states, got optim_bits={options['optim_bits']}")

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._options(undampened(group)), "max_unorm": group["max_unorm"]}

    def _operator(self, plan: Plan) -> Callable[..., None]:
        return pytorch_lars_step_


def pytorch_lars_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffer: list[Tensor],
    momentum_buffer_absmax: list[Tensor],
    steps: list[Tensor],
    *,
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    max_unorm: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """The step of `PytorchLARS`, with the conventions of the operators in docs/operators.md. No 8-bit states."""
    for param, grad, buffer in zip(params, grads, momentum_buffer, strict=True):
        if param.dtype not in FLOATS:
            raise RuntimeError(f"PytorchLARS: params must be float32, bfloat16 or float16, got {param.dtype}")
        if buffer.dtype != torch.float32 or not param.shape == grad.shape == buffer.shape:
            raise RuntimeError(
                f"PytorchLARS: a parameter of shape {list(param.shape)} needs a gradient and a float32 momentum_buffer "
                f"of that shape, got {list(grad.shape)} and {buffer.dtype} {list(buffer.shape)}"
            )
    if found_inf is not None and not is_compiling() and found_inf.item():
        return
    taken = torch.tensor(True, dtype=torch.bool, device="cpu") if found_inf is None else found_inf == 0
    for i, (param, buffer, step) in enumerate(zip(params, momentum_buffer, steps, strict=True)):
        p, g = param.float(), grads[i].float()
        if grad_scale is not None:
            g = g / grad_scale
        if clip is not None:
            g = g * clip[i]
        keeps = taken.to(p.device) & g.isfinite()
        g = torch.where(keeps, -g if maximize else g, 0.0) + weight_decay * p
        new = torch.where(step == 0, g, momentum * buffer + (1 - dampening) * g)
        update = g + momentum * new if nesterov else new
        if max_unorm > 0:
            longest, norm = max_unorm * torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
            update = update * torch.where(norm > longest, longest / norm, 1.0)
        buffer.copy_(torch.where(keeps, new, buffer))
        param.copy_(torch.where(keeps, p - lr.to(p.device, p.dtype).view(()) * update, p))
        step.add_(taken.to(step.device, step.dtype).view(step.shape))
