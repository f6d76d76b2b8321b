"""The optimizer operators, all of them alike, against the papers (reference/rules.py): what one step computes.

test_rules_edges.py has special values, memory, threads and refusals.
"""

import pytest
import torch

from bnbops import facts
from cases.backends import on_every_backend
from cases.rules import CASES, CODECS, DTYPES, assert_same, every_case, option_tensor, step_and_check, usual
from reference.group import NOT_NEGATIVE, fresh_group, random_group
from reference.rules import RULES

SHAPES = [(64, 64), (3, 256), (5, 257), (7, 255), (1, 513), (2, 1), (17, 512), (4, 3, 5, 7), (300,), (1,), (2, 3, 400)]


def test_the_references_are_of_all_operators():
    """Same rules, same states, same options."""
    assert {name: {s.name: s.role.signed for s in rule.states} for name, rule in facts.RULES.items()} == {
        name: rule.states for name, rule in RULES.items()
    }
    assert {name for name, state in facts.STATES.items() if state.role.divisor} == NOT_NEGATIVE
    around = {"params", "grads", "steps", "lr", "maximize", "options", "grad_scale", "found_inf", "clip", "codec"}
    for name, rule in RULES.items():
        assert rule.operator.name() == f"bnbops::{name}_step_"
        expected = [*rule.states, *(f"{state}_absmax" for state in rule.states)]
        expected += [option for option in rule.options if option != "lr"]
        actual = [a.name for a in rule.operator._schema.arguments if a.name not in around]
        assert sorted(actual) == sorted(expected + ["trust"] * rule.trust)


@pytest.mark.parametrize("grads", ["same", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_matches_the_paper(rule, codec, dtype, grads):
    """Awkward rows, per-tensor steps from the first to the ten thousandth, every dtype and codec."""
    if grads == "fp32" and dtype == torch.float32:
        grads = "same"
    grad_dtype = torch.float32 if grads == "fp32" else dtype
    group = random_group(rule, SHAPES, **codec, dtype=dtype, grad_dtype=grad_dtype, steps=(0, 1, 6, 999, 10_000))
    step_and_check(group)


VARIANTS = {
    "no weight decay": {"weight_decay": 0.0},
    "large weight decay": {"lr": 1e-2, "weight_decay": 0.7},
    "large lr": {"lr": 10.0},
    "lr 0": {"lr": 0.0},
    "eps 0": {"eps": 0.0},
    "large eps": {"eps": 0.5},
    "no averages": {"beta1": 0.0, "beta2": 0.0, "beta3": 0.0},
    "short averages": {"beta1": 0.5, "beta2": 0.8, "beta3": 0.9},
    "long averages": {"beta1": 0.99, "beta2": 0.99999, "beta3": 0.999999},
    "alpha 0": {"alpha": 0.0},
    "alpha 0.5": {"alpha": 0.5},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0, "dampening": 1.0},
    "nesterov": {"nesterov": True, "dampening": 0.0},
    "no dampening": {"dampening": 0.0},
    "lr decay": {"lr_decay": 0.5},
    "no lr decay": {"lr_decay": 0.0},
    "no bias correction": {"bias_correction": False},
    "coupled weight decay": {"adam_w_mode": False, "weight_decay": 0.3},
    "no schedules": {"t_alpha": 0, "t_beta3": 0},
    "schedule of alpha": {"t_alpha": 40, "t_beta3": 0},
    "schedule of beta3": {"t_alpha": 0, "t_beta3": 41},
    "schedule of beta3 from 0": {"beta1": 0.0, "t_beta3": 100},
    "long schedules": {"t_alpha": 100_000, "t_beta3": 100_000},
}
STEPS = (0, 1, 9, 39, 40, 41)


OPTION_CASES = [
    pytest.param(*case.values, changed, id=f"{case.id}-{name}")
    for case in CASES
    for name, changed in VARIANTS.items()
    if any(option in RULES[case.values[0]].options for option in changed)
]


@pytest.mark.every_torch
@pytest.mark.every_torch
@pytest.mark.parametrize(("rule", "codec", "changed"), OPTION_CASES)
def test_options(rule, codec, changed):
    options = usual(rule, **changed)
    assert options != usual(rule)
    step_and_check(random_group(rule, [(5, 300)] * len(STEPS), **codec, steps=STEPS), options)


@on_every_backend
@every_case
def test_options_in_a_tensor_take_the_place_of_the_others(rule, codec):
    """In the schema's order; compiled graphs get them this way, to change them without compiling again."""
    group = random_group(rule, [(5, 300), (70,)], **codec, steps=(0, 9))
    expected = group.clone()
    expected.step()
    group.step(usual(rule, **OTHER_NUMBERS), options=option_tensor(rule))
    assert_same(expected, group)


OTHER_NUMBERS = dict.fromkeys(["beta1", "beta2", "beta3", "alpha", "momentum", "eps", "weight_decay", "lr_decay"], 0.3)


@on_every_backend
@every_case
def test_maximize(rule, codec):
    group = random_group(rule, [(5, 300), (70,)], **codec, steps=(0, 40))
    descending = group.clone().with_grads([-g for g in group.grads])
    step_and_check(group, maximize=True)
    descending.step()
    assert_same(group.with_grads(descending.grads), descending)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_grad_scale_divides_the_gradient(rule, codec, dtype):
    group = random_group(rule, [(5, 300), (64,)], **codec, dtype=dtype)
    step_and_check(group, grad_scale=torch.tensor([3.0]))
    group.step(grad_scale=torch.tensor(3.0), found_inf=torch.tensor(0.0))  # as GradScaler gives them
    assert group.steps[0] == 9


@every_case
def test_clip_multiplies_each_gradient(rule, codec):
    """One factor a parameter, from cutting it to nothing to leaving it."""
    group = random_group(rule, [(5, 300), (64,), (3, 100), (7, 5)], **codec, steps=(0, 5))
    step_and_check(group, clip=torch.tensor([0.5, 1.0, 0.0, 1e-3]))


@every_case
def test_clip_tames_a_spike(rule, codec):
    """A gradient whose square would overflow, cut down by a factor whose square would underflow."""
    group = random_group(rule, [(5, 300), (64,)], **codec, steps=(0, 5))
    group = group.with_grads([g * 1e22 for g in group.grads])
    step_and_check(group, clip=torch.tensor([1e-22, 1e-23]))


@every_case
def test_clip_scale_and_maximize_multiply(rule, codec):
    group = random_group(rule, [(5, 300), (64,)], **codec)
    step_and_check(group, maximize=True, grad_scale=torch.tensor(8.0), clip=torch.tensor([0.3, 0.7]))


@every_case
def test_factors_of_one_change_no_bit(rule, codec):
    group = random_group(rule, [(5, 300), (64,)], **codec, steps=(0, 9))
    plain = group.clone()
    plain.step()
    ones = torch.ones(2)
    group.step(grad_scale=ones[:1], clip=ones, **{"trust": ones} if RULES[rule].trust else {})
    assert_same(plain, group)


@on_every_backend
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].trust])
def test_trust_ratios(rule, codec, nesterov):
    """One a parameter; 0 and large ones too."""
    group = random_group(rule, [(5, 300), (64,), (3, 100), (7, 5)], **CODECS[codec], steps=(0, 5, 6))
    options = usual(rule, nesterov=nesterov, dampening=0.0)
    step_and_check(group, options, trust=torch.tensor([0.02, 1.0, 0.0, 50.0]), clip=torch.tensor([1.0, 0.5, 0.1, 1.0]))


@pytest.mark.parametrize("found", [1.0, 5.0, float("inf")])
@every_case
def test_found_inf_skips_everything(rule, codec, found):
    group = random_group(rule, [(5, 300), (64,)], **codec)
    before = group.clone()
    group.step(grad_scale=torch.tensor(2.0), found_inf=torch.tensor(found), clip=torch.tensor([0.5, 0.5]))
    assert_same(before, group)


@every_case
def test_lr_of_either_precision(rule, codec):
    """lr is a tensor, fp64 or fp32."""
    group = random_group(rule, [(3, 100)], **codec)
    single = group.clone()
    group.step(usual(rule, lr=2**-7))
    options = usual(rule) | {"lr": torch.tensor(2**-7)}
    RULES[rule].operator(*single.lists().values(), **options)
    assert_same(group, single)


@every_case
def test_every_width_up_to_two_blocks(rule, codec, guard):
    """Sweeps tails and misalignments, everything inside guarded memory."""
    widths = [*range(1, 70), *range(250, 260), *range(508, 516)]
    step_and_check(random_group(rule, [(2, width) for width in widths], **codec).map(guard))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 60])
@every_case
def test_any_number_of_tensors(rule, codec, count):
    shapes = [(1 + i % 7, 1 + 37 * i % 300) for i in range(count)]
    step_and_check(random_group(rule, shapes, **codec, steps=range(11)))


@on_every_backend
@every_case
def test_empty_tensors_only_count_steps(rule, codec):
    shapes = [(0,), (0, 5), (2, 3), (5, 0), (0, 300), (3, 0, 2)]
    step_and_check(random_group(rule, shapes, **codec, steps=(0, 3)))
    step_and_check(random_group(rule, shapes[:1], **codec))


@on_every_backend
@pytest.mark.parametrize("codec", ["fp32", "8-bit flat"])
@pytest.mark.parametrize("rule", RULES)
def test_scalar_parameter(rule, codec):
    codec = CODECS[codec] if RULES[rule].states else CODECS["fp32"]
    step_and_check(random_group(rule, [()], **codec))


@pytest.mark.every_torch
@pytest.mark.every_torch
@on_every_backend
@every_case
def test_a_run_from_the_start(rule, codec):
    """Ten steps in a row, each held to the paper from the state the step before left."""
    group = fresh_group(rule, [(4, 300), (100, 77)], **codec)
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        group = group.with_grads([torch.randn(p.shape, generator=generator) * 0.01 for p in group.params])
        step_and_check(group, usual(rule, lr=1e-2))
