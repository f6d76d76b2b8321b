"""One step as the operators take it: a rule, and what they do around every rule."""

import torch
from torch import Tensor

from reference.group import CODEBOOKS, NOT_NEGATIVE, Group
from reference.rounding import UNIT, Rounded, half_ulp, rounded, where
from reference.rules import RULES
from reference.states import assert_encoded, assert_within


def gradient(
    group: Group, i: int, *, maximize: bool = False, grad_scale: Tensor | None = None, clip: Tensor | None = None
) -> tuple[Rounded, Tensor]:
    """Parameter `i`'s gradient as the papers mean it, and where it is finite; elsewhere it is 0 here."""
    factor = (-1 if maximize else 1) / (grad_scale.item() if grad_scale is not None else 1)
    factor *= clip[i].item() if clip is not None else 1
    finite = group.grads[i].isfinite()
    return factor * rounded(torch.where(finite, group.grads[i], 0.0)), finite


def expected_step(
    group: Group, i: int, options: dict, *, trust: Tensor | None = None, **scaling: bool | Tensor | None
) -> tuple[Rounded, list[Rounded]]:
    """Parameter `i` and its states after the step, with bounds on what fp32 rounding makes of them."""
    rule = RULES[group.rule]
    p, states = rounded(group.params[i]), [rounded(x) for x in group.state_values(i)]
    if rule.trust:
        options = options | {"trust": trust[i].item() if trust is not None else 1.0}
    g, finite = gradient(group, i, **scaling)
    new_p, new_states = rule.update(p, g, states, int(group.steps[i].item()) + 1, **options)
    # An element with a non-finite gradient stays what it is.
    return where(finite, new_p, p), [where(finite, x, old) for x, old in zip(new_states, states, strict=True)]


def check_step(before: Group, after: Group, options: dict, **scaling: bool | Tensor | None) -> None:
    """`after` is `before` one step later, but for what rounding explains."""
    for i, step in enumerate(before.steps):
        p, states = expected_step(before, i, options, **scaling)
        error = p.error + 2 * UNIT * before.params[i].double().abs()  # of a rounded 1 - lr * weight_decay, times p
        dtype = before.params[i].dtype
        if dtype != torch.float32:
            error = error + half_ulp(p.value, dtype)
        assert after.params[i].dtype == dtype
        assert_within(after.params[i], p.value, error, f"params[{i}]")
        assert after.steps[i].item() == step.item() + 1
        for (name, signed), x in zip(RULES[before.rule].states.items(), states, strict=True):
            actual, what = after.states[name][i], f"{name}[{i}]"
            if after.absmax[name]:
                codebook, divisor = CODEBOOKS[signed], name in NOT_NEGATIVE  # a step divides by its root
                assert_encoded(actual, after.absmax[name][i], x.value, x.error, codebook, what, divisor)
            else:
                assert_within(actual, x.value, x.error, what)
