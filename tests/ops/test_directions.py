"""Steps by halves, states with codecs of their own, and states outside a step: operators against one another.

The whole step is held to the papers by test_rules.py; here it is the reference.
"""

import math
import re

import pytest
import torch
from torch import Tensor

from bnbops import facts
from bnbops.testing.samples import operator
from cases.backends import on_every_backend
from cases.rules import CODECS, DTYPES, assert_same, every_case, option_tensor, step_and_check, usual
from reference.group import NOT_NEGATIVE, Group, random_group

SHAPES = [(5, 257), (1, 513), (2, 1), (17, 512), (4, 3, 5, 7), (300,), (1,), (0,), (3, 0)]
MIXABLE = [rule.name for rule in facts.RULES.values() if len(rule.states) > 1]


def spoiled(grad: Tensor) -> Tensor:
    grad.view(-1)[::7] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(grad.numel())[: len(grad.view(-1)[::7])]
    return grad


def bits(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])


def assert_same_bits(a: Group, b: Group) -> None:
    for xs, ys in zip(a.lists().values(), b.lists().values(), strict=True):
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys, strict=True))


# ---- halves ----------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_a_step_is_its_halves(rule, codec, dtype):
    """Bit for bit, elements included that are left alone, whose direction is NaN."""
    group = random_group(rule, SHAPES, **codec, dtype=dtype, steps=(0, 1, 6, 999))
    group = group.with_grads([spoiled(g) for g in group.grads])
    halves = group.clone()
    trust = {"trust": torch.linspace(0.1, 2, len(SHAPES))} if facts.RULES[rule].trust != "none" else {}
    scaling = {"grad_scale": torch.tensor([3.0]), "clip": torch.linspace(0.3, 1, len(SHAPES)), "maximize": True}
    group.step(None, **scaling, **trust)
    directions = halves.half_steps(None, **scaling, **trust)
    assert_same_bits(group, halves)
    for direction, grad in zip(directions, group.grads, strict=True):
        assert torch.equal(direction.isnan(), ~grad.isfinite())


@on_every_backend
@pytest.mark.parametrize("rule", facts.RULES)
def test_options_in_a_tensor(rule):
    group = random_group(rule, [(3, 300), (70,)], bits=32)
    held, changed = group.clone(), {"weight_decay": 0.3, "eps": 1e-3, "beta1": 0.8}
    group.step(usual(rule, **changed))
    params, grads, *others = held.lists().values()
    directions = [torch.empty(p.shape) for p in params]
    options = usual(rule) | {"lr": torch.tensor(usual(rule)["lr"], dtype=torch.float64)}
    options["options"] = option_tensor(rule, **changed)
    operator(facts.RULES[rule].direction)(params, grads, directions, *others, **options)
    operator(facts.RULES[rule].apply)(params, directions, held.steps, **options)
    assert_same_bits(group, held)


@on_every_backend
@every_case
def test_an_overflow_leaves_everything_alone(rule, codec):
    group = random_group(rule, [(3, 300), (70,)], **codec)
    before = group.clone()
    directions = group.half_steps(None, found_inf=torch.tensor([1.0]))
    assert all(bool(x.isnan().all()) for x in directions)
    assert_same_bits(before, group)


# ---- codecs ----------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rule", MIXABLE)
def test_one_state_in_8_bits_and_another_in_32(rule, dtype, layout):
    names = facts.RULES[rule].state_names
    for plain in (names[:1], names[1:], names[-1:]):
        group = random_group(rule, SHAPES[:-2], bits=8, layout=layout, dtype=dtype, steps=(0, 999)).with_fp32(*plain)
        step_and_check(group.clone())
        listed, halves = group.clone(), group.clone()
        group.step()
        listed.step(None, codec=",".join("fp32" if name in plain else "dynamic8" for name in names))
        halves.half_steps()
        assert_same_bits(group, listed)
        assert_same_bits(group, halves)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (
            "dynamic",
            "codec must be 'dynamic8', {others}'fp32', or one of these for each state with commas between, got",
        ),
        ("dynamic8,dynamic8,dynamic8", "codec names 3 codecs for 2 states, got 'dynamic8,dynamic8,dynamic8'"),
        ("dynamic8,fp32", "exp_avg_sq_absmax has 1 tensors, which does not fit the codec that 'dynamic8,fp32' names"),
        ("fp32", "exp_avg_absmax has 1 tensors, which does not fit the codec that 'fp32' names for exp_avg"),
        ("", "codec must be"),
    ],
)
def test_codecs_that_do_not_fit_are_refused(codec, message):
    group = random_group("adam", [(3, 300)], bits=8)
    before, others = group.clone(), "".join(f"'{name}', " for name in [*facts.CODECS][1:])
    with pytest.raises(RuntimeError, match=re.escape("bnbops::adam_step_: " + message.replace("{others}", others))):
        group.step(None, codec=codec)
    assert_same_bits(before, group)


def test_bad_directions_are_refused():
    group = random_group("adam", [(3, 300)], bits=8)
    before, lists = group.clone(), list(group.lists().values())
    options = usual("adam") | {"lr": torch.tensor(0.1)}
    bad = {
        "directions has 0 tensors for 1 params": [],
        "directions[0] must be float32, got bfloat16": [torch.zeros(3, 300, dtype=torch.bfloat16)],
        "directions[0] has shape [300, 3], but its parameter has [3, 300]": [torch.zeros(300, 3)],
        "directions[0] must be contiguous; call .contiguous() first": [torch.zeros(300, 3).t()],
    }
    for message, directions in bad.items():
        with pytest.raises(RuntimeError, match=re.escape(f"bnbops::adam_direction_: {message}")):
            torch.ops.bnbops.adam_direction_(lists[0], lists[1], directions, *lists[2:], **options)
        with pytest.raises(RuntimeError, match=re.escape(f"bnbops::adam_apply_: {message}")):
            torch.ops.bnbops.adam_apply_(lists[0], directions, group.steps, **options)
    with pytest.raises(RuntimeError, match=r"adam_direction_: params.* share memory"):
        torch.ops.bnbops.adam_direction_(lists[0], lists[1], lists[0], *lists[2:], **options)
    assert_same_bits(before, group)


# ---- states outside a step -------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize("name", ["exp_avg", *sorted(NOT_NEGATIVE)])
def test_a_state_is_coded_as_a_step_codes_it(name, layout):
    """A step that leaves every element alone decodes and encodes; the same codes come from the operators."""
    rule = next(rule for rule in facts.RULES.values() if name in rule.state_names)
    shapes = [shape for shape in SHAPES if len(shape) > 1 or layout == "flat"]
    group = random_group(rule.name, shapes, **CODECS[f"8-bit {layout}"])
    group = group.with_grads([torch.full_like(g, math.nan) for g in group.grads])
    role, place = facts.STATES[name].role.name, list(group.states).index(name)
    values = [group.state_values(i)[place] for i in range(len(shapes))]
    for i, x in enumerate(values):
        decoded = torch.ops.bnbops.decode_state(group.states[name][i], group.absmax[name][i], "dynamic8", role)
        assert torch.equal(decoded, x)
    group.step()
    for i, x in enumerate(values):
        codes, absmax = torch.ops.bnbops.encode_state(x, "dynamic8", role, flat=layout == "flat")
        assert torch.equal(codes, group.states[name][i])
        assert torch.equal(absmax, group.absmax[name][i].view(absmax.shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ("encode_state", x, "none", "signed"), "encode_state: codec must be 'dynamic8', "),
        (lambda x: ("encode_state", x, "fp32", "signed"), "encode_state: codec must be one that has codes, got 'fp32'"),
        (
            lambda x: ("encode_state", x, "dynamic8", "master"),
            "encode_state: role must be one of 'signed', 'square', 'signed_square', got 'master'",
        ),
        (
            lambda x: ("encode_state", x.half(), "dynamic8", "signed"),
            "encode_state: values must be float32, got float16",
        ),
        (lambda x: ("decode_state", x, x, "dynamic8", "signed"), "decode_state: codes must be uint8, got float32"),
        (
            lambda x: ("decode_state", x.to(torch.uint8), x, "dynamic8", "signed"),
            "decode_state: absmax has shape [3, 300], but params of shape [3, 300] need [3, 2]",
        ),
    ],
)
def test_what_is_no_state_is_refused(call, message):
    name, *arguments = call(torch.ones(3, 300))
    with pytest.raises(RuntimeError, match=re.escape(f"bnbops::{message}")):
        operator(name)(*arguments)


def test_mixed_steps_are_those_of_each_state():
    """The codec of one state is nothing to the other: from the same values, they go the same way."""
    coded = random_group("adam", SHAPES, bits=8, steps=(0, 999))
    mixed = coded.clone().with_fp32("exp_avg_sq")
    coded.step()
    mixed.step()
    assert_same(
        Group("momentum", coded.params, coded.grads, {"momentum_buffer": coded.states["exp_avg"]}),
        Group("momentum", mixed.params, mixed.grads, {"momentum_buffer": mixed.states["exp_avg"]}),
    )
