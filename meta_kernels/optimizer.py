"""Fakes of the operators of optimizers, from the table of rules: their schemas are made alike."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from bnbops.facts import RULES, STATE_BLOCK, Rule

from . import checks as C
from .checks import Arguments, Problem, Row, blocks, each, fake, row

_one_each = C.as_many(lambda a: len(a.params), "has {found} tensors for {needed} params")
_one_each_for_codes = C.as_many(
    lambda a: len(a.params),
    "has {found} tensors for {needed} params (one each for 8-bit states, none at all for float32 states)",
)
_flag = (C.float32, C.one_element, C.readable)
_factor = (C.float32, C.contiguous, C.shape(lambda a: [len(a.params)], ", one number for each parameter"), C.device)
_on_cpu = C.must(lambda a, x: x.device.type == "cpu", "must be on the CPU")


# ---- the tensors of one parameter ------------------------------------------------------------------------------

_shape = C.must(lambda a, x: x.shape == a.params.shape, "has shape {shape}, but its parameter has {shapes[params]}")


def _grad_dtype(a: Arguments, grad: Tensor) -> Problem:
    words = f"{C.name_of(a.params.dtype)} (its parameter's dtype) or float32"
    return C.dtype(a.params.dtype, torch.float32, words=words)(a, grad)


def _rows_or_flat(a: Arguments, absmax: Tensor) -> Problem:
    param, found = list(a.params.shape), list(absmax.shape)
    rows, flat = param[0] if param else 1, blocks(prod(param), STATE_BLOCK)
    per_row = blocks(prod(param[1:]), STATE_BLOCK) if rows else 0
    by_rows = len(found) == 2 and found[0] == rows and (found[1] == per_row or prod(param) == 0)
    return not (by_rows or found == [flat]) and (
        f"has shape {found}, but params of shape {param} need [{rows}, {per_row}] (blocks of {STATE_BLOCK} in each "
        f"row) or [{flat}] (flat blocks)"
    )


def _state(name: str, scales: str, first_scales: str) -> tuple[Row, Row]:
    """Codes if there are scales for them, else numbers."""
    one_layout = C.must(
        lambda a, x: x.dim() == getattr(a, first_scales).dim(),
        "is laid out by rows and another by flat blocks; use one layout for all states of a parameter",
    )
    return (
        row(
            name,
            lambda a, x: (C.float32 if getattr(a, scales) is None else C.uint8)(a, x),
            C.device,
            C.contiguous,
            _shape,
        ),
        row(scales, C.float32, C.device, C.contiguous, _rows_or_flat, one_layout),
    )


# ---- the operators of a rule -----------------------------------------------------------------------------------


def _rows(rule: Rule) -> Iterator[Row]:
    states = [(name, f"{name}_absmax") for name in rule.state_names]

    def if_quantized(a: Arguments, absmax: list[Tensor]) -> Problem:
        return any(getattr(a, scales) for _, scales in states) and _one_each_for_codes(a, absmax)

    yield row("grads", _one_each)
    yield row("steps", _one_each)
    for name, scales in states:
        yield row(name, _one_each)
        yield row(scales, if_quantized)
    yield each(
        "params",
        row("params", C.floats, C.device, C.contiguous),
        row("grads", _grad_dtype, C.device, _shape),
        *(row for state in states for row in _state(*state, first_scales=states[0][1])),
        row("steps", C.float32, C.one_element, C.device),
    )
    yield row("lr", C.dtype(torch.float32, torch.float64), C.one_element, C.readable)
    yield row("grad_scale", *_flag)
    yield row("found_inf", *_flag)
    yield row("clip", *_factor)
    yield row("trust", *_factor)
    count = C.shape(lambda a: [len(rule.options)], ", one number for each option in the schema's order")
    yield row("options", C.float64, C.contiguous, _on_cpu, count)


def _norms(a: Arguments) -> Tensor:
    return torch.empty(len(a.params), dtype=torch.float64, device=a.device or "cpu")


for _rule in RULES.values():
    fake(_rule.step, *_rows(_rule))
    if _rule.direction_norm:
        fake(_rule.squared_norms, *_rows(_rule), result=_norms)
