"""Parameters that are stepped alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import RULES
from bnbops.optim.core.state import Plan


@dataclass(frozen=True)
class Batch:
    """Parameters of one group with the same override, whatever their precision.

    `arguments` are the operators' keyword arguments: what is common to all of them, and their own options.
    """

    plan: Plan
    params: list[Tensor]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, plan: Plan, params: list[Tensor], options: Mapping[str, Any]) -> Batch:
        """With options as param groups have them."""
        lr = options["lr"]
        lr = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
        return cls(plan, params, {**options, "lr": lr})

    @classmethod
    def in_graph(cls, plan: Plan, params: list[Tensor], options: Mapping[str, Any]) -> Batch:
        """With options that `as_tensors` has made. The named ones, whose place they take, are in the schema and have to
        be given: as zeros, which never change."""
        maximize = plan.config["maximize"]
        config = {name: value for name, value in plan.config.items() if name not in ("params", *_IN_TENSORS)}
        arguments = {"lr": options["lr"], "maximize": maximize, **_unused(plan), **options}
        return cls(plan._replace(config=config), params, arguments)


_IN_TENSORS = ("lr", "betas", "momentum", "weight_decay")  # what schedules change, kept out of a graph's sight


def as_tensors(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a graph takes them: `lr` and, in one tensor, those that are the operator's own."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        # Not the tensor itself: for one of float64, without dimensions, on the CPU, torch (2.13) makes a number of the
        # graph, finds that nothing needs it, and begins all over again.
        lr = torch.empty(1, dtype=lr.dtype, device=lr.device).copy_(lr.detach())
    else:
        lr = torch.tensor([lr], dtype=torch.float64, device="cpu")
    if not (names := list(_unused(plan))):
        return {**options, "lr": lr}
    values = torch.tensor([float(options[name]) for name in names], dtype=torch.float64, device="cpu")
    return {"lr": lr, "options": values}


_ZEROS = {"float": 0.0, "bool": False, "int": 0}
_OPTIONS = {rule.name: {option.name: _ZEROS[option.type] for option in rule.options} for rule in RULES.values()}


def _unused(plan: Plan) -> dict[str, Any]:
    """Zeros for the options that a tensor has; a step in Python has none that go into a tensor."""
    return _OPTIONS.get(plan.rule.name, {})


def option(plan: Plan, arguments: Mapping[str, Any], name: str) -> float | Tensor:
    """One of the operator's own options, where `Batch.in_graph` has them in a tensor, too."""
    return arguments["options"][list(_unused(plan)).index(name)] if "options" in arguments else arguments[name]
