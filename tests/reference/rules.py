"""The rows of the table of optimizers that the tests go through. The updates are `bnbops.testing.references.rules`."""

from dataclasses import dataclass
from typing import Any

import torch

from bnbops.testing.references.rules import UPDATES, Update


@dataclass(frozen=True)
class Rule:
    """A row of the table of optimizers."""

    update: Update
    states: dict[str, bool]  # by name, in order: is its 8-bit codebook signed?
    options: dict[str, Any]  # what the tests take unless they say otherwise
    trust: bool = False  # takes a trust ratio per parameter

    @property
    def operator(self) -> torch._ops.OpOverload:
        """The operator under test."""
        return getattr(torch.ops.bnbops, f"{self.update.direction.__name__}_step_").default


_DECAY = {"lr": 3e-3, "weight_decay": 0.1}
_ADAM = _DECAY | {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_MOMENTUM = _DECAY | {"momentum": 0.9, "dampening": 0.2, "nesterov": False}
_RMSPROP = _DECAY | {"alpha": 0.99, "eps": 1e-8}
_SCHEDULED = {"beta3": 0.9999, "alpha": 5.0, "t_alpha": 10, "t_beta3": 10}

RULES = {
    "adam": Rule(UPDATES["adam"], {"exp_avg": True, "exp_avg_sq": False}, _ADAM),
    "sgd": Rule(UPDATES["sgd"], {}, _DECAY),
    "momentum": Rule(UPDATES["momentum"], {"momentum_buffer": True}, _MOMENTUM),
    "lion": Rule(UPDATES["lion"], {"exp_avg": True}, _DECAY | {"beta1": 0.9, "beta2": 0.99}),
    "rmsprop": Rule(UPDATES["rmsprop"], {"square_avg": True}, _RMSPROP),
    "rmsprop_momentum": Rule(
        UPDATES["rmsprop_momentum"], {"square_avg": True, "momentum_buffer": True}, _RMSPROP | {"momentum": 0.9}
    ),
    "adagrad": Rule(UPDATES["adagrad"], {"sum": True}, _DECAY | {"lr_decay": 0.01, "eps": 1e-10}),
    "lamb": Rule(
        UPDATES["lamb"],
        {"exp_avg": True, "exp_avg_sq": False},
        _ADAM | {"bias_correction": True, "adam_w_mode": True},
        trust=True,
    ),
    "lars": Rule(UPDATES["lars"], {"momentum_buffer": True}, _MOMENTUM, trust=True),
    "signum": Rule(UPDATES["signum"], {"exp_avg": True}, _DECAY | {"momentum": 0.9}),
    "ademamix": Rule(
        UPDATES["ademamix"], {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False}, _ADAM | _SCHEDULED
    ),
}
