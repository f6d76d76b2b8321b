"""Parameters that are stepped alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnbops.optim.call import Plan


@dataclass(frozen=True)
class Batch:
    """Parameters of one group with the same override, whatever their precision.

    `scalars` and `options` are keyword arguments of the operator: common to all operators, and its own.
    """

    plan: Plan
    params: list[Tensor]
    scalars: dict[str, Any]
    options: dict[str, Any]

    def for_compiled_step(self) -> Batch:
        """The same with the present options in a tensor, which takes the place of the named ones.

        Those are in the schema and have to be given: as zeros, which never change.
        """
        if not isinstance(self.plan.op, torch._ops.OpOverloadPacket):  # a function in Python: no such argument
            return self
        arguments = [a for a in self.plan.op.default._schema.arguments if a.name in self.options]
        values = torch.tensor([float(self.options[a.name]) for a in arguments], dtype=torch.float64)
        named = {a.name: _ZEROS[str(a.type)] for a in arguments}
        config = {name: value for name, value in self.plan.config.items() if name not in ("params", *_IN_TENSORS)}
        return replace(self, plan=self.plan._replace(config=config), options={**named, "options": values})


_ZEROS = {"float": 0.0, "bool": False, "int": 0}
_IN_TENSORS = ("lr", "betas", "momentum", "weight_decay")  # what schedules change, kept out of a graph's sight
