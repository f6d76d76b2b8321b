"""Runs every operator on its samples and compares with plain torch computations: is this build right on this machine?

The computations here are short and slow; the tests have finer ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnbops._library import ISAS
from bnbops.facts import CODECS, DEFAULT_CODEC, ROLES, RULES, Codec, Rule, State
from bnbops.testing.coded import decoded, expect_coded
from bnbops.testing.expect import Difference, absmax_of, blocked, expect, expect_close, expect_nearest, normalise
from bnbops.testing.references.rules import UPDATES
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
    expect(sorted(rules) == sorted(UPDATES), f"rules {list(rules)} instead of {list(UPDATES)}")


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


def _each(rule: Rule, before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, gradient and direction of each parameter, after its states have been checked; none on an overflow."""
    skip = before.get("found_inf") is not None and bool(before["found_inf"].item())
    for i in range(len(before["params"])):
        if skip:
            for key in ("params", "steps", *rule.state_names):
                expect(torch.equal(after[key][i], before[key][i]), f"{key}[{i}] changed although found_inf is set")
            continue
        expect(torch.equal(after["steps"][i], before["steps"][i] + 1), f"steps[{i}] is not one more")
        p, g, old = _values(rule, i, before)
        t = int(after["steps"][i].item())
        u, new = UPDATES[rule.name].direction(p, g, old, t, **_options(rule, i, before))
        for state, x, former in zip(rule.states, new, old, strict=True):
            _expect_state(state, i, torch.where(g.isfinite(), x, former), before, after)
        yield i, g, u


def _step(rule: Rule, before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    for i, g, u in _each(rule, before, after):
        p, t = before["params"][i].double(), int(after["steps"][i].item())
        new_p = UPDATES[rule.name].along(p, u, t, **_options(rule, i, before))
        expect_close(after["params"][i], torch.where(g.isfinite(), new_p, p), f"params[{i}]")


def _direction(rule: Rule, before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    found = 0
    for i, g, u in _each(rule, before, after):
        found, direction = found + 1, after["directions"][i]
        expect(torch.equal(direction.isnan(), ~g.isfinite()), f"directions[{i}] is not NaN just where the gradient is")
        expect_close(direction.nan_to_num(nan=0.0), torch.where(g.isfinite(), u, 0.0), f"directions[{i}]")
    if not found:
        expect(all(bool(x.isnan().all()) for x in after["directions"]), "directions although found_inf is set")


def _apply(rule: Rule, before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    for i, u in enumerate(before["directions"]):
        p, t = before["params"][i].double(), int(before["steps"][i].item())
        new_p = UPDATES[rule.name].along(p, u.double(), t, **_options(rule, i, before))
        expect_close(after["params"][i], torch.where(u.isnan(), p, new_p), f"params[{i}]")


def _expect_state(state: State, i: int, x: Tensor, before: dict[str, Any], after: dict[str, Any]) -> None:
    """That the operator has coded these values."""
    actual, scales, what = after[state.name][i], after[f"{state.name}_absmax"], f"{state.name}[{i}]"
    if scales:
        expect_coded(actual, scales[i], x, _codec_of(state, before), state.role, what)
    else:
        expect_close(actual, x, what)


def _codec_of(state: State, before: dict[str, Any]) -> Codec:
    """The codec that a call names for a state that has scales."""
    names = before.get("codec", DEFAULT_CODEC).split(",")
    return CODECS[names[0] if len(names) == 1 else names[_place(state, before)]]


def _place(state: State, before: dict[str, Any]) -> int:
    names = [name.removesuffix("_absmax") for name in before if name.endswith("_absmax")]
    return names.index(state.name)


def _encode_state(before: dict[str, Any], result: tuple[Tensor, Tensor], _after: dict[str, Any]) -> None:
    codec, role, values = CODECS[before["codec"]], ROLES[before["role"]], before["values"].double()
    if not role.signed:
        values = torch.where(values > 0, values, 0.0)
    expect_coded(*result, values, codec, role, "codes")


def _decode_state(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    values = decoded(before["codes"], before["absmax"], CODECS[before["codec"]], ROLES[before["role"]])
    expect(torch.equal(result, values), "values wrong")


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
    names = [option.name for option in rule.options]
    held = before["options"].tolist() if before.get("options") is not None else map(before.get, names)
    trust = before["trust"][i].item() if before.get("trust") is not None else 1.0
    return {**dict(zip(names, held, strict=True)), "lr": before["lr"].item(), "trust": trust}


def _decoded(state: State, i: int, before: dict[str, Any]) -> Tensor:
    codes, scales = before[state.name][i], before[f"{state.name}_absmax"]
    return decoded(codes, scales[i], _codec_of(state, before), state.role).double() if scales else codes.double()


# ---- norms -----------------------------------------------------------------------------------------------------


def _expect_norms(actual: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    expect(actual.shape == (len(tensors),) and actual.dtype == torch.float64, "norms of the wrong shape or dtype")
    for i, x in enumerate(tensors):
        expected = x.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum()
        expect((actual[i] - expected).abs() <= tolerance * expected, f"norm {i} is {actual[i]}, not {expected}")


def _squared_norms(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_norms(result, before["tensors"], 1e-12)


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
    **{rule.direction: partial(_direction, rule) for rule in RULES.values()},
    **{rule.apply: partial(_apply, rule) for rule in RULES.values()},
    "encode_state": _encode_state,
    "decode_state": _decode_state,
    "squared_norms": _squared_norms,
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
