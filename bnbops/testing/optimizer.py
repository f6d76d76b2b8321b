"""The operators of optimizers: what they give, and sample calls of norms (those of steps and states in a file of
their own)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import CODECS, FLOATS, ROLES, RULES, Codec, Role, Rule, State, codec_at
from bnbops.testing import samples_optimizer as on
from bnbops.testing.expect import Arguments, Checked, exactly, expect, expect_close, expect_encoded
from bnbops.testing.references.blockwise import decode
from bnbops.testing.references.rules import UPDATES
from bnbops.testing.sample import Sample, full, normal, strided, tensor

# ---- steps -----------------------------------------------------------------------------------------------------


def _each(rule: Rule, a: Arguments) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, gradient and direction of each parameter, after its states have been checked; none on an overflow."""
    if _overflow(a):
        for key in ("params", "steps", *rule.state_names):
            for i, (x, y) in enumerate(zip(getattr(a.after, key), getattr(a, key), strict=True)):
                expect(torch.equal(x, y), f"{key}[{i}] changed although found_inf is set")
        return
    for i, p in enumerate(a.params):
        expect(torch.equal(a.after.steps[i], a.steps[i] + 1), f"steps[{i}] is not one more")
        g, old = _gradient(i, a), [_state_values(*place, i, a) for place in enumerate(rule.states)]
        u, new = UPDATES[rule.name].direction(p.double(), g, old, int(a.steps[i]) + 1, **_options(rule, i, a))
        for k, state in enumerate(rule.states):
            _expect_state(k, state, i, torch.where(g.isfinite(), new[k], old[k]), a)
        yield i, g, u


def _expect_param(rule: Rule, i: int, u: Tensor, moves: Tensor, t: int, a: Arguments) -> None:
    """Parameter i is one step along u further, where it moves at all."""
    p = a.params[i].double()
    expected = UPDATES[rule.name].along(p, u, t, **_options(rule, i, a))
    expect_close(a.after.params[i], torch.where(moves, expected, p), f"params[{i}]")


def _step(rule: Rule, a: Arguments, _: None) -> None:
    for i, g, u in _each(rule, a):
        _expect_param(rule, i, u, g.isfinite(), int(a.steps[i]) + 1, a)


def _direction(rule: Rule, a: Arguments, _: None) -> None:
    for i, g, u in _each(rule, a):
        direction = a.after.directions[i]
        expect(torch.equal(direction.isnan(), ~g.isfinite()), f"directions[{i}] is not NaN just where the gradient is")
        expect_close(direction.nan_to_num(nan=0.0), torch.where(g.isfinite(), u, 0.0), f"directions[{i}]")
    if _overflow(a):
        expect(all(bool(x.isnan().all()) for x in a.after.directions), "directions although found_inf is set")


def _apply(rule: Rule, a: Arguments, _: None) -> None:
    for i, u in enumerate(a.directions):
        _expect_param(rule, i, u.double(), ~u.isnan(), int(a.steps[i]), a)


def _overflow(a: Arguments) -> bool:
    return a.found_inf is not None and bool(a.found_inf.item())


def _gradient(i: int, a: Arguments) -> Tensor:
    """Unscaled, clipped and negated as asked, in float64."""
    scale = 1.0 if a.grad_scale is None else a.grad_scale.double()
    clip = 1.0 if a.clip is None else a.clip[i].double()
    return a.grads[i].double() / scale * clip * (-1 if a.maximize else 1)


def _options(rule: Rule, i: int, a: Arguments) -> dict[str, Any]:
    """What the rule of parameter `i` gets; options in a tensor take the place of the others."""
    names = [option.name for option in rule.options]
    held = [getattr(a, name) for name in names] if a.options is None else a.options.tolist()
    trust = 1.0 if getattr(a, "trust", None) is None else a.trust[i].item()
    return {**dict(zip(names, held, strict=True)), "lr": a.lr.item(), "trust": trust}


# ---- states ----------------------------------------------------------------------------------------------------


def _state_values(k: int, state: State, i: int, a: Arguments) -> Tensor:
    """In float64."""
    held, scales = getattr(a, state.name)[i], getattr(a, f"{state.name}_absmax")
    if scales:
        held = decode(held, scales[i], _values(CODECS[codec_at(a.codec, k)], state.role, held))
    return held.double()


def _expect_state(k: int, state: State, i: int, x: Tensor, a: Arguments) -> None:
    """That the operator holds these values now."""
    held, scales = getattr(a.after, state.name)[i], getattr(a.after, f"{state.name}_absmax")
    if scales:
        codec = CODECS[codec_at(a.codec, k)]
        _expect_coded(held, scales[i], x, 2e-6 * x.abs(), codec, state.role, f"{state.name}[{i}]")
    else:
        expect_close(held, x, f"{state.name}[{i}]")


def _expect_coded(codes: Tensor, absmax: Tensor, x: Tensor, error: Tensor, codec: Codec, role: Role, what: str) -> None:
    expect(codes.dtype == codec.dtype and codes.shape == x.shape, f"{what} of the wrong shape or dtype")
    expect_encoded(codes, absmax, x, error, _values(codec, role, x), what, role.divisor)


def _values(codec: Codec, role: Role, like: Tensor) -> Tensor:
    return torch.tensor(codec.values(role), dtype=torch.float32, device=like.device)


def _encode_state(a: Arguments, result: tuple[Tensor, Tensor]) -> None:
    role = ROLES[a.role]
    x = (a.values if role.signed else torch.where(a.values > 0, a.values, 0.0)).double()
    _expect_coded(*result, x, torch.zeros_like(x), CODECS[a.codec], role, "codes")


_decode_state = exactly(lambda a: decode(a.codes, a.absmax, _values(CODECS[a.codec], ROLES[a.role], a.codes)))


# ---- norms -----------------------------------------------------------------------------------------------------


def _squared_norms() -> list[Sample]:
    x = normal(5, 301)
    return [
        Sample("every dtype", ([x.to(dtype) for dtype in FLOATS],)),
        Sample("one tensor", ([normal(9000)],)),
        Sample("strided, transposed, expanded", ([strided(x), x.t(), x[0].expand(7, 301)],)),
        Sample("non-finite elements", ([on.with_non_finite(x.clone()), full((3,), math.nan)],)),
        Sample("scalar and empty", ([tensor(-3.0), full((0,), 0.0), full((3, 0), 0.0)],)),
    ]


def _percentile_clip() -> list[Sample]:
    def sample(what: str, steps: tuple[float, ...], percentile: int, **scaling: Tensor) -> Sample:
        history = [normal(100, seed=i).square() for i in range(len(steps))]
        norms = 10 * normal(len(steps), seed=1).square().double()
        return Sample(what, (history, norms, [tensor(t) for t in steps]), {"percentile": percentile, **scaling})

    return [
        sample("first step and later ones", (0.0, 5.0, 99.0, 250.0), 5),
        sample("scaled gradients", (0.0, 5.0), 50, grad_scale=full((1,), 4.0), found_inf=full((1,), 0.0)),
        sample("overflow found", (0.0, 5.0), 99, grad_scale=tensor(4.0), found_inf=tensor(1.0)),
        sample("no parameters", (), 0),
    ]


def _expect_norms(a: Arguments, result: Tensor) -> None:
    expect(result.shape == (len(a.tensors),) and result.dtype == torch.float64, "norms of the wrong shape or dtype")
    for i, x in enumerate(a.tensors):
        expected = x.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum()
        expect((result[i] - expected).abs() <= 1e-12 * expected, f"norm {i} is {result[i]}, not {expected}")


def _expect_clipping(a: Arguments, result: Tensor) -> None:
    squares = a.squared_norms / (1.0 if a.grad_scale is None else a.grad_scale.double()) ** 2
    for i, step in enumerate(a.steps):
        t, history, factor = int(step.item()) + 1, a.gnorm_vec[i].double(), tensor(1.0)
        if not _overflow(a):
            newest = torch.arange(100, dtype=torch.int64, device=history.device) == t % 100
            history = torch.where(newest | (t == 1), squares[i], history)
            factor = (history.sort().values[a.percentile] / squares[i]).sqrt().clamp(max=1.0)
        expect_close(a.after.gnorm_vec[i], history, f"gnorm_vec[{i}]")
        expect_close(result[i], factor, f"factor {i}")


OPERATORS: dict[str, Checked] = {
    **{rule.step: (partial(on.steps, rule), partial(_step, rule)) for rule in RULES.values()},
    **{rule.direction: (partial(on.directions, rule), partial(_direction, rule)) for rule in RULES.values()},
    **{rule.apply: (partial(on.applications, rule), partial(_apply, rule)) for rule in RULES.values()},
    "encode_state": (on.encoded, _encode_state),
    "decode_state": (on.decoded, _decode_state),
    "squared_norms": (_squared_norms, _expect_norms),
    "percentile_clip_": (_percentile_clip, _expect_clipping),
}
