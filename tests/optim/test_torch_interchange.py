"""torch.optim's state dicts in our optimizers, and ours in torch's: the next steps are the other's."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_torch_conventions import SUPPORTED
from torch import nn

from bnbops import optim
from bnbops.optim import AdamW8bit, GlobalOptimManager
from bnbops.optim.checkpoints.interchange import is_bitsandbytes
from bnbops.optim.checkpoints.torch_interchange import is_torch
from cases.interchange import bitsandbytes_dict, bitsandbytes_state
from cases.optimizer_classes import FAMILIES, build
from cases.optimizers import MIXED, assert_same, assert_same_state, params, train
from cases.paged import is_paged
from cases.torch_pairs import NAMES, assert_alike, make, parameters, train_both
from reference import states as ref
from reference.group import CODEBOOK_OF, NOT_NEGATIVE

pytestmark = pytest.mark.every_torch


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copied(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters(optimizer)]


def trained(name: str, ours: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.Optimizer:
    p = params(*MIXED, dtype=dtype)
    optimizer = make(name, [{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], ours=ours, **options)
    train(p, optimizer, range(3))
    return optimizer


def other(optimizer: torch.optim.Optimizer, name: str, ours: bool, **options: Any) -> torch.optim.Optimizer:
    """The other library's with copies of the parameters, and other options than those that are loaded."""
    p = copied(optimizer)
    return make(name, [{"params": p[:2]}, {"params": p[2:]}], ours=ours, **{"lr": 0.7, **options})


# ---- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), SUPPORTED)
def test_from_torch(name, options):
    """With 32-bit states training goes on as torch's does, up to the rounding of either's arithmetic."""
    theirs = trained(name, **options)
    ours = other(theirs, name, ours=True)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for p, q in zip(parameters(theirs), parameters(ours), strict=True):
        for key, x in theirs.state[p].items():
            assert key == "step" or torch.equal(ours.state[q][key], x)
    train_both(ours, theirs, range(3, 8))


@pytest.mark.parametrize(("name", "options"), SUPPORTED)
def test_to_torch(name, options):
    ours = trained(name, ours=True, **options)
    theirs = other(ours, name, ours=False)
    written = ours.torch_state_dict()
    theirs.load_state_dict(through_a_file(written))
    for group, fresh in zip(written["param_groups"], theirs.state_dict()["param_groups"], strict=True):
        assert group.keys() == fresh.keys()
    train_both(ours, theirs, range(3, 8))
    again = other(theirs, name, ours=True)
    again.load_state_dict(theirs.state_dict())
    train_both(again, theirs, range(8, 10))


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_writes_is_what_torch_had(name):
    """Options and states, by way of ours."""
    theirs = trained(name, maximize=True, foreach=True, **({"momentum": 0.5} if name in ("SGD", "RMSprop") else {}))
    ours = other(theirs, name, ours=True)
    ours.load_state_dict(theirs.state_dict())
    saved, written = theirs.state_dict(), ours.torch_state_dict()
    assert [{**g, "foreach": None} for g in saved["param_groups"]] == written["param_groups"]
    assert saved["state"].keys() == written["state"].keys()
    for key, state in saved["state"].items():
        assert list(state) == list(written["state"][key])
        assert_same(list(state.values()), list(written["state"][key].values()))
    before = copy.deepcopy(written)
    train(parameters(ours), ours, range(3, 5))
    for key, state in written["state"].items():  # nothing is shared
        assert_same(list(state.values()), list(before["state"][key].values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_8bit_states(name, dtype):
    """Nearest codes; from the values that they stand for, the next steps are torch's."""
    options = {"momentum": 0.5} if name in ("SGD", "RMSprop") else {}
    theirs = trained(name, dtype=dtype, **options)
    ours = other(theirs, f"{name}8bit", ours=True)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(parameters(theirs), parameters(ours), strict=True):
        state = ours.state[q]
        assert any(key.endswith("_absmax") for key in state) == (p.dim() > 1 and p.numel() >= 4096)
        for key, x in theirs.state[p].items():
            if f"{key}_absmax" not in state:
                assert state[key].dtype == torch.float32 and (key == "step" or torch.equal(state[key], x.float()))
                continue
            code, divisor = CODEBOOK_OF[key], key in NOT_NEGATIVE
            error = torch.zeros(x.shape, dtype=torch.float64)
            ref.assert_encoded(state[key], state[f"{key}_absmax"], x.double(), error, code, key, divisor)
    if dtype == torch.float32:
        theirs.load_state_dict(ours.torch_state_dict())
        for one in (ours, theirs):
            train(parameters(one), one, range(3, 4))
        assert_alike(ours, theirs)


def test_precision_is_that_of_the_options(tmp_path):
    """Sizes, vectors, overrides and pages."""
    p = params((64, 80), (64, 90), (70_000,), (5000,))
    theirs = torch.optim.AdamW(p)
    train(p, theirs, range(2))
    q = copied(theirs)
    GlobalOptimManager.get_instance().override_config(q[1], "optim_bits", 32)
    ours = optim.PagedAdamW8bit(q, paged_directory=tmp_path, percentile_clipping=90)
    ours.load_state_dict(theirs.state_dict())
    assert [ours.state[x]["exp_avg"].dtype for x in q] == [torch.uint8, torch.float32, torch.uint8, torch.float32]
    assert ours.state[q[2]]["exp_avg_absmax"].shape == (274,)
    assert all(is_paged(x, tmp_path) for state in ours.state.values() for key, x in state.items() if key != "step")
    assert ours.param_groups[0]["percentile_clipping"] == 90
    train(q, ours, range(2))
    ours.state[q[0]]["exp_avg"].zero_()
    with pytest.raises(RuntimeError, match="reset_state"):
        ours.step()


# ---- options and unusual states --------------------------------------------------------------------------------


def test_options():
    """Tensors, what schedulers add, and choices among torch's implementations."""
    p = params(*MIXED)
    lr = torch.tensor(0.5)
    theirs = torch.optim.AdamW(
        [{"params": p[:2], "lr": torch.tensor(0.25)}, {"params": p[2:], "name": "rest"}],
        betas=(torch.tensor(0.5), torch.tensor(0.75)), capturable=False, foreach=False, maximize=True,
    )  # fmt: skip
    torch.optim.lr_scheduler.StepLR(theirs, 3)
    ours = optim.AdamW([{"params": p[:2], "lr": lr}, {"params": p[2:]}], optim_bits=8)
    ours.load_state_dict(theirs.state_dict())
    first, second = ours.param_groups
    assert first["lr"] is lr and lr == 0.25 and second["lr"] == 1e-3
    assert first["betas"] == (0.5, 0.75) and first["maximize"] and first["optim_bits"] == 8
    assert second["name"] == "rest" and first["initial_lr"] == 0.25
    assert not {"foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay"} & first.keys()
    written = ours.torch_state_dict()["param_groups"]
    assert written[1]["name"] == "rest" and "initial_lr" in written[0] and type(written[0]["lr"]) is float
    assert not {"optim_bits", "is_paged", "format_version", "percentile_clipping"} & written[0].keys()


def test_parameters_without_state():
    p = params(*MIXED)
    theirs = torch.optim.Adam(p)
    train(p[:2], theirs, range(2))
    ours = optim.Adam(p)
    ours.load_state_dict(theirs.state_dict())
    assert [bool(ours.state[x]) for x in p] == [True, True, False, False]
    assert ours.torch_state_dict()["state"].keys() == {0, 1}
    ours.load_state_dict(torch.optim.Adam(p).state_dict())  # before the first step
    assert not any(ours.state.values())


def test_steps_that_are_numbers():
    """As older versions of torch wrote them."""
    theirs = trained("Adam", weight_decay=0)
    saved = theirs.state_dict()
    saved["param_groups"][1]["weight_decay"] = 0
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    ours = other(theirs, "Adam", ours=True)
    ours.load_state_dict(saved)
    assert {state["step"].item() for state in ours.state.values()} == {3.0}


def test_momentum_before_its_first_step():
    """torch's first buffer is the gradient, whatever the dampening; ours that was added later is one of zeros there."""
    options = {"momentum": 0.9, "dampening": 0.5}
    theirs = make("SGD", params(*MIXED), ours=False, **options)
    saved = theirs.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(4)}
    ours = make("SGD", copied(theirs), ours=True)
    ours.load_state_dict(saved)
    assert not any(ours.state.values())
    ours.init_state()
    theirs.load_state_dict(ours.torch_state_dict())
    train_both(ours, theirs, range(3))

    ours = make("SGD", params(*MIXED), ours=True)
    train(parameters(ours), ours, range(2))
    assert ours.torch_state_dict()["state"] == {}
    ours.param_groups[0].update(options)
    with pytest.raises(ValueError, match=r"parameter 0 .* has no momentum_buffer yet: take a step or call init_state"):
        ours.torch_state_dict()
    ours.init_state()
    theirs = make("SGD", copied(ours), ours=False)
    theirs.load_state_dict(ours.torch_state_dict())
    train_both(ours, theirs, range(2, 5))


def test_recognition():
    for name in NAMES:
        assert is_torch(trained(name).state_dict()) and not is_bitsandbytes(trained(name).state_dict())
    assert not is_torch(AdamW8bit(params((4, 4))).state_dict())
    assert not is_torch(bitsandbytes_dict(bitsandbytes_state((64, 80)))) and not is_torch({})


# ---- refusals --------------------------------------------------------------------------------------------------


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    """An AdamW's state dict with a change."""

    def make_it() -> dict[str, Any]:
        saved = copy.deepcopy(trained("AdamW").state_dict())
        change(saved)
        return saved

    return make_it


def of(cls: type[torch.optim.Optimizer], **options: Any) -> Callable[[], dict[str, Any]]:
    def make_it() -> dict[str, Any]:
        p = params(*MIXED)
        optimizer = cls([{"params": p[:2]}, {"params": p[2:]}], **options)
        train(p, optimizer, range(1))
        return optimizer.state_dict()

    return make_it


L2 = r"weight_decay=0.1, which torch.optim.Adam adds to the gradient; AdamW8bit decouples it.*'decoupled_weight_decay'"
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "amsgrad": (of(torch.optim.AdamW, amsgrad=True), "amsgrad=True, which AdamW8bit does not support"),
    "Adam's weight decay": (of(torch.optim.Adam, weight_decay=0.1), L2),
    "which weight decay": (edit(lambda s: s["param_groups"][1].pop("decoupled_weight_decay")), L2),
    **{
        cls.__name__: (of(cls, lr=0.1), "lacks .*torch.optim's Adam and AdamW: is it of another optimizer")
        for cls in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam,
                    torch.optim.Adamax, torch.optim.Adadelta)
    },
    "groups": (edit(lambda s: s["param_groups"].pop()), "state dict has param groups of .2. parameters"),
    "parameters": (edit(lambda s: s["param_groups"][0]["params"].pop()), r"groups of \[1, 2\] parameters.* \[2, 2\]"),
    "a shape": (edit(lambda s: s["state"][0].update(exp_avg=torch.ones(3))), "'exp_avg' is .* of shape .3."),
    "codes": (edit(lambda s: s["state"][0].update(exp_avg=torch.ones(64, 80).byte())), "'exp_avg' is torch.uint8"),
    "no step": (edit(lambda s: s["state"][0].pop("step")), "missing .'step'"),
    "more": (edit(lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(64, 80))), "unexpected .'max_exp_avg_sq'"),
    "no tensor": (edit(lambda s: s["state"][0].update(exp_avg=[1.0])), r"\['exp_avg'\] are not tensors"),
    "unknown parameters": (edit(lambda s: s["state"].update({9: s["state"][0]})), "no group holds: .9."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_changes_nothing(case):
    saved, match = REFUSED[case]
    p = params(*MIXED)
    optimizer = AdamW8bit([{"params": p[:2]}, {"params": p[2:]}], lr=0.7)
    train(p, optimizer, range(2))
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved())
    assert_same_state(optimizer, before)
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_centered():
    with pytest.raises(ValueError, match="centered=True, which RMSprop8bit does not support"):
        optim.RMSprop8bit([{"params": p} for p in (params(*MIXED)[:2], params(*MIXED)[2:])]).load_state_dict(
            of(torch.optim.RMSprop, centered=True)()
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_optimizers_without_counterpart(name):
    if name in NAMES:
        return
    p = params(*MIXED)
    ours = build(name, [{"params": p[:2]}, {"params": p[2:]}])
    for call in (ours.torch_state_dict, lambda: ours.load_state_dict(of(torch.optim.SGD, lr=0.1, momentum=0.9)())):
        with pytest.raises(ValueError, match=f"{name} has no counterpart in torch.optim"):
            call()


def test_options_that_torch_has_not():
    ours = AdamW8bit(params((64, 80)), percentile_clipping=5)
    with pytest.raises(ValueError, match=r"percentile_clipping=5; torch.optim's Adam and AdamW would go on without"):
        ours.torch_state_dict()
