"""torch.ops.bnbops.adam_step_ against bitsandbytes' runs (golden/README.md says how 8-bit runs are compared)."""

import pytest
import torch
from torch import Tensor

from cases.rules import usual
from reference import quantize as ref
from reference.group import CODEBOOKS, Group, fresh_group
from reference.rounding import half_ulp
from reference.rules import RULES
from reference.states import state_absmax, state_normalised

pytestmark = pytest.mark.every_torch

LR = 1e-2
GOLDEN_RUNS = [
    (f"{name}{bits}bit", usual("adam", lr=LR, weight_decay=decay), bits, dtype)
    for name, decay in (("Adam", 0.0), ("AdamW", 0.05))
    for bits, dtype in ((8, "float32"), (8, "bfloat16"), (32, "float32"))
]


def golden_group(inputs: dict, bits: int) -> Group:
    """The golden run's parameters before the first step. Matrices get 8-bit states with flat blocks, if any."""
    params = [inputs[f"param{i}.before"].clone() for i in range(3 if bits == 8 else 4)]
    group = fresh_group("adam", [p.shape for p in params], bits=bits, layout="flat", dtype=params[0].dtype)
    group.params = params
    return group


def golden_grads(inputs: dict, step: int, count: int) -> list[Tensor]:
    return [inputs[f"grad{i}.step{step}"] for i in range(count)]


def params_close(actual: Tensor, expected: Tensor) -> Tensor:
    """rtol 1e-5, where a parameter near zero is measured by the learning rate, the size of a step.

    Low precision: equal, or the neighbour, where 1e-5 can change the side that a value is rounded to.
    """
    if actual.dtype == torch.float32:
        return (actual - expected).abs() <= 1e-5 * expected.abs() + 1e-5 * LR
    one_rounding = 2 * half_ulp(expected.double(), actual.dtype) + 1e-5 * LR
    return (actual.double() - expected.double()).abs() <= one_rounding


@pytest.mark.parametrize("run", GOLDEN_RUNS, ids=lambda run: f"{run[0]}-{run[3]}")
def test_golden_free_run(run, golden):
    """Five steps of the op alone. fp32 states: everything at rtol 1e-5. 8-bit states: the first step's parameters too;
    later ones drift with bitsandbytes' 1/65535 grid (golden/README.md), 1.4 % of a tensor's codes at most."""
    name, options, bits, dtype = run
    inputs = golden(f"opt_inputs_{dtype}.safetensors")
    expected = golden(f"opt_{name}_{dtype}.params_after.safetensors")
    state = golden(f"opt_{name}_{dtype}.state_dict.pt")["state"]
    group = golden_group(inputs, bits)
    for step in range(5):
        group = group.with_grads(golden_grads(inputs, step, len(group.params)))
        group.step(options)
        if step == 0 or (step == 4 and bits == 32):
            for i, p in enumerate(group.params):
                assert params_close(p, expected[f"param{i}.after_step{step}"]).all()
    for i in range(len(group.params)):
        quantized = state[i]["__bnb_optimizer_quant_state__"]
        if bits == 32:
            # 1e-5 of the largest term: momentum may cancel
            torch.testing.assert_close(group.states["exp_avg"][i], quantized["state1"], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(group.states["exp_avg_sq"][i], quantized["state2"], rtol=1e-5, atol=0)
        else:
            assert (group.states["exp_avg"][i] == quantized["state1"]).float().mean() >= 0.98
            assert (group.states["exp_avg_sq"][i] == quantized["state2"]).float().mean() >= 0.99


@pytest.mark.parametrize("run", [run for run in GOLDEN_RUNS if run[2] == 8], ids=lambda run: f"{run[0]}-{run[3]}")
def test_golden_replay(run, golden):
    """The golden 8-bit run, step by step: from the same state the op takes the same step."""
    name, options, bits, dtype = run
    inputs = golden(f"opt_inputs_{dtype}.safetensors")
    replay = golden_group(inputs, bits)
    for step in range(5):
        replay = replay.with_grads(golden_grads(inputs, step, len(replay.params)))
        ours = replay.clone()
        ours.step(options)
        for i in range(len(replay.params)):
            replay_step(replay, i, options)
            compare_with_replay(ours, replay, i)
    state = golden(f"opt_{name}_{dtype}.state_dict.pt")["state"]
    check_replay(replay, state, golden(f"opt_{name}_{dtype}.params_after.safetensors"))


def replay_step(group: Group, i: int, options: dict) -> None:
    """What bitsandbytes did to parameter `i`: the paper's step, states encoded from its table of 65536 points."""
    step = int(group.steps[i].item()) + 1
    p, states = group.params[i].double(), [x.double() for x in group.state_values(i)]
    p, states = RULES["adam"].update(p, group.grads[i].double(), states, step, **options)
    group.params[i].copy_(p)
    group.steps[i].fill_(step)
    for (name, signed), x in zip(RULES["adam"].states.items(), states, strict=True):
        absmax = state_absmax(x, group.absmax[name][i])
        group.absmax[name][i] = absmax
        group.states[name][i] = ref.nearest_on_grid(state_normalised(x.float(), absmax), CODEBOOKS[signed])


def compare_with_replay(ours: Group, replay: Group, i: int) -> None:
    """Same parameters and absmax; codes differ from the replay's no more than its grid explains."""
    assert params_close(ours.params[i], replay.params[i]).all()
    for name, signed in RULES["adam"].states.items():
        torch.testing.assert_close(ours.absmax[name][i], replay.absmax[name][i], rtol=1e-5, atol=0)
        a, b, code = ours.states[name][i], replay.states[name][i], CODEBOOKS[signed]
        gap = (code[a.long()].double() - code[b.long()].double()).abs()
        neighbours = (a.int() - b.int()).abs() <= 1
        # Beyond neighbours only where entries are closer to each other than the grid's points: below 3e-5.
        assert (neighbours | (gap <= 2 * ref.GRID)).all()
        assert (a == b).float().mean() >= 0.96


def check_replay(replay: Group, state: dict, expected: dict[str, Tensor]) -> None:
    """The replay ends where bitsandbytes did: so what it compares us with is the golden run."""
    for i, p in enumerate(replay.params):
        quantized = state[i]["__bnb_optimizer_quant_state__"]
        for name, index in (("exp_avg", 1), ("exp_avg_sq", 2)):
            assert torch.equal(replay.states[name][i], quantized[f"state{index}"])
            torch.testing.assert_close(replay.absmax[name][i], quantized[f"absmax{index}"], rtol=1e-5, atol=0)
        assert params_close(p, expected[f"param{i}.after_step4"]).all()
