"""state_dict, load_state_dict, copies: training continues bit-exactly, and nothing that does not fit is loaded."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from bnbops import optim
from bnbops.optim import AdamW8bit
from cases.optimizers import MIXED, assert_same, assert_same_state, flat_state, params, train

pytestmark = pytest.mark.every_torch


def through_torch_save(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Every optimizer, and options that give its state more tensors.
CASES = {
    "AdamW": {},
    "AdamW8bit": {},
    "Adam8bit, clipping": {"percentile_clipping": 5},
    "SGD32bit": {"momentum": 0.0},
    "SGD8bit": {"momentum": 0.9, "nesterov": True},
    "Lion8bit": {},
    "RMSprop8bit": {},
    "RMSprop8bit, momentum": {"momentum": 0.9},
    "Adagrad8bit": {"lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "LAMB8bit": {"trust_clip": True},
    "LARS8bit": {"momentum": 0.9},
    "AdEMAMix8bit": {"t_alpha": 10, "t_beta3": 10},
    "PagedAdamW8bit": {},
}


def copied(
    optimizer: torch.optim.Optimizer, p: list[nn.Parameter], how: str
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An independent optimizer in the same state."""
    if how == "deepcopy":
        return copy.deepcopy((optimizer, p))
    if how == "pickle":
        return pickle.loads(pickle.dumps((optimizer, p)))
    q = copy.deepcopy(p)
    fresh = type(optimizer)([{"params": q[:2]}, {"params": q[2:]}], lr=123.0)
    state_dict = optimizer.state_dict()
    fresh.load_state_dict(through_torch_save(state_dict) if how == "torch.save" else state_dict)
    return fresh, q


@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_training_continues_bit_exactly(case, dtype, how):
    p = params(*MIXED, dtype=dtype)
    cls, options = getattr(optim, case.split(",")[0]), CASES[case]
    optimizer = cls([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.3, "lr": 3e-3}], lr=1e-3, **options)
    train(p, optimizer, range(3))
    other, q = copied(optimizer, p, how)
    assert_same_state(optimizer, other)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in other.param_groups
    ]
    snapshot = copy.deepcopy(flat_state(other))
    train(p, optimizer, range(3, 6))
    assert_same(list(flat_state(other).values()), list(snapshot.values()))  # nothing is shared
    train(q, other, range(3, 6))
    assert_same(p, q)
    assert_same_state(optimizer, other)


def test_state_dict_is_plain():
    """torch's format: ids to dicts of tensors, groups of plain values, and a version."""
    p = params(*MIXED)
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(1))
    state_dict = optimizer.state_dict()
    assert {"state", "param_groups"} <= state_dict.keys()
    assert list(state_dict["state"]) == [0, 1, 2, 3]
    assert all(isinstance(x, Tensor) for state in state_dict["state"].values() for x in state.values())
    assert state_dict["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert any("version" in key for key in [*state_dict, *state_dict["param_groups"][0]])


def test_loading_leaves_the_argument_alone():
    p = params((64, 80))
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state_dict)
    q = params((64, 80), seed=1)
    fresh = AdamW8bit(q)
    fresh.load_state_dict(state_dict=state_dict)
    train(q, fresh, range(3))
    assert state_dict["param_groups"] == kept["param_groups"]
    assert_same(list(state_dict["state"][0].values()), list(kept["state"][0].values()))


def test_partial_state_loads():
    """Parameters that had no gradient yet have no state."""
    p = params(*MIXED)
    optimizer = AdamW8bit(p)
    train(p[:1], optimizer, range(2))
    fresh = AdamW8bit(params(*MIXED))
    fresh.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, fresh)


def test_frozen_parameters():
    """They get no state, and the others keep theirs; once thawed they begin at step one."""
    p = params(*MIXED)
    p[1].requires_grad_(False)
    optimizer = AdamW8bit(p)
    optimizer.init_state()
    train([p[0], *p[2:]], optimizer, range(2))
    assert list(optimizer.state_dict()["state"]) == [0, 2, 3]
    q = copy.deepcopy(p)
    fresh = AdamW8bit(q)
    fresh.load_state_dict(through_torch_save(optimizer.state_dict()))
    for parameters, one in ((p, optimizer), (q, fresh)):
        parameters[1].requires_grad_(True)
        train(parameters, one, range(2, 4))
    assert_same(p, q)
    assert_same_state(optimizer, fresh)
    assert [fresh.state[x]["step"].item() for x in q] == [4, 2, 4, 4]


def test_parameters_added_after_loading():
    p = params(*MIXED)
    optimizer = AdamW8bit(p[:2])
    train(p[:2], optimizer, range(2))
    q = copy.deepcopy(p)
    fresh = AdamW8bit(q[:2])
    fresh.load_state_dict(optimizer.state_dict())
    for parameters, one in ((p, optimizer), (q, fresh)):
        one.add_param_group({"params": parameters[2:], "optim_bits": 32, "lr": 0.5})
        train(parameters, one, range(2, 4))
    assert_same(p, q)
    assert_same_state(optimizer, fresh)
    assert [fresh.state[x]["step"].item() for x in q] == [4, 4, 2, 2]
    with pytest.raises(ValueError, match="group"):
        AdamW8bit(p).load_state_dict(fresh.state_dict())


def test_groups_come_from_the_state_dict():
    """What was changed during training, and what a user put there, is saved and loaded."""
    p = params((64, 80))
    optimizer = AdamW8bit([{"params": p, "name": "all"}], lr=1e-3)
    train(p, optimizer, range(1))
    optimizer.param_groups[0] |= {"lr": 0.25, "betas": (0.5, 0.75)}
    fresh = AdamW8bit(params((64, 80)), lr=123.0, maximize=True)
    fresh.load_state_dict(through_torch_save(optimizer.state_dict()))
    group = fresh.param_groups[0]
    assert (group["name"], group["lr"], group["betas"], group["maximize"]) == ("all", 0.25, (0.5, 0.75), False)
    group["lr"] = 0.125
    assert fresh.state_dict()["param_groups"][0]["lr"] == 0.125
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_state_dict_without_options_added_since():
    """Format version 1 had no percentile clipping and no paged states at first."""
    p = params((64, 80))
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(1))
    state_dict = optimizer.state_dict()
    for option in ("percentile_clipping", "is_paged"):
        del state_dict["param_groups"][0][option]
    fresh = AdamW8bit(params((64, 80)), percentile_clipping=5)
    fresh.load_state_dict(state_dict)
    assert (fresh.param_groups[0]["percentile_clipping"], fresh.param_groups[0]["is_paged"]) == (100, False)
    assert_same_state(optimizer, fresh)


def test_states_go_to_their_parameters_device():
    p = params(*MIXED)
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(2))
    q = [nn.Parameter(x.detach().to("meta")) for x in p]
    fresh = AdamW8bit(q)
    fresh.load_state_dict(optimizer.state_dict())
    expected, loaded = flat_state(optimizer), flat_state(fresh)
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        assert tensor.is_meta and (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype)

    before = copy.deepcopy(optimizer)
    with pytest.raises(NotImplementedError, match="meta"):  # there is nothing to load
        optimizer.load_state_dict(fresh.state_dict())
    assert_same_state(optimizer, before)


def test_flat_absmax_loads():
    """bitsandbytes' layout, one absmax for 256 elements across rows, is kept and used."""
    p = params((100, 77))
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(1))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        state_dict["state"][0][name] = torch.ones(math.ceil(7700 / 256))
    optimizer.load_state_dict(state_dict)
    train(p, optimizer, range(1, 3))
    assert optimizer.state[p[0]]["exp_avg_absmax"].shape == (31,)
    assert p[0].isfinite().all()


def edit(*path: object, to: object = None) -> object:
    """A change to a state dict: sets, or with `to=None` deletes, the item at `path`."""

    def change(state_dict: dict) -> None:
        for key in path[:-1]:
            state_dict = state_dict[key]
        if to is None:
            del state_dict[path[-1]]
        else:
            state_dict[path[-1]] = to(state_dict.get(path[-1])) if callable(to) else to

    return change


BAD_STATE_DICTS = {
    "no state": (edit("state"), "state"),
    "no groups": (edit("param_groups"), "param_groups"),
    "one group too few": (edit("param_groups", to=lambda g: g[:1]), "group"),
    "one group too many": (edit("param_groups", to=lambda g: g + g[:1]), "group"),
    "one parameter too few": (edit("param_groups", 0, "params", to=lambda p: p[:1]), "param"),
    "one parameter too many": (edit("param_groups", 1, "params", to=lambda p: [*p, 9]), "param"),
    "hyperparameter missing": (edit("param_groups", 0, "betas"), "betas"),
    "state of an unknown parameter": (edit("state", 77, to=lambda _: {"step": torch.zeros(())}), "77"),
    "no step": (edit("state", 1, "step"), "step"),
    "other hyperparameters": (
        edit("param_groups", to=lambda g: [{"params": g[0]["params"], "format_version": 1, "momentum": 0.9}, g[1]]),
        "another optimizer",
    ),
    "a version to come": (edit("param_groups", 1, "format_version", to=99), "format_version 99"),
    "no version": (edit("param_groups", 1, "format_version"), "format_version"),
    "no exp_avg": (edit("state", 0, "exp_avg"), "exp_avg"),
    "absmax missing": (edit("state", 0, "exp_avg_absmax"), "exp_avg_absmax"),
    "extra key": (edit("state", 0, "momentum", to=lambda _: torch.zeros(64, 80)), "momentum"),
    "another optimizer's keys": (
        edit("state", 1, to=lambda _: {"step": torch.tensor(1.0), "sum": torch.zeros(5, 7)}),
        "sum",
    ),
    "exp_avg of another shape": (edit("state", 1, "exp_avg", to=lambda x: x.t().contiguous()), "exp_avg"),
    "codes of another shape": (edit("state", 0, "exp_avg", to=lambda x: x[:-1]), "exp_avg"),
    "short absmax": (edit("state", 0, "exp_avg_sq_absmax", to=lambda x: x[:-1]), "exp_avg_sq_absmax"),
    "absmax in bf16": (edit("state", 0, "exp_avg_absmax", to=lambda x: x.bfloat16()), "exp_avg_absmax"),
    "codes as floats": (edit("state", 0, "exp_avg", to=lambda x: x.float()), "exp_avg"),
    "fp32 state in bf16": (edit("state", 1, "exp_avg_sq", to=lambda x: x.bfloat16()), "exp_avg_sq"),
    "step of two elements": (edit("state", 1, "step", to=lambda x: x.repeat(2)), "step"),
    "integer step": (edit("state", 1, "step", to=lambda x: x.long()), "step"),
    "step as a number": (edit("state", 1, "step", to=5), "step"),
    "short gnorm_vec": (edit("state", 1, "gnorm_vec", to=lambda _: torch.zeros(99)), "gnorm_vec"),
    "state as a list": (edit("state", 1, "exp_avg", to=lambda x: x.tolist()), "exp_avg"),
}


@pytest.mark.parametrize("case", BAD_STATE_DICTS)
def test_bad_state_dicts_change_nothing(case):
    change, match = BAD_STATE_DICTS[case]
    p = params(*MIXED)
    optimizer = AdamW8bit([{"params": p[:2]}, {"params": p[2:], "lr": torch.tensor(0.5)}])
    train(p, optimizer, range(2))
    other = copy.deepcopy(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][1]["lr"] = 0.25
    for state in state_dict["state"].values():
        state["step"] += 5
    change(state_dict)
    with pytest.raises((ValueError, KeyError, TypeError), match=match):
        optimizer.load_state_dict(state_dict)
    assert_same_state(optimizer, other)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 0.5]
    train(p, optimizer, range(2, 3))


def test_load_hooks_run():
    p = params((64, 80))
    optimizer = AdamW8bit(p)
    train(p, optimizer, range(1))
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda opt, sd: seen.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post"]


def test_scheduler_survives_a_checkpoint():
    p = params((64, 80))
    optimizer = AdamW8bit(p, lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(3):
        train(p, optimizer, range(step, step + 1))
        scheduler.step()
    q = copy.deepcopy(p)
    fresh = AdamW8bit(q, lr=torch.tensor(0.7))
    kept = fresh.param_groups[0]["lr"]
    other = torch.optim.lr_scheduler.CosineAnnealingLR(fresh, T_max=10)
    fresh.load_state_dict(through_torch_save(optimizer.state_dict()))
    other.load_state_dict(scheduler.state_dict())
    assert fresh.param_groups[0]["lr"] is kept, "a compiled step holds the lr tensor"
    for step in range(3, 6):
        train(p, optimizer, range(step, step + 1))
        train(q, fresh, range(step, step + 1))
        scheduler.step()
        other.step()
        assert fresh.param_groups[0]["lr"].item() == optimizer.param_groups[0]["lr"].item()
    assert_same(p, q)


@pytest.mark.parametrize(
    ("saved", "live", "keys"), [("LAMB8bit", "Adam8bit", "max_unorm"), ("LARS8bit", "SGD8bit", "max_unorm")]
)
def test_a_state_dict_of_another_optimizer_with_the_same_states_is_refused(saved: str, live: str, keys: str) -> None:
    p = params(*MIXED)
    options = {"lr": 0.1, **({"momentum": 0.9} if "LARS" in saved else {})}
    source = getattr(optim, saved)(p, **options)
    train(p, source, range(2))
    target = getattr(optim, live)(p, **options)
    train(p, target, range(2))
    before = copy.deepcopy(flat_state(target)), copy.deepcopy(target.param_groups)
    with pytest.raises(ValueError, match=rf"has \[.*'{keys}'.*\], which {live} has not; is it of another optimizer"):
        target.load_state_dict(source.state_dict())
    for key, tensor in flat_state(target).items():
        assert torch.equal(tensor, before[0][key]), key
    assert [group["lr"] for group in target.param_groups] == [group["lr"] for group in before[1]]
