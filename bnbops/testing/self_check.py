"""Runs every operator on its samples and compares with plain torch computations: is this build right on this machine?

The computations here are short and slow; the tests have finer ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnbops._library import ISAS
from bnbops.codebooks import create_dynamic_map
from bnbops.facts import RULES, STATE_BLOCK, Rule, State
from bnbops.testing.expect import Difference, absmax_of, blocked, expect, expect_close, expect_nearest, normalise
from bnbops.testing.sample import tensor
from bnbops.testing.samples import SAMPLED, Sample, operator, samples
from bnbops.testing.self_check_4bit import REFERENCES_4BIT
from bnbops.testing.self_check_int8 import REFERENCES as REFERENCES_INT8

__all__ = ["REFERENCES", "check", "run"]


# ---- one reference an operator: gets the arguments before the call, the result, and the arguments after ---------


def _isa(_before: dict[str, Any], result: str, _after: dict[str, Any]) -> None:
    expect(result in ISAS, f"unknown instruction set {result}")
    expect(result == (os.environ.get("BNBOPS_ISA") or result), f"{result} in use although BNBOPS_ISA is set")


def _isas(_before: dict[str, Any], result: list[str], _after: dict[str, Any]) -> None:
    expect(tuple(result) == ISAS[: len(result)], f"unknown instruction sets, or in another order: {result}")
    expect(torch.ops.bnbops.isa() in result, f"{torch.ops.bnbops.isa()} is in use, but is not among {result}")


def _facts(_before: dict[str, Any], result: str, _after: dict[str, Any]) -> None:
    rules = json.loads(result)["rules"]
    expect(sorted(rules) == sorted(_UPDATES), f"rules {list(rules)} instead of {list(_UPDATES)}")


def _quantize(before: dict[str, Any], result: tuple[Tensor, Tensor], _after: dict[str, Any]) -> None:
    A, (codes, absmax) = before["A"].detach().double(), result
    size = min(before["blocksize"], max(A.numel(), 1))
    blocks = blocked(A.flatten(), size)
    expect(codes.shape == A.shape and codes.dtype == torch.uint8, "codes of the wrong shape or dtype")
    expect(torch.equal(absmax.double(), absmax_of(blocks)), "absmax wrong")
    expect_nearest(codes, normalise(blocks).flatten()[: A.numel()], before["code"], "codes")


def _dequantized(before: dict[str, Any]) -> Tensor:
    A, absmax, code = before["A"], before["absmax"].detach(), before["code"].detach()
    block = torch.arange(A.numel(), dtype=torch.int64, device=A.device) // before["blocksize"]
    return (code[A.long()] * absmax.flatten()[block].view(A.shape)).to(before["dtype"])


def _dequantize(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    expect(torch.equal(result.detach(), _dequantized(before)), "values wrong")


def _dequantize_out(before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    expect(torch.equal(after["out"], _dequantized(before)), "values wrong")


# ---- optimizer steps -------------------------------------------------------------------------------------------
#
# Update rules in float64: from (param, grad, states, step, options) to the new param and states. docs/operators.md
# names their papers.


def _adam(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    m, v = _moments(g, states, o)
    update = (m / (1 - o["beta1"] ** t)) / ((v / (1 - o["beta2"] ** t)).sqrt() + o["eps"])
    return p - o["lr"] * (update + o["weight_decay"] * p), m, v


def _moments(g: Tensor, states: list[Tensor], o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return o["beta1"] * states[0] + (1 - o["beta1"]) * g, o["beta2"] * states[-1] + (1 - o["beta2"]) * g * g


def _sgd(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    return (p - o["lr"] * (g + o["weight_decay"] * p),)


def _momentum(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    g = o["trust"] * (g + o["weight_decay"] * p)  # trust: 1, but for LARS
    buffer = g if t == 1 else o["momentum"] * states[0] + (1 - o["dampening"]) * g
    return p - o["lr"] * (g + o["momentum"] * buffer if o["nesterov"] else buffer), buffer


def _lion(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    c = o["beta1"] * states[0] + (1 - o["beta1"]) * g
    return p - o["lr"] * (c.sign() + o["weight_decay"] * p), o["beta2"] * states[0] + (1 - o["beta2"]) * g


def _rmsprop(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    g = g + o["weight_decay"] * p
    v = o["alpha"] * states[0] + (1 - o["alpha"]) * g * g
    update = g / (v.sqrt() + o["eps"])
    if "momentum" not in o:
        return p - o["lr"] * update, v
    buffer = o["momentum"] * states[1] + update
    return p - o["lr"] * buffer, v, buffer


def _adagrad(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    g = g + o["weight_decay"] * p
    total = states[0] + g * g
    return p - o["lr"] / (1 + (t - 1) * o["lr_decay"]) * g / (total.sqrt() + o["eps"]), total


def _lamb(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    u, m, v = _lamb_direction(p, g, states, t, o)
    return p - o["lr"] * o["trust"] * u, m, v


def _lamb_direction(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    decay = o["weight_decay"] * p
    m, v = _moments(g if o["adam_w_mode"] else g + decay, states, o)
    correction1, correction2 = (1 - o[beta] ** t if o["bias_correction"] else 1 for beta in ("beta1", "beta2"))
    u = (m / correction1) / ((v / correction2).sqrt() + o["eps"])
    return u + decay if o["adam_w_mode"] else u, m, v


def _ademamix(p: Tensor, g: Tensor, states: list[Tensor], t: int, o: dict[str, Any]) -> tuple[Tensor, ...]:
    alpha, beta3 = o["alpha"], o["beta3"]
    if 0 < t < o["t_alpha"]:
        alpha *= t / o["t_alpha"]
    if 0 < t < o["t_beta3"]:  # the half-life -log(2) / log(beta3) grows linearly
        part = t / o["t_beta3"]
        beta3 = math.exp(1 / ((1 - part) / math.log(o["beta1"]) + part / math.log(beta3)))
    m, v = _moments(g, states, o)
    slow = beta3 * states[1] + (1 - beta3) * g
    update = (m / (1 - o["beta1"] ** t) + alpha * slow) / ((v / (1 - o["beta2"] ** t)).sqrt() + o["eps"])
    return p - o["lr"] * (update + o["weight_decay"] * p), m, slow, v


_UPDATES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "adam": _adam,
    "sgd": _sgd,
    "momentum": _momentum,
    "lion": _lion,
    "rmsprop": _rmsprop,
    "rmsprop_momentum": _rmsprop,
    "adagrad": _adagrad,
    "lamb": _lamb,
    "lars": _momentum,
    "ademamix": _ademamix,
}


def _step(rule: Rule, before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    skip = before.get("found_inf") is not None and bool(before["found_inf"].item())
    for i in range(len(before["params"])):
        if skip:
            for key in ("params", "steps", *rule.state_names):
                expect(torch.equal(after[key][i], before[key][i]), f"{key}[{i}] changed although found_inf is set")
        else:
            expect(torch.equal(after["steps"][i], before["steps"][i] + 1), f"steps[{i}] is not one more")
            _step_of_one(rule, i, before, after)


def _step_of_one(rule: Rule, i: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    p, g, old = _values(rule, i, before)
    new = _UPDATES[rule.name](p, g, old, int(before["steps"][i].item()) + 1, _options(rule, i, before))
    new_p, *new_states = (torch.where(g.isfinite(), n, o) for n, o in zip(new, (p, *old), strict=True))

    expect_close(after["params"][i], new_p, f"params[{i}]")
    for state, x in zip(rule.states, new_states, strict=True):
        actual, what = after[state.name][i], f"{state.name}[{i}]"
        if not after[f"{state.name}_absmax"]:
            expect_close(actual, x, what)
            continue
        absmax = after[f"{state.name}_absmax"][i]
        blocks = blocked(_rows(x, absmax), STATE_BLOCK)
        expect_close(absmax.view(blocks.shape[:2]), absmax_of(blocks), f"{state.name}_absmax[{i}]")
        normalised = normalise(blocks).flatten(1)[:, : _rows(x, absmax).shape[1]]
        code = create_dynamic_map(state.signed).to(x.device)
        if state.divisor:  # positive stays positive
            normalised = torch.where(normalised > 0, normalised.clamp_min(code[code > 0].min()), normalised)
        expect_nearest(actual, normalised, code, what)


def _values(rule: Rule, i: int, before: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Parameter, gradient (unscaled, clipped and negated as asked) and states of parameter `i` in float64."""
    p, g = before["params"][i].double(), before["grads"][i].double()
    if before.get("grad_scale") is not None:
        g = g / before["grad_scale"].double()
    if before.get("clip") is not None:
        g = g * before["clip"][i].double()
    if before.get("maximize"):
        g = -g
    return p, g, [_decoded(state, i, before) for state in rule.states]


def _options(rule: Rule, i: int, before: dict[str, Any]) -> dict[str, Any]:
    """What the rule of parameter `i` gets; options in a tensor take the place of the others."""
    held = before["options"].tolist() if before.get("options") is not None else []
    trust = before["trust"][i].item() if before.get("trust") is not None else 1.0
    names = [option.name for option in rule.options]
    return before | dict(zip(names, held, strict=False)) | {"lr": before["lr"].item(), "trust": trust}


def _rows(x: Tensor, absmax: Tensor) -> Tensor:
    """The rows that blocks do not cross: of the parameter, or the whole as one where absmax has one dimension."""
    rows = 1 if absmax.dim() == 1 else x.shape[0]
    return x.reshape(rows, x.numel() // max(rows, 1))


def _decoded(state: State, i: int, before: dict[str, Any]) -> Tensor:
    codes, scales = before[state.name][i], before[f"{state.name}_absmax"]
    if not scales:
        return codes.double()
    absmax, code = scales[i], create_dynamic_map(state.signed).to(codes.device)
    rows = _rows(codes, absmax)
    scale = absmax.view(rows.shape[0], absmax.shape[-1]).repeat_interleave(STATE_BLOCK, dim=1)[:, : rows.shape[1]]
    return (code[rows.long()] * scale).double().view(codes.shape)


# ---- norms -----------------------------------------------------------------------------------------------------


def _expect_norms(actual: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    expect(actual.shape == (len(tensors),) and actual.dtype == torch.float64, "norms of the wrong shape or dtype")
    for i, x in enumerate(tensors):
        expected = x.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum()
        expect((actual[i] - expected).abs() <= tolerance * expected, f"norm {i} is {actual[i]}, not {expected}")


def _squared_norms(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_norms(result, before["tensors"], 1e-12)


def _lamb_squared_norms(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    directions, rule = [], RULES["lamb"]
    for i in range(len(before["params"])):
        p, g, states = _values(rule, i, before)
        u, *_ = _lamb_direction(p, g, states, int(before["steps"][i].item()) + 1, _options(rule, i, before))
        directions.append(torch.where(g.isfinite(), u, 0.0))
    _expect_norms(result, directions, 1e-5)


def _percentile_clip(before: dict[str, Any], result: Tensor, after: dict[str, Any]) -> None:
    skip = before.get("found_inf") is not None and bool(before["found_inf"].item())
    scale = before["grad_scale"].double() if before.get("grad_scale") is not None else 1.0
    squares = before["squared_norms"] / scale**2
    for i, step in enumerate(before["steps"]):
        t, history, factor = int(step.item()) + 1, before["gnorm_vec"][i].double(), tensor(1.0)
        if not skip:
            newest = torch.arange(100, dtype=torch.int64, device=history.device) == t % 100
            history = torch.where(newest | (t == 1), squares[i], history)
            factor = (history.sort().values[before["percentile"]] / squares[i]).sqrt().clamp(max=1.0)
        expect_close(after["gnorm_vec"][i], history, f"gnorm_vec[{i}]")
        expect_close(result[i], factor, f"factor {i}")


REFERENCES: dict[str, Callable[[dict[str, Any], Any, dict[str, Any]], None]] = {
    "isa": _isa,
    "isas": _isas,
    "facts": _facts,
    "quantize_blockwise": _quantize,
    "dequantize_blockwise": _dequantize,
    "dequantize_blockwise.out": _dequantize_out,
    **{rule.step: partial(_step, rule) for rule in RULES.values()},
    "squared_norms": _squared_norms,
    "lamb_squared_norms": _lamb_squared_norms,
    "percentile_clip_": _percentile_clip,
    **REFERENCES_4BIT,
    **REFERENCES_INT8,
}


# ---- running them ----------------------------------------------------------------------------------------------


def check(name: str, sample: Sample) -> str | None:
    """Runs the operator on a copy of the sample; what differs from the reference, or None."""
    overload, after = operator(name), sample.clone()
    try:
        # Autocast changes the dtype of what linear layers take, and so of what they return.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            result = after.run(overload)
        REFERENCES[name](sample.arguments(overload), result, after.arguments(overload))
    except Difference as difference:
        return f"{sample.name}: {difference}"
    except RuntimeError as error:
        return f"{sample.name}: {error}".splitlines()[0]
    return None


def run(device: torch.device | str = "cpu") -> Iterator[tuple[str, int, list[str]]]:
    """Checks all operators; yields each one's name, number of samples, and what differs."""
    for name in SAMPLED:
        found = samples(name, device)
        yield name, len(found), [problem for sample in found if (problem := check(name, sample))]
