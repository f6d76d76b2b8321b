"""Our optimizers beside torch's that do the same, for the tests that they behave alike."""

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bnbops import optim
from bnbops.versions import torch_is
from cases.optimizers import MIXED, params, train

NAMES = ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad"]  # ours with 32-bit states do what torch's of that name do
LR = 2.0**-6  # the same in every precision
ONLY_IN_TORCH = {"Adam": {"decoupled_weight_decay": True}}  # as bitsandbytes' Adam does


def make(name: str, params: Any, *, ours: bool, **options: Any) -> Optimizer:
    """Ours or torch's optimizer of that name."""
    options = {"lr": LR, **copy.deepcopy(options)}
    if ours:
        return getattr(optim, name)(params, **options)
    return getattr(torch.optim, name)(params, **ONLY_IN_TORCH.get(name, {}), **options)


def pair(name: str, shapes: list[tuple[int, ...]] = MIXED, **options: Any) -> tuple[Optimizer, Optimizer]:
    """Ours and torch's, each with the same parameters of its own."""
    return make(name, params(*shapes), ours=True, **options), make(name, params(*shapes), ours=False, **options)


def add_group(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """`optimizer.add_param_group(group)`, and its parameters' states, which torch's Adagrad before 2.13 forgets."""
    optimizer.add_param_group(group)
    if isinstance(optimizer, torch.optim.Adagrad) and not torch_is("2.13"):
        for param in optimizer.param_groups[-1]["params"]:
            optimizer.state[param] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(param)}


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_alike(ours: Optimizer, theirs: Optimizer) -> None:
    """Parameters agree to 1e-5, or to 2e-6 where they came from 1 to near zero: each step rounds 1 by up to 6e-8."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def train_both(ours: Optimizer, theirs: Optimizer, steps: range) -> None:
    """The same steps with the same gradients, and the same result."""
    for optimizer in (ours, theirs):
        train(parameters(optimizer), optimizer, steps)
    assert_alike(ours, theirs)
