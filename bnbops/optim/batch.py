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
        """The same without quantized weights, and with the present options in a tensor."""
        return replace(self, params=[p for p in self.params if not _is_quantized(p)])._with_tensor_options()

    def _with_tensor_options(self) -> Batch:
        """The tensor takes the place of the named options. Those are in the schema and have to be given: as zeros,
        which never change."""
        if not isinstance(self.plan.op, torch._ops.OpOverloadPacket):  # a function in Python: no such argument
            return self
        arguments = [a for a in self.plan.op.default._schema.arguments if a.name in self.options]
        values = torch.tensor([float(self.options[a.name]) for a in arguments], dtype=torch.float64)
        named = {a.name: _ZEROS[str(a.type)] for a in arguments}
        config = {name: value for name, value in self.plan.config.items() if name not in ("params", *_IN_TENSORS)}
        return replace(self, plan=self.plan._replace(config=config), options={**named, "options": values})


_ZEROS = {"float": 0.0, "bool": False, "int": 0}
_IN_TENSORS = ("lr", "betas", "momentum", "weight_decay")  # what schedules change, kept out of a graph's sight


def _is_quantized(param: Tensor) -> bool:
    """A layer's codes, which never have a gradient; the compiler cannot ask a tensor of their class for one."""
    return getattr(param, "bnb_quantized", False) or not (param.is_floating_point() or param.is_complex())
