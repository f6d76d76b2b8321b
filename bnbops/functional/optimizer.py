"""One step of one parameter with bitsandbytes' names and signatures, over `torch.ops.bnbops`.

`bnbops.optim` steps many parameters in one call, and 8-bit states without decoding them first; these functions are for
code that calls bitsandbytes' directly.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbops.facts import RULES, STATE_BLOCK, Rule
from bnbops.tracing import is_compiling


class StepNumbers(NamedTuple):
    """Of a step, by bitsandbytes' names."""

    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    step: int
    lr: float


_NAMES = ("adam", "lamb", "momentum", "lars", "lion", "rmsprop", "adagrad", "ademamix")
# The rules that they mean: of "adam" bitsandbytes makes LAMB, and of "momentum" LARS, by `max_unorm`.
_RULES = {name: RULES[{"lamb": "adam", "lars": "momentum"}.get(name, name)] for name in _NAMES}
_CONSTANTS = {
    "dampening": 0.0,
    "nesterov": False,
    "lr_decay": 0.0,
    "t_alpha": 0,
    "t_beta3": 0,
}  # it has no such options
_SHORTENED = ("adam", "lamb", "momentum", "lars", "rmsprop")  # by max_unorm


def _rule(optimizer_name: str) -> Rule:
    if optimizer_name not in _RULES:
        raise ValueError(f"optimizer_name must be one of {', '.join(_RULES)}; got {optimizer_name!r}")
    return _RULES[optimizer_name]


def _states(optimizer_name: str, state1: Tensor, state2: Tensor | None, p: Tensor) -> list[Tensor]:
    """One tensor of p's shape for each of the rule's states: AdEMAMix' first two are together in state1."""
    count = len(_rule(optimizer_name).states)
    stacked = count == 3
    given = [*(state1 if stacked else [state1]), *([] if state2 is None else [state2])]
    if count > 1 and state2 is None:
        raise ValueError(f"{optimizer_name} needs a state2")
    given = given[:count]
    if len(given) != count or any(state.numel() != p.numel() for state in given):
        shapes = ", ".join(str(list(s.shape)) for s in (state1, state2) if s is not None)
        expected = f"[2, *p.shape] and p's, {list(p.shape)}" if stacked else f"p's, {list(p.shape)}"
        raise ValueError(f"the states of {optimizer_name} must have shape {expected}; got {shapes}")
    return [state.view(p.shape) for state in given]


def _gradient(g: Tensor, p: Tensor, skip_zeros: bool) -> Tensor:
    if g.numel() != p.numel():
        raise ValueError(f"g and p must have the same number of elements, got {g.numel()} and {p.numel()}")
    g = g.reshape(p.shape)
    return torch.where(g == 0, math.nan, g) if skip_zeros else g  # operators leave elements alone whose gradient is NaN


def _take_step(
    rule: Rule, p: Tensor, g: Tensor, states: list[Tensor], n: StepNumbers, gnorm_scale: float = 1.0
) -> None:
    step = torch.full((), n.step - 1, dtype=torch.float32, device=p.device)
    clip = None if gnorm_scale == 1 else torch.full((1,), gnorm_scale, dtype=torch.float32, device=p.device)
    numbers: dict[str, Any] = n._asdict() | _CONSTANTS
    if len(rule.states) == 1:
        numbers |= {"momentum": n.beta1, "alpha": n.beta1}
    getattr(torch.ops.bnbops, rule.step)(
        *([p], [g], *([s] for s in states), *([] for _ in states), [step]),
        lr=torch.full((), n.lr, dtype=torch.float64, device="cpu"),
        clip=clip,
        **{option.name: numbers[option.name] for option in rule.options},
    )


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step of one parameter, in place, with fp32 states.

    Args:
        optimizer_name: "adam", "lamb", "momentum", "lars", "lion", "rmsprop", "adagrad" or "ademamix".
        g: gradient, of p's dtype or fp32.
        p: fp32, bf16 or fp16 parameter.
        state1: fp32 of p's shape; `[2, *p.shape]` for "ademamix", both of its averages of gradients.
        beta1: decay rate of state1: momentum, RMSprop's alpha.
        eps: added to the denominator.
        step: counts from 1.
        lr: learning rate.
        state2: fp32 of p's shape: the average of squares of "adam", "lamb" and "ademamix".
        beta2, beta3, alpha: as the optimizers' of these names.
        weight_decay: of the gradient, but of the parameter for "adam", "lamb", "lion" and "ademamix".
        gnorm_scale: a factor for the gradient.
        unorm_vec: one element, which gets the update's norm if there is a max_unorm.
        max_unorm: if positive, the longest update in units of p's norm. The update is measured as bitsandbytes does it
            on a CPU: for "adam" and "lamb" before the corrections for beginning with zeros.
        skip_zeros: whether elements with a gradient of 0 stay as they are, their states, too.

    Raises:
        ValueError: an unknown name, tensors that do not fit, or max_unorm for another one than "adam", "lamb",
            "momentum", "lars" and "rmsprop".
        RuntimeError: a dtype, device or number that the operator refuses.
    """
    norm = torch.linalg.vector_norm(p, dtype=torch.float32) if max_unorm > 0 else 0.0
    numbers = (beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale)
    update_32bit(optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, norm, *numbers, skip_zeros)


@torch.no_grad()
def update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: Tensor | float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """`optimizer_update_32bit` for a parameter whose norm is known: what bitsandbytes' operator takes."""
    n = StepNumbers(beta1, beta2, beta3, alpha, eps, weight_decay, step, lr)
    rule, states, g = _rule(optimizer_name), _states(optimizer_name, state1, state2, p), _gradient(g, p, skip_zeros)
    param = p.contiguous()
    if max_unorm <= 0:
        _take_step(rule, param, g, states, n, gnorm_scale)
    elif optimizer_name in _SHORTENED:
        coupled = rule is not RULES["adam"]
        g = g.float() * gnorm_scale + (n.weight_decay * p.float() if coupled else 0.0)
        update = torch.zeros_like(param, dtype=torch.float32)  # a step from 0 of length 1: nothing but the update
        _take_step(rule, update, g, states, n._replace(lr=1.0, weight_decay=0.0))
        corrections = 1.0 if coupled else (1 - n.beta1**n.step) / math.sqrt(1 - n.beta2**n.step)
        norm, longest = torch.linalg.vector_norm(update) * corrections, max_unorm * param_norm
        scale = torch.where(norm > longest, longest / norm, 1.0)
        kept = param.float() * (1.0 if coupled else 1 - n.lr * n.weight_decay)
        param = torch.where(g.isfinite(), kept + n.lr * scale * update, param.float())
        if unorm_vec is not None:
            unorm_vec.fill_(norm)
    else:
        raise ValueError(f"max_unorm must be 0 for {optimizer_name}; {', '.join(_SHORTENED)} have one; got {max_unorm}")
    _write(p, param)


@torch.no_grad()
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step of one parameter, in place, with states of 8 bits in flat blocks of 256, which are decoded and encoded
    by the maps given.

    Args:
        optimizer_name, g, p, beta1, beta2, beta3, alpha, eps, step, lr, weight_decay, gnorm_scale, skip_zeros: as for
            `optimizer_update_32bit`.
        state1, state2: uint8 codes, of shapes as there.
        qmap1, qmap2: fp32 codebooks, 256 values in ascending order.
        absmax1, absmax2: fp32 scales, `[ceil(p.numel() / 256)]`; absmax1 `[2, ...]` for "ademamix".

    Raises:
        ValueError: an unknown name, or tensors that do not fit.
        RuntimeError: a dtype, device or number that the operators refuse.
    """
    rule, codes, g = _rule(optimizer_name), _states(optimizer_name, state1, state2, p), _gradient(g, p, skip_zeros)
    if len(codes) > 1 and (qmap2 is None or absmax2 is None):
        raise ValueError(f"{optimizer_name} needs qmap2 and absmax2")
    scales = [*(absmax1 if len(codes) == 3 else [absmax1]), *([absmax2] if len(codes) > 1 else [])]
    maps = [qmap1, qmap1, qmap2] if len(codes) == 3 else [qmap1, qmap2][: len(codes)]
    coded = list(zip(codes, scales, maps, strict=True))
    states = [torch.ops.bnbops.dequantize_blockwise(*each, STATE_BLOCK, torch.float32) for each in coded]
    param = p.clone(memory_format=torch.contiguous_format)
    n = StepNumbers(beta1, beta2, beta3, alpha, eps, weight_decay, step, lr)
    _take_step(rule, param, g, states, n, gnorm_scale)
    results = [
        torch.ops.bnbops.quantize_blockwise(state, qmap, STATE_BLOCK) for state, qmap in zip(states, maps, strict=True)
    ]
    for (code, absmax, _), (new_code, new_absmax) in zip(coded, results, strict=True):
        code.copy_(new_code)
        absmax.copy_(new_absmax.view(absmax.shape))
    _write(p, param)


def _write(p: Tensor, param: Tensor) -> None:
    """`param`, which may be p itself, to p."""
    if param is not p:
        p.copy_(param)
    elif not is_compiling():
        torch.autograd.graph.increment_version(p)  # operators from C++ write behind autograd's back
