"""Loading bitsandbytes' state dicts (golden/README.md), and writing them back byte for byte."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_optimizer_checkpoint import edit
from torch import Tensor

import bnbops
from bnbops.optim.checkpoints.interchange import is_bitsandbytes, to_bitsandbytes
from cases.interchange import (
    FAMILIES,
    FAMILIES_8BIT,
    GOLDEN,
    MAPS,
    NESTED,
    SHAPES,
    STATES,
    assert_same_bytes,
    bitsandbytes_dict,
    bitsandbytes_state,
    family,
    flat_keys,
    fresh,
)
from cases.optimizers import assert_same, assert_same_state, params, set_grads, train


@pytest.mark.every_torch
@pytest.mark.parametrize("older", [False, True], ids=["nested", "flat keys"])
@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip(name, older, golden):
    state_dict = golden(f"opt_{name}.state_dict.pt")
    optimizer, _ = fresh(name)
    optimizer.load_state_dict(flat_keys(state_dict) if older else state_dict)
    assert_same_bytes(optimizer.bitsandbytes_state_dict(), state_dict)


@pytest.mark.parametrize("name", GOLDEN)
def test_states_are_taken_as_they_are(name, golden):
    """Codes and values keep their bytes under our names; scales too, by rows where rows are whole blocks."""
    state_dict = golden(f"opt_{name}.state_dict.pt")
    optimizer, p = fresh(name)
    optimizer.load_state_dict(state_dict)
    for i, parameter in enumerate(p):
        saved, state = state_dict["state"][i][NESTED], dict(optimizer.state[parameter])
        step = state.pop("step")
        assert step.item() == 5 and step.dtype == torch.float32 and step.shape == ()
        for number, names in enumerate(STATES[family(name)], 1):
            stacked = [*saved[f"state{number}"]] if len(names) > 1 else [saved[f"state{number}"]]
            assert_same([state.pop(key) for key in names], stacked)
            if f"absmax{number}" in saved:
                scales = [state.pop(f"{key}_absmax") for key in names]
                assert_same([x.flatten() for x in scales], [*saved[f"absmax{number}"].view(len(names), -1)])
                assert all(x.shape == {0: (16,), 1: (16, 1), 2: (7,)}[i] for x in scales)
        assert not state


@pytest.mark.every_torch
@pytest.mark.parametrize("name", FAMILIES_8BIT)
def test_resumed_steps_are_those_of_flat_blocks(name, golden):
    """After loading, steps are bit for bit those of the operators on bitsandbytes' flat states."""
    state_dict = golden(f"opt_{name}.state_dict.pt")
    optimizer, p = fresh(name)
    optimizer.load_state_dict(state_dict)
    other, q = fresh(name)
    other.load_state_dict(state_dict)
    for parameter, state in other.state.items():
        if parameter.dim() > 1:
            other.state[parameter] = {key: x.flatten() if "absmax" in key else x for key, x in state.items()}
    train(p, optimizer, range(3))
    train(q, other, range(3))
    assert_same(p, q)
    assert any((a - b).abs().max() > 0 for a, b in zip(p, params(*SHAPES), strict=True))
    assert_same([x.flatten() for x in flat(optimizer)], [x.flatten() for x in flat(other)])


def flat(optimizer: bnbops.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state_dict()["state"].values() for x in state.values()]


# ---- options ---------------------------------------------------------------------------------------------------

OPTIONS = {
    "AdamW": {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05},
    "LAMB": {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "max_unorm": 1.0},
    "AdEMAMix": {"lr": 1e-2, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "weight_decay": 1e-2, "alpha": 5.0}
    | {"t_alpha": None, "t_beta3": None},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "dampening": 0, "weight_decay": 0.01, "nesterov": False},
    "LARS": {"lr": 1e-2, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False},
    "Lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.05},
    "RMSprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0},
    "Adagrad": {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0, "lr_decay": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_become_ours(name, golden):
    """Those that bitsandbytes stores come from the state dict; the others stay."""
    optimizer, _ = fresh(f"{name}8bit", min_8bit_size=123)
    optimizer.load_state_dict(golden(f"opt_{name}8bit_float32.state_dict.pt"))
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in OPTIONS[name]} == OPTIONS[name]
    assert (group["min_8bit_size"], group["optim_bits"]) == (123, 8)


def test_options_bitsandbytes_does_not_store_stay(golden):
    optimizer, _ = fresh("SGD8bit", maximize=True, nesterov=True)
    state_dict = golden("opt_SGD8bit_float32.state_dict.pt")
    state_dict["param_groups"][0]["nesterov"] = False  # from a user; bitsandbytes reads no such key
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["maximize"] and optimizer.param_groups[0]["nesterov"]


def test_ademamix_schedules_round_trip(golden):
    state_dict = golden("opt_AdEMAMix8bit_float32.state_dict.pt")
    state_dict["param_groups"][0] |= {"alpha": 3.0, "t_alpha": 100, "t_beta3": 200}
    optimizer, _ = fresh("AdEMAMix8bit")
    optimizer.load_state_dict(state_dict)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["t_alpha"], group["t_beta3"]) == (3.0, 100, 200)
    assert_same_bytes(to_bitsandbytes(optimizer), state_dict)


def test_groups_without_ademamix_keys(golden):
    """bitsandbytes before 0.45 knew no AdEMAMix."""
    state_dict = golden("opt_AdamW8bit_float32.state_dict.pt")
    older = flat_keys(state_dict)
    for key in ("alpha", "t_alpha", "t_beta3"):
        del older["param_groups"][0][key]
    optimizer, _ = fresh("AdamW8bit")
    optimizer.load_state_dict(older)
    assert_same_bytes(to_bitsandbytes(optimizer), state_dict)


def split_groups(state_dict: dict) -> dict:
    """The same with a param group for the first parameter and one for the others."""
    (group,) = state_dict["param_groups"]
    first = {**group, "lr": 0.5, "initial_lr": 0.5, "name": "embeddings", "params": [0]}
    return {**state_dict, "param_groups": [first, {**group, "initial_lr": 1e-2, "params": [1, 2, 3]}]}


def test_groups_keep_what_users_and_schedulers_add(golden):
    state_dict = split_groups(golden("opt_AdamW8bit_float32.state_dict.pt"))
    p = params(*SHAPES)
    lr = torch.tensor(0.3)
    optimizer = bnbops.optim.AdamW8bit([{"params": p[:1], "lr": lr}, {"params": p[1:], "maximize": True}])
    optimizer.load_state_dict(state_dict)
    first, second = optimizer.param_groups
    assert first["lr"] is lr and lr.item() == 0.5 and first["name"] == "embeddings"
    assert (second["lr"], second["initial_lr"], second["maximize"]) == (1e-2, 1e-2, True)
    second["maximize"] = False
    written = to_bitsandbytes(optimizer)
    assert_same_bytes(written, state_dict)
    assert type(written["param_groups"][0]["lr"]) is float


# ---- unusual states ----------------------------------------------------------------------------------------------


def test_parameters_without_state(golden):
    """Frozen parameters, or a checkpoint before the first step."""
    state_dict = golden("opt_AdamW8bit_float32.state_dict.pt")
    del state_dict["state"][1], state_dict["state"][3]
    optimizer, p = fresh("AdamW8bit")
    optimizer.load_state_dict(state_dict)
    assert [bool(optimizer.state[x]) for x in p] == [True, False, True, False]
    optimizer, p = fresh("AdamW8bit")
    optimizer.load_state_dict(state_dict)
    assert_same_bytes(to_bitsandbytes(optimizer), state_dict)
    state_dict["state"] = {}
    optimizer.load_state_dict(state_dict)
    assert not any(optimizer.state.values()) and optimizer.param_groups[0]["lr"] == 1e-2
    assert_same_bytes(to_bitsandbytes(optimizer), state_dict)


@pytest.mark.parametrize(
    "shape", [(5000,), (4096,), (3, 40, 40), (16, 16, 4, 4), (4097, 1), (1, 4999), (2, 2048)], ids=str
)
def test_8bit_states_of_any_shape(shape):
    """Among them vectors, which we give fp32 states ourselves: they go on in 8 bits."""
    state_dict = bitsandbytes_dict(bitsandbytes_state(shape))
    optimizer, p = fresh("AdamW8bit", [shape])
    optimizer.load_state_dict(state_dict)
    assert_same_bytes(to_bitsandbytes(optimizer), state_dict)
    train(p, optimizer, range(2))
    assert optimizer.state[p[0]]["exp_avg"].dtype == torch.uint8
    assert to_bitsandbytes(optimizer)["state"][0]["step"] == 9


def test_gnorm_vec_of_older_versions(golden):
    """Percentile clipping goes on with bitsandbytes' history of norms."""
    state_dict = flat_keys(golden("opt_AdamW8bit_float32.state_dict.pt"))
    for i, state in state_dict["state"].items():
        state["gnorm_vec"] = torch.arange(100.0) + i
    optimizer, p = fresh("AdamW8bit", percentile_clipping=5)
    optimizer.load_state_dict(state_dict)
    assert_same([optimizer.state[x]["gnorm_vec"] for x in p], [torch.arange(100.0) + i for i in range(4)])
    assert optimizer.param_groups[0]["percentile_clipping"] == 5
    written = to_bitsandbytes(optimizer)["state"]
    assert_same([written[i][NESTED]["gnorm_vec"] for i in range(4)], [torch.arange(100.0) + i for i in range(4)])
    set_grads(p, 0)
    optimizer.step()
    assert optimizer.state[p[0]]["gnorm_vec"][6].item() == pytest.approx(p[0].grad.square().sum().item(), rel=1e-5)


def test_step_as_a_tensor(golden):
    """As it comes out of tools that make tensors of numbers."""
    state_dict = golden("opt_Lion8bit_float32.state_dict.pt")
    for state in state_dict["state"].values():
        state["step"] = torch.tensor([state["step"]])
    optimizer, p = fresh("Lion8bit")
    optimizer.load_state_dict(state_dict)
    assert all(optimizer.state[x]["step"].item() == 5 for x in p)


def test_maps_from_another_machine(golden):
    """The last bits of torch.linspace differ between processors."""
    state_dict = golden("opt_AdamW8bit_float32.state_dict.pt")
    for state in state_dict["state"].values():
        if "qmap1" in state[NESTED]:
            state[NESTED]["qmap1"] = torch.nextafter(state[NESTED]["qmap1"], torch.tensor(1.0))
    optimizer, _ = fresh("AdamW8bit")
    with pytest.raises(ValueError, match="qmap1"):  # zero has no last bit to differ in
        optimizer.load_state_dict(state_dict)
    for state in state_dict["state"].values():
        if "qmap1" in state[NESTED]:
            state[NESTED]["qmap1"][127] = 0.0
    optimizer.load_state_dict(state_dict)


def test_loading_shares_no_memory(golden):
    state_dict = golden("opt_AdEMAMix8bit_float32.state_dict.pt")
    kept = copy.deepcopy(state_dict)
    optimizer, p = fresh("AdEMAMix8bit")
    optimizer.load_state_dict(state_dict)
    train(p, optimizer, range(2))
    assert_same_bytes(state_dict, kept)


# ---- refusals ----------------------------------------------------------------------------------------------------


def nested(i: int, key: str, **change: object) -> Callable[[dict], None]:
    return edit("state", i, NESTED, key, **change)


REFUSED = {
    "another codebook": (nested(0, "qmap1", to=lambda x: x * 1.01), "qmap1.*dynamic map"),
    "maps swapped": (nested(1, "qmap2", to=lambda x: MAPS[True]), "qmap2"),
    "no codebook": (nested(0, "qmap2"), "qmap2"),
    "short codebook": (nested(0, "qmap1", to=lambda x: x[:16]), "qmap1"),
    "no state2": (nested(3, "state2"), "state2"),
    "no absmax": (nested(0, "absmax1"), "absmax1"),
    "extra key": (nested(0, "max_exp_avg_sq", to=lambda _: torch.zeros(64, 64)), "max_exp_avg_sq"),
    "not block-wise": (nested(0, "max1", to=lambda _: torch.zeros(1)), "block_wise"),
    "unorm_vec": (nested(0, "unorm_vec", to=lambda _: torch.zeros(1)), "unorm_vec"),
    "stacked state1": (nested(0, "state1", to=lambda x: torch.stack([x, x])), "state1"),
    "another shape": (nested(3, "state1", to=lambda x: x[:5]), "state1"),
    "transposed": (nested(0, "state1", to=lambda x: x.t()), "strides"),
    "codes as floats": (nested(0, "state1", to=lambda x: x.float()), "state1"),
    "fp32 state in bf16": (nested(3, "state1", to=lambda x: x.bfloat16()), "state1"),
    "scales by rows": (nested(1, "absmax1", to=lambda x: x.view(16, 1)), "absmax1"),
    "short absmax": (nested(2, "absmax2", to=lambda x: x[1:]), "absmax2"),
    "absmax in fp16": (nested(2, "absmax2", to=lambda x: x.half()), "absmax2"),
    "state as a list": (nested(3, "state1", to=lambda x: x.tolist()), "state1"),
    "short gnorm_vec": (nested(3, "gnorm_vec", to=lambda _: torch.zeros(5)), "gnorm_vec"),
    "no step": (edit("state", 3, "step"), "step"),
    "half a step": (edit("state", 3, "step", to=0.5), "step"),
    "steps": (edit("state", 3, "step", to=lambda _: torch.ones(2)), "step"),
    "a negative step": (edit("state", 3, "step", to=-1), "step"),
    "step as a string": (edit("state", 3, "step", to="5"), "step"),
    "unknown parameter": (edit("state", 9, to=lambda _: {"step": 5, NESTED: {"state1": torch.zeros(3)}}), "9"),
    "too many groups": (edit("param_groups", to=lambda g: g * 2), "group"),
    "too few parameters": (edit("param_groups", 0, "params", to=[0, 1, 2]), "param"),
    "no betas": (edit("param_groups", 0, "betas"), "betas"),
    "three betas": (edit("param_groups", 0, "betas", to=(0.9, 0.99, 0.999)), "betas"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_changes_nothing(case, golden):
    change, match = REFUSED[case]
    state_dict = golden("opt_AdamW8bit_float32.state_dict.pt")
    change(state_dict)
    assert is_bitsandbytes(state_dict)
    optimizer, p = fresh("AdamW8bit")
    train(p, optimizer, range(2))
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state_dict)
    assert_same_state(optimizer, before)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_ademamix_needs_its_schedule(golden):
    state_dict = golden("opt_AdEMAMix8bit_float32.state_dict.pt")
    del state_dict["param_groups"][0]["t_alpha"]
    with pytest.raises(ValueError, match="another optimizer"):
        fresh("AdEMAMix8bit")[0].load_state_dict(state_dict)


@pytest.mark.parametrize("ours", FAMILIES)
@pytest.mark.parametrize("saved", FAMILIES)
def test_state_dicts_of_other_optimizers_are_refused(saved, ours, golden):
    """bitsandbytes' state dicts do not name their optimizer, but betas, eps and keys tell."""
    state_dict = golden(f"opt_{saved}8bit_float32.state_dict.pt")
    optimizer, _ = fresh(f"{ours}8bit")
    if {saved, ours} <= {"Adam", "AdamW"} or saved == ours:
        optimizer.load_state_dict(state_dict)
        return
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.7 and not any(optimizer.state.values())


@pytest.mark.parametrize(("name", "k"), [("SGD", 1), ("LARS", 1), ("RMSprop", 1)])
def test_options_without_effect_in_bitsandbytes(name, k, golden):
    """Its SGD ignored dampening, its RMSprop momentum: going on with them would not be going on."""
    state_dict = golden(f"opt_{name}8bit_float32.state_dict.pt")
    betas = state_dict["param_groups"][0]["betas"]
    state_dict["param_groups"][0]["betas"] = (betas[0], 0.5)
    optimizer, _ = fresh(f"{name}8bit")
    with pytest.raises(ValueError, match=r"ignores .*=0.5.*set betas\[1\] to 0"):
        optimizer.load_state_dict(state_dict)
    state_dict["param_groups"][0]["betas"] = betas
    optimizer.load_state_dict(state_dict)


# ---- recognition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_bitsandbytes_is_recognized(name, golden):
    state_dict = golden(f"opt_{name}.state_dict.pt")
    assert is_bitsandbytes(state_dict) and is_bitsandbytes(flat_keys(state_dict))
    assert is_bitsandbytes({**state_dict, "state": {}})


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_others_are_not(cls):
    p = params((64, 64))
    optimizer = cls(p)
    assert not is_bitsandbytes(optimizer.state_dict())
    train(p, optimizer, range(1))
    assert not is_bitsandbytes(optimizer.state_dict())


def test_ours_are_not():
    optimizer, p = fresh("AdamW8bit")
    assert not is_bitsandbytes(optimizer.state_dict())
    train(p, optimizer, range(1))
    assert not is_bitsandbytes(optimizer.state_dict())
    assert not is_bitsandbytes({}) and not is_bitsandbytes({"state": {}, "param_groups": []})
