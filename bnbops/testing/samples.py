"""Sample inputs of every operator: what `python -m bnbops` runs and what the tests feed to `torch.library.opcheck`."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import torch

from bnbops._library import ISAS, operator
from bnbops.testing import blockwise, four_bit, int8, optimizer
from bnbops.testing.expect import Arguments, Checked, Reference, expect
from bnbops.testing.references.rules import UPDATES
from bnbops.testing.sample import Sample, copied

__all__ = ["OPERATORS", "SAMPLED", "Sample", "operator", "samples"]


def samples(name: str, device: torch.device | str = "cpu") -> list[Sample]:
    """Samples of the operator called "op" or "op.overload", in memory of their own, but for `options` on the device."""
    found = []
    for sample in OPERATORS[name][0]():
        on_device = sample.map(lambda x: copied(x, torch.device(device)))
        held = {key: x.clone() for key, x in sample.kwargs.items() if key == "options"}
        found.append(replace(on_device, kwargs=on_device.kwargs | held))
    return found


def _isa(_: Arguments, result: str) -> None:
    expect(result in ISAS, f"unknown instruction set {result}")
    expect(result == (os.environ.get("BNBOPS_ISA") or result), f"{result} in use although BNBOPS_ISA is set")


def _isas(_: Arguments, result: list[str]) -> None:
    expect(tuple(result) == ISAS[: len(result)], f"unknown instruction sets, or in another order: {result}")
    expect(torch.ops.bnbops.isa() in result, f"{torch.ops.bnbops.isa()} is in use, but is not among {result}")


def _facts(_: Arguments, result: str) -> None:
    rules = json.loads(result)["rules"]
    expect(sorted(rules) == sorted(UPDATES), f"rules {list(rules)} instead of {list(UPDATES)}")


def _without_arguments(reference: Reference) -> Checked:
    return lambda: [Sample("no arguments")], reference


OPERATORS: dict[str, Checked] = {
    "isa": _without_arguments(_isa),
    "isas": _without_arguments(_isas),
    "facts": _without_arguments(_facts),
    **blockwise.OPERATORS,
    **optimizer.OPERATORS,
    **four_bit.OPERATORS,
    **int8.OPERATORS,
}
SAMPLED = tuple(sorted(OPERATORS))
"""The operators that have samples: all of them, as a test makes sure."""
