"""Fakes of the operators of optimizers, from the table of rules: their schemas are made alike. And of norms."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import prod

import torch
from torch import Tensor

from bnbops.facts import CODECS, NORM_HISTORY, ROLES, RULES, STATE_BLOCK, UNCODED, Rule, codec_at, name_of

from . import checks as C
from .checks import Arguments, Check, Problem, Row, blocks, each, fake, row

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
    words = f"{name_of(a.params.dtype)} (its parameter's dtype) or float32"
    return C.dtype(a.params.dtype, torch.float32, words=words)(a, grad)


def _blocks_of(x: Tensor) -> tuple[int, int, int]:
    """Rows, blocks of each row, and blocks of the whole."""
    rows = x.shape[0] if x.dim() else 1
    return rows, blocks(prod(x.shape[1:]), STATE_BLOCK) if rows else 0, blocks(x.numel(), STATE_BLOCK)


def _rows_or_flat(of: str) -> Check:
    """The shape of scales."""

    def check(a: Arguments, absmax: Tensor) -> Problem:
        coded, found = getattr(a, of), list(absmax.shape)
        rows, per_row, flat = _blocks_of(coded)
        by_rows = len(found) == 2 and found[0] == rows and (found[1] == per_row or coded.numel() == 0)
        return not (by_rows or found == [flat]) and (
            f"has shape {found}, but params of shape {list(coded.shape)} need [{rows}, {per_row}] (blocks of "
            f"{STATE_BLOCK} in each row) or [{flat}] (flat blocks)"
        )

    return check


# ---- codecs of states ------------------------------------------------------------------------------------------

_known = "".join(f"'{name}', " for name in CODECS) + f"'{UNCODED}'"


def _codec_names(a: Arguments, codec: str) -> Problem:
    fits = all(name in CODECS or name == UNCODED for name in codec.split(","))
    return not fits and f"must be {_known}, or one of these for each state with commas between, got '{codec}'"


def _codecs(count: int) -> Row:
    def one_each(a: Arguments, codec: str) -> Problem:
        found = codec.count(",") + 1
        return found not in (1, count) and f"names {found} codecs for {count} states, got '{codec}'"

    return row("codec", _codec_names, one_each)


def _scales_fit(place: int, name: str) -> Row:
    """Scales where the codec has them, and only there; one name for all states is of those that have scales."""

    def check(a: Arguments, absmax: list[Tensor]) -> Problem:
        coded = codec_at(a.codec, place) != UNCODED
        fits = coded if absmax else not coded or "," not in a.codec or not a.params
        words = f"has {len(absmax)} tensors, which does not fit the codec that '{a.codec}' names for {name}"
        return not fits and words

    return row(f"{name}_absmax", check)


def _code_dtype(place: int, scales: str) -> Check:
    def check(a: Arguments, state: Tensor) -> Problem:
        if getattr(a, scales) is None:
            return C.dtype(torch.float32, words=f"float32, as there is no {scales}")(a, state)
        return C.dtype(CODECS[codec_at(a.codec, place)].dtype)(a, state)

    return check


def _one_layout(names: tuple[str, ...]) -> Check:
    def check(a: Arguments, absmax: Tensor) -> Problem:
        first = next(x for name in names if (x := getattr(a, f"{name}_absmax")) is not None)
        words = "is laid out by rows and another by flat blocks; use one layout for all states of a parameter"
        return absmax.dim() != first.dim() and words

    return check


# ---- the operators of a rule -----------------------------------------------------------------------------------


def _rows(rule: Rule, of_step: tuple[str, ...], names: tuple[str, ...]) -> Iterator[Row]:
    """For one of a rule's operators, with these lists between parameters and states, and these states."""
    for name in (*of_step, "steps"):
        yield row(name, _one_each)
    for name in names:
        yield row(name, _one_each)
        yield row(f"{name}_absmax", lambda a, absmax: bool(absmax) and _one_each_for_codes(a, absmax))
    yield _codecs(len(names))
    for k, name in enumerate(names):
        yield _scales_fit(k, name)
    tensors = {
        "grads": row("grads", _grad_dtype, C.device, _shape),
        "directions": row("directions", C.float32, C.device, C.contiguous, _shape),
    }
    yield each(
        "params",
        row("params", C.floats, C.device, C.contiguous),
        *(tensors[name] for name in of_step),
        *chain.from_iterable(
            (
                row(name, _code_dtype(k, f"{name}_absmax"), C.device, C.contiguous, _shape),
                row(f"{name}_absmax", C.float32, C.device, C.contiguous, _rows_or_flat("params"), _one_layout(names)),
            )
            for k, name in enumerate(names)
        ),
        row("steps", C.float32, C.one_element, C.device),
    )
    yield row("lr", C.dtype(torch.float32, torch.float64), C.one_element, C.readable)
    yield row("grad_scale", *_flag)
    yield row("found_inf", *_flag)
    yield row("clip", *_factor)
    yield row("trust", *_factor)
    count = C.shape(lambda a: [len(rule.options)], ", one number for each option in the schema's order")
    yield row("options", C.float64, C.contiguous, _on_cpu, count)


for _rule in RULES.values():
    fake(_rule.step, *_rows(_rule, ("grads",), _rule.state_names))
    fake(_rule.direction, *_rows(_rule, ("grads", "directions"), _rule.state_names))
    fake(_rule.apply, *_rows(_rule, ("directions",), ()))


# ---- states outside a step -------------------------------------------------------------------------------------

_one_codec = row("codec", _codec_names, C.must(lambda a, x: x != UNCODED, "must be one that has codes, got '{x}'"))
_known_role = row("role", C.must(lambda a, x: x in ROLES, f"must be one of {', '.join(map(repr, ROLES))}, got '{{x}}'"))


def _encoded(a: Arguments) -> tuple[Tensor, Tensor]:
    codes = torch.empty(a.values.shape, dtype=CODECS[a.codec].dtype, device=a.device)
    rows, per_row, whole = _blocks_of(a.values)
    shape = (whole,) if a.flat or a.values.dim() < 2 else (rows, per_row)
    return codes, a.values.new_empty(shape)


fake("encode_state", _one_codec, _known_role, row("values", C.float32), result=_encoded)
fake(
    "decode_state",
    _one_codec,
    _known_role,
    row("codes", lambda a, x: C.dtype(CODECS[a.codec].dtype)(a, x)),
    row("absmax", C.float32, C.device, C.contiguous, _rows_or_flat("codes")),
    result=lambda a: torch.empty(a.codes.shape, dtype=torch.float32, device=a.device),
)


# ---- norms -----------------------------------------------------------------------------------------------------


def _any_tensor(a: Arguments) -> Iterator[str]:
    if not a.tensors:
        yield "needs at least one tensor"


fake(
    "squared_norms",
    _any_tensor,
    each("tensors", row("tensors", C.floats, C.device)),
    result=lambda a: a.tensors[0].new_empty((len(a.tensors),), dtype=torch.float64),
)
fake(
    "percentile_clip_",
    row("percentile", C.must(lambda a, x: 0 <= x < NORM_HISTORY, f"must be in [0, {NORM_HISTORY}), got {{x}}")),
    row("steps", C.as_many(lambda a: len(a.gnorm_vec), "has {found} tensors for {needed} in gnorm_vec")),
    row(
        "squared_norms",
        C.float64,
        C.contiguous,
        C.shape(lambda a: [len(a.gnorm_vec)], ", one number for each of gnorm_vec"),
    ),
    each(
        "gnorm_vec",
        row("gnorm_vec", C.float32, C.device, C.contiguous, C.shape(lambda a: [NORM_HISTORY])),
        row("steps", C.float32, C.one_element, C.device),
    ),
    row("grad_scale", *_flag),
    row("found_inf", *_flag),
    like="squared_norms",
    result=lambda a: a.squared_norms.new_empty((len(a.gnorm_vec),), dtype=torch.float32),
)
