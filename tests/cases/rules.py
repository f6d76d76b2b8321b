"""Every rule with every kind of state, and the comparisons that the tests of the operators share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reference.group import Group
from reference.rules import RULES
from reference.step import check_step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODECS = {
    "fp32": {"bits": 32},
    "8-bit rows": {"bits": 8, "layout": "rows"},
    "8-bit flat": {"bits": 8, "layout": "flat"},
}
CASES = [
    pytest.param(rule, codec, id=f"{rule}-{name}")
    for rule in RULES
    for name, codec in CODECS.items()
    if RULES[rule].states or name == "fp32"
]
every_case = pytest.mark.parametrize(("rule", "codec"), CASES)


def usual(rule: str, **changed: Any) -> dict[str, Any]:
    """The rule's usual options but for those `changed`; what is no option of this rule does not count."""
    options = RULES[rule].options
    return options | {name: value for name, value in changed.items() if name in options}


def option_tensor(rule: str, **changed: Any) -> Tensor:
    """The usual options, or changed ones, as the operators take them in a tensor: in the schema's order."""
    options = usual(rule, **changed)
    names = [a.name for a in RULES[rule].operator._schema.arguments if a.name in options and a.name != "lr"]
    return torch.tensor([options[name] for name in names], dtype=torch.float64)


def step_and_check(group: Group, options: dict[str, Any] | None = None, /, **scaling: bool | Tensor) -> Group:
    """Steps the group and holds every tensor to the paper; returns the group as it was before."""
    options = options or usual(group.rule)
    before = group.clone()
    group.step(options, **scaling)
    check_step(before, group, options, **scaling)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before.grads, group.grads, strict=True))
    return before


def assert_same(a: Group, b: Group) -> None:
    """Every tensor has the same bits (but for the sign of zero)."""
    for name, tensors in a.lists().items():
        for i, (x, y) in enumerate(zip(tensors, b.lists()[name], strict=True)):
            assert torch.equal(x, y), f"{name}[{i}] differs"
