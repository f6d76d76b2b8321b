"""The optimizer operators, all of them alike: special values, memory, threads, and what they refuse."""

import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from cases.backends import on_every_backend
from cases.rules import CODECS, DTYPES, assert_same, every_case, option_tensor, step_and_check, usual
from reference.group import fresh_group, random_group
from reference.rules import RULES

MAX = torch.finfo(torch.float32).max


def no_nan(group) -> bool:
    values = [*group.params, *(x for i in range(len(group.params)) for x in group.state_values(i))]
    return not any(x.isnan().any() for x in values)


# ---- special values --------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_non_finite_gradient_elements_are_left_out(rule, codec, dtype):
    """They keep parameter and states; every other element of their block gets its step. `check_step` knows both."""
    group = random_group(rule, [(3, 300), (256,), (2, 5), (40,), (40,)], **codec, dtype=dtype, steps=(0, 7))
    values = (math.nan, math.inf, -math.inf)
    for grad in group.grads:
        for start, value in enumerate(values):
            grad.view(-1)[start::7] = value
    for grad, value in zip(group.grads[2:], values, strict=True):
        grad.fill_(value)
    # a factor of 0 makes no number of infinity either
    before = step_and_check(group, clip=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    untouched = [(before.params, group.params)]
    if codec["bits"] == 32:
        untouched += [(before.states[name], group.states[name]) for name in group.states]
    for old, new in untouched:
        for grad, a, b in zip(group.grads, old, new, strict=True):
            assert torch.equal(a[~grad.isfinite()], b[~grad.isfinite()])


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@every_case
def test_zero_gradients_from_the_start(rule, codec, eps):
    """0 / 0 is no step: nothing moves without weight decay, and zero blocks stay zero."""
    group = fresh_group(rule, [(3, 300), (64,)], **codec)
    start = group.clone()
    for _ in range(3):
        step_and_check(group, usual(rule, eps=eps, weight_decay=0.0))
    assert all(torch.equal(p, q) for p, q in zip(start.params, group.params, strict=True))
    assert all((x == 0).all() for i in range(2) for x in group.state_values(i))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@every_case
def test_weight_decay_alone(rule, codec, eps):
    """Without gradients: coupled, it fills the states and is normalised with them; decoupled, it shrinks parameters."""
    group = fresh_group(rule, [(3, 300), (64,)], **codec)
    for _ in range(3):
        step_and_check(group, usual(rule, eps=eps, weight_decay=0.1))


# No step is longer than this many lr, whatever the gradients: 1 for a sign, 1 / sqrt(1 - alpha) for a gradient over
# the root of an average it is part of, Adam's bound (section 2.1) likewise, and sums of these for averages of them.
LONGEST_STEP = {"adam": 4, "lamb": 4, "lion": 1, "rmsprop": 10, "rmsprop_momentum": 100, "adagrad": 1, "ademamix": 24}


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@every_case
def test_huge_gradients_do_no_harm(rule, codec, eps):
    """Where squares overflow: nothing becomes NaN, no step exceeds its bound, and other blocks do not notice."""
    options = usual(rule, lr=1e-2, eps=eps, weight_decay=0.0, t_alpha=0, t_beta3=0)
    group = fresh_group(rule, [(3, 300)], **codec)
    calm, calm_grad = group.clone(), random_group(rule, [(3, 300)], bits=32).grads[0]
    grad = calm_grad.clone()
    grad[0, :240:3] = torch.tensor([1e19, -1e25, MAX, -MAX, 1.0]).repeat(16)
    grad[1, 5] = MAX
    for sign in (1, -1, 1, 1, -1, 1):
        before = group.params[0].clone()
        group, calm = group.with_grads([sign * grad]), calm.with_grads([sign * calm_grad])
        group.step(options)
        calm.step(options)
        moved = (group.params[0] - before).abs()
        assert (moved <= 1.001 * LONGEST_STEP.get(rule, math.inf) * options["lr"]).all()
        assert no_nan(group) and all(x.isfinite().all() for xs in group.absmax.values() for x in xs)
    assert torch.equal(group.params[0][2], calm.params[0][2])
    for x, y in zip(group.state_values(0), calm.state_values(0), strict=True):
        assert torch.equal(x[2], y[2])


@on_every_backend
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("sgd", "lion", "signum")])
def test_elements_that_overflow_are_left_out(rule):
    """The square of a gradient, or a buffer: nothing of the element changes, rather than becoming infinite."""
    group = random_group(rule, [(3, 300)], bits=32)
    for buffer in group.states.get("momentum_buffer", []):
        buffer.fill_(MAX)
    before = group.with_grads([group.grads[0].index_fill(1, torch.tensor([5]), MAX)]).clone()
    group = before.clone()
    group.step(usual(rule, momentum=0.99))
    for old, new in zip([before.params, *before.states.values()], [group.params, *group.states.values()], strict=True):
        assert torch.equal(old[0][:, 5], new[0][:, 5]) and new[0].isfinite().all()


@every_case
def test_tiny_gradients_turn_nothing_into_nan(rule, codec):
    """Squares become denormal or zero."""
    magnitudes = [1e-18, 1e-20, 1e-22, 1e-30, 1e-38, 1e-42]
    group = fresh_group(rule, [(2, 300)] * len(magnitudes), **codec)
    group = group.with_grads([torch.full((2, 300), magnitude) for magnitude in magnitudes])
    for _ in range(3):
        group.step(usual(rule, eps=0.0, weight_decay=0.0))
        assert all(p.isfinite().all() for p in group.params) and no_nan(group)


@on_every_backend
@pytest.mark.parametrize("rule", ["momentum", "lars"])
def test_the_first_step_ignores_what_is_in_the_buffer(rule):
    """torch.optim.SGD has no buffer before it."""
    group = random_group(rule, [(3, 300)], bits=32, steps=(0,))
    other = group.clone()
    group.states["momentum_buffer"][0].zero_()
    other.states["momentum_buffer"][0].fill_(1e30)
    group.step()
    other.step()
    assert_same(group, other)


# ---- memory and threads ----------------------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "padded rows": lambda x: pad(x, (3, 5))[:, 3:-5],
}


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_strided_gradients_work(rule, codec, dtype):
    group = random_group(rule, [(30, 40), (5, 300)] * len(VIEWS), **codec, dtype=dtype)
    views = [view for view in VIEWS for _ in range(2)]
    strided = group.clone().with_grads([VIEWS[view](g) for view, g in zip(views, group.grads, strict=True)])
    assert not any(g.is_contiguous() for g in strided.grads)
    group.step()
    strided.step()
    assert_same(group, strided)


@on_every_backend
@every_case
def test_expanded_gradient_works(rule, codec):
    """loss.sum().backward() leaves a gradient of stride 0."""
    group = random_group(rule, [(30, 40)], **codec)
    expanded = group.clone().with_grads([torch.tensor(0.5).expand(30, 40)])
    group.with_grads([torch.full((30, 40), 0.5)]).step()
    expanded.step()
    assert_same(group.with_grads(expanded.grads), expanded)


@every_case
def test_fp32_and_low_precision_gradients_agree(rule, codec):
    """A bf16 gradient and the same values in fp32 give the same bits."""
    low = random_group(rule, [(7, 300)], **codec, dtype=torch.bfloat16)
    high = low.clone().with_grads([g.float() for g in low.grads])
    low.step()
    high.step()
    assert_same(low.with_grads(high.grads), high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_threads_change_no_bit(rule, codec, dtype):
    shapes = [(100, 300), (2, 40_000), (5, 3), (300,), (1, 1), *[(64, 33)] * 10]
    group = random_group(rule, shapes, **codec, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(group.clone())
        results[-1].step()
        results[-1].step()
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# ---- refusals --------------------------------------------------------------------------------------------------

RATE = ("must be in [0, 1)", (math.nan, -0.1, 1.0, math.inf))
AMOUNT = ("must be finite and not negative", (math.nan, -1e-3, math.inf))
FINITE = ("must be finite", (math.nan, math.inf, -math.inf))
COUNT = ("must be 0 or more", (-1,))
OUT_OF_RANGE = {
    "lr": FINITE,
    "beta1": RATE,
    "beta2": RATE,
    "beta3": RATE,
    "alpha": RATE,
    "momentum": AMOUNT,
    "dampening": FINITE,
    "eps": AMOUNT,
    "weight_decay": AMOUNT,
    "lr_decay": AMOUNT,
    "t_alpha": COUNT,
    "t_beta3": COUNT,
}
BAD_OPTIONS = [
    (rule, {name: value}, f"{name} {message}")
    for rule in RULES
    for name, bad in OUT_OF_RANGE.items()
    if name in RULES[rule].options
    for message, values in [AMOUNT if (rule, name) == ("ademamix", "alpha") else bad]
    for value in values
]
BAD_OPTIONS += [
    (rule, {"nesterov": True, **changed}, "nesterov needs a momentum and no dampening")
    for rule in ("momentum", "lars")
    for changed in ({"momentum": 0.0, "dampening": 0.0}, {"dampening": 0.1})
]


def check_refused(rule: str, options: dict, message: str, /, **scaling: Tensor) -> None:
    """Refused with these words, and nothing has changed."""
    group = random_group(rule, [(5, 300), (64,)], **CODECS["8-bit rows"] if RULES[rule].states else CODECS["fp32"])
    before = group.clone()
    with pytest.raises(RuntimeError, match=re.escape(f"bnbops::{rule}_step_: {message}")):
        group.step(options, **scaling)
    assert_same(before, group)


def test_every_number_has_its_range():
    numbers = {name for rule in RULES.values() for name, value in rule.options.items() if type(value) is not bool}
    assert numbers == set(OUT_OF_RANGE)


@on_every_backend
@pytest.mark.parametrize(("rule", "changed", "message"), BAD_OPTIONS)
def test_options_out_of_range_are_refused(rule, changed, message):
    check_refused(rule, usual(rule) | changed, message)


BAD_TENSORS = {
    "too short": (lambda x: x[:-1], "must have shape [{}], one number for each option in the schema's order"),
    "too long": (lambda x: torch.cat([x, x]), "must have shape [{}], one number for each option in the schema's order"),
    "a matrix": (lambda x: x[None], "must have shape [{}], one number for each option in the schema's order"),
    "float32": (Tensor.float, "must be float64, got float32"),
    "strided": (lambda x: torch.cat([x, x]).repeat_interleave(2)[::2], "must be contiguous"),
}


@on_every_backend
@pytest.mark.parametrize("case", BAD_TENSORS)
@pytest.mark.parametrize("rule", RULES)
def test_bad_tensors_of_options_are_refused(rule, case):
    spoil, message = BAD_TENSORS[case]
    good = option_tensor(rule)
    check_refused(rule, usual(rule), f"options {message.format(len(good))}", options=spoil(good))


@pytest.mark.parametrize(("rule", "changed", "message"), [case for case in BAD_OPTIONS if "lr" not in case[1]])
def test_options_out_of_range_are_refused_in_a_tensor(rule, changed, message):
    check_refused(rule, usual(rule), message, options=option_tensor(rule, **changed))


BAD_FACTORS = {
    "too few": (torch.ones(1), "must have shape [2], one number for each parameter, got [1]"),
    "too many": (torch.ones(3), "must have shape [2], one number for each parameter, got [3]"),
    "a matrix": (torch.ones(2, 1), "must have shape [2], one number for each parameter, got [2, 1]"),
    "float64": (torch.ones(2).double(), "must be float32, got float64"),
    "strided": (torch.ones(4)[::2], "must be contiguous"),
    "on another device": (torch.ones(2, device="meta"), ""),
}
FACTORS = [(rule, name) for rule in RULES for name in ["clip", "trust"][: 1 + RULES[rule].trust]]


@on_every_backend
@pytest.mark.parametrize("case", BAD_FACTORS)
@pytest.mark.parametrize(("rule", "name"), FACTORS)
def test_bad_clip_and_trust_are_refused(rule, name, case):
    bad, message = BAD_FACTORS[case]
    check_refused(rule, usual(rule), f"{name} {message}" if message else "", **{name: bad})


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
@pytest.mark.parametrize(("rule", "name"), FACTORS)
def test_clip_and_trust_out_of_range_are_refused(rule, name, value):
    check_refused(rule, usual(rule), f"{name}[1] must be finite and not negative", **{name: torch.tensor([1.0, value])})


@on_every_backend
@pytest.mark.parametrize(("rule", "name"), FACTORS)
def test_clip_and_trust_that_share_memory_with_a_step_are_refused(rule, name):
    group = random_group(rule, [(5, 300), (64,)], bits=32)
    memory = torch.ones(2)
    group.steps = [memory[0], memory[1]]
    before = group.clone()
    with pytest.raises(RuntimeError, match="share memory"):
        group.step(**{name: memory})
    assert_same(before, group)


def test_only_lamb_and_lars_take_a_trust_ratio():
    assert [rule for rule in RULES if RULES[rule].trust] == ["lamb", "lars"]
    with pytest.raises(RuntimeError, match="trust"):
        random_group("adam", [(3, 4)], bits=32).step(trust=torch.ones(1))
