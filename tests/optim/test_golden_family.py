"""Every optimizer against bitsandbytes' runs of it (golden/README.md says how 8-bit runs are compared)."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnbops
from reference import quantize as ref
from reference.group import CODEBOOKS, NOT_NEGATIVE, Group
from reference.rounding import half_ulp
from reference.rules import RULES
from reference.states import state_absmax, state_normalised

pytestmark = pytest.mark.every_torch

_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


class Run(NamedTuple):
    """One of bitsandbytes' runs: its class, our rule and options for it, and what its constructor was given."""

    name: str
    rule: str
    options: dict
    arguments: dict
    dtype: str = "float32"

    @property
    def bits(self) -> int:
        return 8 if self.name.endswith("8bit") else 32


def runs(name: str, rule: str, options: dict, arguments: dict, recorded: tuple[str, ...]) -> list[Run]:
    return [Run(f"{name}{x.split()[0]}bit", rule, options | arguments, arguments, x.split()[1]) for x in recorded]


ALL = ("8 float32", "8 bfloat16", "32 float32")
FP32 = ("8 float32", "32 float32")
GOLDEN_RUNS = [
    *runs("Adam", "adam", _ADAM | {"weight_decay": 0.0}, {"lr": 1e-2}, ALL),
    *runs("AdamW", "adam", _ADAM, {"lr": 1e-2, "weight_decay": 0.05}, ALL),
    *runs(
        "SGD",
        "momentum",
        {"dampening": 0.0, "nesterov": False},
        {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01},
        ALL,
    ),
    *runs("Lion", "lion", {"beta1": 0.9, "beta2": 0.99}, {"lr": 1e-3, "weight_decay": 0.05}, ALL),
    *runs("RMSprop", "rmsprop", {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0}, {"lr": 1e-2}, FP32),
    *runs("Adagrad", "adagrad", {"lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}, {"lr": 1e-2}, FP32),
    *runs(
        "AdEMAMix",
        "ademamix",
        _ADAM | {"beta3": 0.9999, "alpha": 5.0, "t_alpha": 0, "t_beta3": 0, "weight_decay": 1e-2},
        {"lr": 1e-2},
        ("8 float32",),
    ),
]
STEPS = 5
SMALL = 3  # the number of the parameter with ten elements, whose state is fp32 in 8-bit runs, too


def run_id(run: Run) -> str:
    return f"{run.name}-{run.dtype}"


def params_close(actual: Tensor, expected: Tensor, lr: float) -> Tensor:
    """rtol 1e-5, where a parameter near zero is measured by the learning rate, the size of a step.

    Low precision: equal, or the neighbour, where 1e-5 can change the side that a value is rounded to.
    """
    if actual.dtype == torch.float32:
        return (actual - expected).abs() <= 1e-5 * expected.abs() + 1e-5 * lr
    one_rounding = 2 * half_ulp(expected.double(), actual.dtype) + 1e-5 * lr
    return (actual.double() - expected.double()).abs() <= one_rounding


def golden_states(state_dict: dict, i: int, rule: str) -> dict[str, Tensor]:
    """bitsandbytes' state of parameter `i` under our names: codes or values, and scales."""
    saved = state_dict["state"][i]["__bnb_optimizer_quant_state__"]
    names, states = list(RULES[rule].states), {}
    for kind, suffix in (("state", ""), ("absmax", "_absmax")):
        if f"{kind}1" not in saved:
            continue
        tensors = list(saved[f"{kind}1"]) if len(names) == 3 else [saved[f"{kind}1"]]  # AdEMAMix stacks two
        tensors += [saved[f"{kind}2"]] if len(names) > 1 else []
        states |= {name + suffix: tensor for name, tensor in zip(names, tensors, strict=True)}
    return states


@pytest.mark.parametrize("run", GOLDEN_RUNS, ids=run_id)
def test_32bit_states_end_to_end(run, golden):
    """The classes with fp32 states, built as bitsandbytes' were, go where bitsandbytes went."""
    inputs = golden(f"opt_inputs_{run.dtype}.safetensors")
    expected = golden(f"opt_{run.name}_{run.dtype}.params_after.safetensors")
    state_dict = golden(f"opt_{run.name}_{run.dtype}.state_dict.pt")
    indices = range(4) if run.bits == 32 else [SMALL]
    params = {i: nn.Parameter(inputs[f"param{i}.before"].clone()) for i in indices}
    optimizer = getattr(bnbops.optim, run.name)(params.values(), **run.arguments)
    for step in range(STEPS):
        for i, p in params.items():
            p.grad = inputs[f"grad{i}.step{step}"]
        optimizer.step()
        if step in (0, STEPS - 1):
            for i, p in params.items():
                assert params_close(p.detach(), expected[f"param{i}.after_step{step}"], run.arguments["lr"]).all()
    for i, p in params.items():
        for name, tensor in golden_states(state_dict, i, run.rule).items():
            # 1e-5 of the largest term: momentum may cancel
            torch.testing.assert_close(optimizer.state[p][name], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max())


RUNS_8BIT = [run for run in GOLDEN_RUNS if run.bits == 8]


def golden_group(inputs: dict, rule: str) -> Group:
    """A golden run's matrices before the first step, with 8-bit states in flat blocks."""
    group = Group(rule)
    for i in range(SMALL):
        p = inputs[f"param{i}.before"].clone()
        group.params.append(p)
        group.steps.append(torch.zeros(()))
        group.append_state({name: torch.zeros(p.shape) for name in RULES[rule].states}, 8, "flat")
    return group


def golden_grads(inputs: dict, step: int) -> list[Tensor]:
    return [inputs[f"grad{i}.step{step}"] for i in range(SMALL)]


@pytest.mark.parametrize("run", RUNS_8BIT, ids=run_id)
def test_8bit_free_run(run, golden):
    """Five steps of the operator alone. The first step's parameters are equal; later ones drift with bitsandbytes'
    1/65535 grid (golden/README.md)."""
    inputs = golden(f"opt_inputs_{run.dtype}.safetensors")
    expected = golden(f"opt_{run.name}_{run.dtype}.params_after.safetensors")
    state_dict = golden(f"opt_{run.name}_{run.dtype}.state_dict.pt")
    group = golden_group(inputs, run.rule)
    for step in range(STEPS):
        group = group.with_grads(golden_grads(inputs, step))
        group.step(run.options)
        if step == 0:
            for i, p in enumerate(group.params):
                assert params_close(p, expected[f"param{i}.after_step0"], run.options["lr"]).all()
    for i in range(SMALL):
        states = golden_states(state_dict, i, run.rule)
        for name in group.states:
            same = (group.states[name][i] == states[name]).float().mean()
            assert same >= 0.98


@pytest.mark.parametrize("run", RUNS_8BIT, ids=run_id)
def test_8bit_replay(run, golden):
    """The golden run, step by step: from the same state the operator takes the same step."""
    inputs = golden(f"opt_inputs_{run.dtype}.safetensors")
    replay = golden_group(inputs, run.rule)
    for step in range(STEPS):
        replay = replay.with_grads(golden_grads(inputs, step))
        ours = replay.clone()
        ours.step(run.options)
        for i in range(SMALL):
            replay_step(replay, i, run.options)
            compare_with_replay(ours, replay, i, run.options["lr"])
    check_replay(replay, run, golden)


def replay_step(group: Group, i: int, options: dict) -> None:
    """What bitsandbytes did to parameter `i`: the paper's step in fp32, and codes from its table of 65536 points."""
    rule, step = RULES[group.rule], int(group.steps[i].item()) + 1
    p, states = rule.update(group.params[i].float(), group.grads[i].float(), group.state_values(i), step, **options)
    group.params[i].copy_(p)
    group.steps[i].fill_(step)
    for (name, signed), x in zip(rule.states.items(), states, strict=True):
        absmax = state_absmax(x, group.absmax[name][i])
        group.absmax[name][i] = absmax
        group.states[name][i] = ref.nearest_on_grid(state_normalised(x, absmax), CODEBOOKS[signed])


def compare_with_replay(ours: Group, replay: Group, i: int, lr: float) -> None:
    """Same parameters and scales; codes differ from the replay's no more than its grid explains."""
    assert params_close(ours.params[i], replay.params[i], lr).all()
    for name, signed in RULES[replay.rule].states.items():
        torch.testing.assert_close(ours.absmax[name][i], replay.absmax[name][i], rtol=1e-5, atol=0)
        a, b = ours.states[name][i], replay.states[name][i]
        code = CODEBOOKS[signed].double()
        gap = (code[a.long()] - code[b.long()]).abs()
        neighbours = (a.int() - b.int()).abs() <= 1
        # Beyond neighbours only where entries are closer to each other than the grid's points: below 3e-5.
        assert (neighbours | (gap <= 2 * ref.GRID)).all()
        same = (a == b).float().mean()
        assert same >= (0.96 if name in NOT_NEGATIVE else 0.99), f"{name}: {same:.4f}"  # most squares are tiny


def check_replay(replay: Group, run: Run, golden) -> None:
    """The replay ends where bitsandbytes did: so what it compares us with is the golden run."""
    expected = golden(f"opt_{run.name}_{run.dtype}.params_after.safetensors")
    state_dict = golden(f"opt_{run.name}_{run.dtype}.state_dict.pt")
    for i, p in enumerate(replay.params):
        states = golden_states(state_dict, i, run.rule)
        for name in replay.states:
            assert torch.equal(replay.states[name][i], states[name]), name
            torch.testing.assert_close(replay.absmax[name][i], states[f"{name}_absmax"], rtol=1e-5, atol=0)
        assert params_close(p, expected[f"param{i}.after_step4"], run.options["lr"]).all()
