"""Every scheduler of torch.optim drives our optimizers as it drives torch's: same rates, same momenta, same steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from bnbops.optim import AdamW8bit
from cases.optimizers import assert_same, assert_same_state, params, train
from cases.torch_pairs import LR, NAMES, add_group, make, pair, parameters, train_both

pytestmark = pytest.mark.every_torch

STEPS = 12
LOSSES = [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]  # with plateaus

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 3)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 if step % 2 else 1.05),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 7], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "CyclicLR with momentum": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, mode="exp_range"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS, cycle_momentum=False),
    "OneCycleLR with momentum": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=STEPS, three_phase=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-3, anneal_epochs=5),
}
CYCLES_MOMENTUM = [key for key in SCHEDULERS if key.endswith("with momentum")]
names = pytest.mark.parametrize("name", NAMES)


def advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(LOSSES[step])
    else:
        scheduler.step()


def scheduled(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """What a scheduler may change in each group."""
    return [(float(g["lr"]), g.get("betas"), g.get("momentum")) for g in optimizer.param_groups]


def two_groups(name: str) -> tuple[Optimizer, Optimizer]:
    """Ours and torch's, with momentum where there is such a thing and another rate for the second group."""
    optimizers = pair(name, [(64, 80)], **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {}))
    for optimizer in optimizers:
        add_group(optimizer, {"params": params((5, 7), seed=1), "lr": 2 * LR})
    return optimizers


def test_every_scheduler_is_here():
    covered = {key.split()[0] for key in SCHEDULERS} - {"SWALR"}
    assert covered == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("key", SCHEDULERS)
@names
def test_same_schedule_same_parameters(name, key):
    ours, theirs = two_groups(name)
    if key in CYCLES_MOMENTUM and name == "Adagrad":
        for optimizer in (ours, theirs):
            with pytest.raises(ValueError, match="must support momentum"):
                SCHEDULERS[key](optimizer)
        return
    a, b = SCHEDULERS[key](ours), SCHEDULERS[key](theirs)
    seen = []
    for step in range(STEPS - 1):
        assert scheduled(ours) == scheduled(theirs)
        seen.append(scheduled(ours))
        train_both(ours, theirs, range(step, step + 1))
        advance(a, step)
        advance(b, step)
    assert len({group[0][0] for group in seen}) > 1  # the rate did change
    if key in CYCLES_MOMENTUM:
        assert len({group[0][1:] for group in seen}) > 1


@pytest.mark.parametrize("key", SCHEDULERS)
def test_a_tensor_rate_follows_the_same_schedule(key):
    """The tensor that was given stays the group's, and the steps are those of numbers."""
    p, q = params((64, 80), (5, 7)), params((64, 80), (5, 7))
    lr = torch.tensor(LR, dtype=torch.float64)
    tensor, number = AdamW8bit(p, lr=lr), AdamW8bit(q, lr=LR)
    a, b = SCHEDULERS[key](tensor), SCHEDULERS[key](number)
    for step in range(STEPS - 1):
        rate, expected = tensor.param_groups[0]["lr"], number.param_groups[0]["lr"]
        assert rate is lr and rate.item() == pytest.approx(expected, rel=1e-12)
        number.param_groups[0]["lr"] = rate.item()  # the last bit may differ: compare steps at the same rate
        train(p, tensor, range(step, step + 1))
        train(q, number, range(step, step + 1))
        number.param_groups[0]["lr"] = expected
        advance(a, step)
        advance(b, step)
    assert_same(p, q)


@pytest.mark.parametrize("key", SCHEDULERS)
def test_resuming_a_schedule(key):
    """Loaded into a new pair, optimizer and scheduler go on as before."""
    p = params((64, 80), (5, 7))
    optimizer = AdamW8bit(p, lr=LR)
    scheduler = SCHEDULERS[key](optimizer)
    for step in range(4):
        train(p, optimizer, range(step, step + 1))
        advance(scheduler, step)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))

    q = copy.deepcopy(p)
    resumed = AdamW8bit(q, lr=LR)
    resumed_scheduler = SCHEDULERS[key](resumed)
    resumed.load_state_dict(saved[0])
    resumed_scheduler.load_state_dict(saved[1])
    for step in range(4, STEPS - 1):
        train(p, optimizer, range(step, step + 1))
        train(q, resumed, range(step, step + 1))
        advance(scheduler, step)
        advance(resumed_scheduler, step)
        assert scheduled(optimizer) == scheduled(resumed)
    assert_same(p, q)
    assert_same_state(optimizer, resumed)


@pytest.mark.parametrize("key", SCHEDULERS)
def test_a_checkpoint_from_before_the_scheduler(key):
    """Schedulers put keys of their own into the groups: a state dict without them loads, and they stay."""
    p, q = params((64, 80)), params((64, 80))
    plain, scheduled_one = AdamW8bit(p, lr=LR), AdamW8bit(q, lr=LR)
    train(p, plain, range(2))
    scheduler = SCHEDULERS[key](scheduled_one)
    added = {k: v for k, v in scheduled_one.param_groups[0].items() if k not in plain.param_groups[0]}
    scheduled_one.load_state_dict(plain.state_dict())
    assert {k: scheduled_one.param_groups[0].get(k) for k in added} == added
    assert scheduled_one.param_groups[0]["lr"] == LR
    train(q, scheduled_one, range(2, 3))
    advance(scheduler, 0)


@names
def test_averaged_model_and_swa_rate(name):
    """Weight averaging with SWALR: the average, the network and the rate are those under torch's optimizer."""

    def run(ours: bool) -> tuple[list, list, list]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))
        optimizer = make(name, model.parameters(), ours=ours)
        averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))]
        scheduler, rates = SWALR(optimizer, swa_lr=LR / 8, anneal_epochs=4), []
        data = torch.randn(16, 64)
        for _ in range(8):
            optimizer.zero_grad()
            (model(data) - data[:, :1]).square().mean().backward()
            optimizer.step()
            for average in averages:
                average.update_parameters(model)
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates, parameters(optimizer), [p for average in averages for p in average.parameters()]

    (rates, model, averages), (expected_rates, expected_model, expected_averages) = run(True), run(False)
    assert rates == expected_rates and len(set(rates)) > 3
    for p, q in zip([*model, *averages], [*expected_model, *expected_averages], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
