"""Samples of the operators of optimizers: steps and their halves, states outside a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import CODECS, DEFAULT_CODEC, FLOATS, ROLES, STATE_BLOCK, UNCODED, Codec, Role, Rule, State, name_of
from bnbops.testing.sample import Sample, full, normal, random_codes, strided, tensor

# ---- optimizer steps -------------------------------------------------------------------------------------------

_OPTIONS: dict[str, float] = {
    **{"beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 0.9, "momentum": 0.9, "dampening": 0.1, "nesterov": False},
    **{"eps": 1e-8, "weight_decay": 0.1, "lr_decay": 0.1, "bias_correction": True, "adam_w_mode": True},
    **{"t_alpha": 5, "t_beta3": 5},
}
_VARIATIONS: dict[str, dict[str, Any]] = {
    "nesterov": {"nesterov": True, "dampening": 0.0},
    "no bias correction, coupled weight decay": {"bias_correction": False, "adam_w_mode": False},
    "no schedules": {"t_alpha": 0, "t_beta3": 0},
}
_SHAPES = ((3, 300), (70,))


def steps(rule: Rule) -> list[Sample]:
    """Made from the facts alone, so that a new optimizer gets its samples with its rule."""
    return _essential_steps(rule) + (_further_steps(rule) if rule.name == "adam" else [])


def _usual(rule: Rule) -> dict[str, float]:
    return {option.name: _OPTIONS[option.name] for option in rule.options}


def _halved(rule: Rule) -> Tensor:
    """Other options, to take the place of the usual ones."""
    return tensor([x / 2 if isinstance(x, float) else x for x in _usual(rule).values()], torch.float64)


def _essential_steps(rule: Rule) -> list[Sample]:
    """What may differ from one rule to the next."""
    sample = partial(_step_sample, rule)
    trust: dict[str, Any] = {"trust": tensor([0.3, 2.0])} if rule.trust != "none" else {}
    scaling: dict[str, Any] = {"grad_scale": full((1,), 4.0), "found_inf": full((1,), 0.0), "clip": tensor([0.5, 1.0])}
    found = [
        sample("float32 states, float32", 32),
        sample("8-bit states in rows, bfloat16", 8, dtype=torch.bfloat16),
        sample("flat 8-bit states, float16", 8, "flat", dtype=torch.float16),
        sample("maximize, scaled and clipped gradients", 8, maximize=True, codec=DEFAULT_CODEC, **scaling, **trust),
        sample("options in a tensor", 32, options=_halved(rule)),
        sample("non-finite gradient elements", 32, grad=with_non_finite),
        *_mixed_steps(rule),
        *(sample(what, 8, **options) for what, options in _VARIATIONS.items() if options.keys() <= _usual(rule).keys()),
    ]
    return [s for s in found if rule.states or "8-bit" not in s.name]


def _further_steps(rule: Rule) -> list[Sample]:
    """What all rules share, once: each sample costs the tests seconds."""
    sample = partial(_step_sample, rule)
    low, one, overflow = torch.bfloat16, full((1,), 1.0), tensor(1.0)
    return [
        *(sample(f"float32 states, {name_of(dtype)}", 32, dtype=dtype) for dtype in FLOATS[1:]),
        *(sample(f"8-bit states in rows, {name_of(dtype)}", 8, dtype=dtype) for dtype in FLOATS[::2]),
        *(sample(f"flat 8-bit states, {name_of(dtype)}", 8, "flat", dtype=dtype) for dtype in FLOATS[:2]),
        sample("float32 states, float32 gradients", 32, dtype=low, grad_dtype=torch.float32),
        sample("8-bit states, float32 gradients", 8, dtype=low, grad_dtype=torch.float32),
        sample("three dimensions", 8, shapes=((2, 3, 90),)),
        sample("strided gradients", 8, grad=strided),
        sample("expanded gradients", 32, grad=lambda g: g.flatten()[0].expand(g.shape)),
        sample("transposed gradients", 8, shapes=((30, 40),), grad=lambda g: g.t().contiguous().t()),
        sample("8-bit states, non-finite gradient elements", 8, grad=with_non_finite),
        sample("maximize", 8, maximize=True),
        sample("float32 lr, scaled gradients", 32, lr=tensor([0.1]), grad_scale=4 * one, found_inf=0 * one),
        sample("overflow found", 8, grad_scale=4 * one, found_inf=overflow),
        sample("no parameters", 8, shapes=()),
        sample("empty parameters", 8, shapes=((0,), (0, 5), (3, 0))),
        sample("empty parameters, float32 states", 32, shapes=((0,), (2, 2), (3, 0))),
        sample("scalar parameter", 32, shapes=((),)),
        sample("flat scalar parameter", 8, "flat", shapes=((), (1,))),
    ]


def _step_sample(
    rule: Rule,
    what: str,
    coded: str | int,
    layout: str = "rows",
    *,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    shapes: tuple[tuple[int, ...], ...] = _SHAPES,
    grad: Callable[[Tensor], Tensor] = lambda g: g,
    **changed: Any,
) -> Sample:
    params = [normal(*shape, seed=1).to(dtype) for shape in shapes]
    grads = [grad(normal(*shape, seed=2).to(grad_dtype or dtype)) for shape in shapes]
    codecs = coded.split(",") if isinstance(coded, str) else [DEFAULT_CODEC if coded == 8 else UNCODED]
    codecs = codecs * len(rule.states) if len(codecs) == 1 else codecs
    states, absmax = [], []
    for k, state in enumerate(rule.states):
        states.append([_state(state, shape, codecs[k], seed=3 + k) for shape in shapes])
        absmax.append([_scales(shape, layout, seed=3 + k) for shape in shapes] if codecs[k] != UNCODED else [])
    if isinstance(coded, str):
        changed["codec"] = coded
    steps = [tensor(float(3 * i)) for i in range(len(shapes))]
    kwargs = {"lr": tensor(0.1, torch.float64), **_usual(rule), **changed}
    return Sample(what, (params, grads, *states, *absmax, steps), kwargs)


def _mixed_steps(rule: Rule) -> list[Sample]:
    """Steps whose states have several codecs, and each codec's but for the default one."""
    found = [_step_sample(rule, f"{codec} states", codec, dtype=torch.bfloat16) for codec in [*CODECS][1:]]
    kinds = [*CODECS, UNCODED] * len(rule.states)
    if len(rule.states) > 1:
        found.append(_step_sample(rule, "states of several codecs", ",".join(kinds[1 : len(rule.states) + 1])))
    return found


def directions(rule: Rule) -> list[Sample]:
    """The samples of the whole step, with memory for the directions."""
    found = []
    for s in _essential_steps(rule):
        params, grads, *others = s.args
        directions = [full(tuple(x.shape), -1.0) for x in params]
        kwargs = {k: v for k, v in s.kwargs.items() if k != "trust" or rule.trust == "gradient"}
        found.append(Sample(s.name, (params, grads, directions, *others), kwargs))
    overflow = found[0].clone()
    return [*found, replace(overflow, name="overflow found", kwargs={**overflow.kwargs, "found_inf": tensor(1.0)})]


def applications(rule: Rule) -> list[Sample]:
    """Steps along directions, some of whose elements are to be left alone."""

    def sample(what: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Sample:
        params = [normal(*shape, seed=1).to(dtype) for shape in _SHAPES]
        directions = [normal(*shape, seed=2) for shape in _SHAPES]
        for x in directions:
            x.view(-1)[1::5] = math.nan
        kwargs = {"lr": tensor(0.1, torch.float64), **_usual(rule), **changed}
        return Sample(what, (params, directions, [tensor(1.0), tensor(4.0)]), kwargs)

    trust = {"trust": tensor([0.3, 2.0])} if rule.trust == "direction" else {}
    return [
        *(sample(name_of(dtype), dtype, **trust) for dtype in FLOATS),
        sample("options in a tensor", options=_halved(rule)),
    ]


def encoded() -> list[Sample]:
    x = normal(3, 301)
    special = tensor([math.nan, 1.0, -0.0, 0.0] + [0.0] * 4 + [math.inf, -1.0, math.nan, 0.0])
    found = []
    for codec in CODECS:
        for role in ROLES.values():
            values = x.abs() if role.divisor else x
            found.append(Sample(f"{codec}, {role.name}", (values, codec, role.name)))
        found += [
            Sample(f"{codec}, flat", (x, codec, "signed", True)),
            Sample(f"{codec}, a vector", (x.flatten(), codec, "signed")),
            Sample(f"{codec}, nan, infinity and negative numbers", (special, codec, "square")),
            Sample(f"{codec}, transposed", (x.t(), codec, "signed")),
            Sample(f"{codec}, empty", (full((0, 5), 0.0), codec, "signed")),
        ]
    return found


def decoded() -> list[Sample]:
    def sample(
        what: str, codec: Codec, role: str, layout: str = "rows", view: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Sample:
        codes = view(_codes(codec, ROLES[role], (3, 301)))
        return Sample(f"{codec.name}, {what}", (codes, _scales(tuple(codes.shape), layout, 1), codec.name, role))

    found = []
    for codec in CODECS.values():
        found += [sample(role, codec, role) for role in ROLES]
        found += [sample("flat", codec, "signed", "flat"), sample("transposed", codec, "signed", view=Tensor.t)]
    return found


def _codes(codec: Codec, role: Role, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Codes of all values that a state of the role may have."""
    lowest = 0 if role.divisor else -1
    of_values = [code for code, value in enumerate(codec.values(role)) if lowest <= value <= 1]
    place = random_codes(*shape, seed=seed).long() % len(of_values)
    return torch.tensor(of_values, dtype=torch.uint8, device="cpu")[place].view(codec.dtype)


def _state(state: State, shape: tuple[int, ...], codec: str, seed: int) -> Tensor:
    if codec == UNCODED:
        return 0.1 * normal(*shape, seed=seed).square()
    return _codes(CODECS[codec], state.role, shape, seed)


def _scales(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    if layout == "flat":
        return 0.1 * normal(-(math.prod(shape) // -STATE_BLOCK), seed=seed).abs()
    return 0.1 * normal(shape[0], -(math.prod(shape[1:]) // -STATE_BLOCK), seed=seed).abs()


def with_non_finite(grad: Tensor) -> Tensor:
    for start, value in enumerate((math.nan, math.inf, -math.inf)):
        grad.view(-1)[start::7] = value
    return grad
