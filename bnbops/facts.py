"""What the tables of the C++ library say (csrc/ops/facts.cpp), so that nothing of it is written again here.

It is read from the operators, so they must be loaded before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Role:
    """What the numbers of a state are, and so how a codec codes them (csrc/codecs/codec.h)."""

    name: str
    signed: bool  # by the codec's values for either sign, else by those that are never negative
    divisor: bool  # never negative, and a step divides by its root: what is positive stays so


@dataclass(frozen=True)
class Codec:
    """What the codes of a state mean: element i of a block has the value `values[code[i]] * absmax`."""

    name: str
    dtype: torch.dtype  # of the codes, whose bytes number the values
    signed: tuple[float, ...]
    unsigned: tuple[float, ...]

    def values(self, role: Role) -> tuple[float, ...]:
        """256 numbers of float32 in [-1, 1], by code."""
        return self.signed if role.signed else self.unsigned

    def code(self, value: float, role: Role) -> int:
        """The code, as a byte, of a value that is among them."""
        return self.values(role).index(value)


@dataclass(frozen=True)
class State:
    """A state of an optimizer: one number for each element of a parameter."""

    name: str
    role: Role


@dataclass(frozen=True)
class Option:
    """A number that an operator takes, as "float", "int" or "bool"."""

    name: str
    type: str
    low: float
    below: float
    range: str  # the same in words

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError for a value out of range; `name` is what the caller calls it."""
        if not (isinstance(value, Real) and self.low <= value < self.below):  # type: ignore[operator]  # not in Real's stub
            raise ValueError(f"{name} must be {self.range}, got {value!r}")


@dataclass(frozen=True)
class Rule:
    """An update rule, with its states and options in the order of its operators' arguments."""

    name: str
    states: tuple[State, ...]
    options: tuple[Option, ...]
    trust: str  # what a ratio for each parameter scales: the "gradient", the "direction", or there is "none"

    @property
    def step(self) -> str:
        """The operator that takes a step."""
        return f"{self.name}_step_"

    @property
    def direction(self) -> str:
        """That of its first half, which moves the states on and gives the direction."""
        return f"{self.name}_direction_"

    @property
    def apply(self) -> str:
        """That of its second half, along a direction."""
        return f"{self.name}_apply_"

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.states)


@dataclass(frozen=True)
class Format4bit:
    """What the codes of a 4-bit weight mean."""

    name: str
    values: tuple[float, ...]  # fp32, of the 16 codes; a block's scale multiplies them
    high_nibble_first: bool  # the even one of a byte's two elements is in its upper half
    smallest_block: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of elements that may share a scale."""
        return tuple(2**k for k in range(31) if self.smallest_block <= 2**k <= _facts["largest_block_4bit"])

    def codes(self, packed: Tensor) -> Tensor:
        """The codes of bytes, in the order of their elements: flat uint8, two for each byte."""
        halves = [packed >> 4, packed & 15]
        return torch.stack(halves if self.high_nibble_first else halves[::-1], dim=-1).flatten()


def _option(name: str, type: str, below: float | None, range: str, **low: float | None) -> Option:
    lowest = low["from"]
    return Option(name, type, -math.inf if lowest is None else lowest, math.inf if below is None else below, range)


def _rule(name: str, facts: Mapping[str, Any]) -> Rule:
    states = tuple(State(state["name"], ROLES[state["role"]]) for state in facts["states"])
    options = tuple(_option(**option) for option in facts["options"])
    return Rule(name, states, options, facts["trust"])


_facts = json.loads(torch.ops.bnbops.facts())
ROLES: Mapping[str, Role] = {name: Role(name, **facts) for name, facts in _facts["roles"].items()}
CODECS: Mapping[str, Codec] = {
    name: Codec(name, getattr(torch, facts["dtype"]), tuple(facts["signed"]), tuple(facts["unsigned"]))
    for name, facts in _facts["codecs"].items()
}
DEFAULT_CODEC: str = _facts["default_codec"]
UNCODED: str = _facts["uncoded"]
"""In place of a codec's name: float32."""
RULES: Mapping[str, Rule] = {name: _rule(name, facts) for name, facts in _facts["rules"].items()}
STATES: Mapping[str, State] = {state.name: state for rule in RULES.values() for state in rule.states}
"""Of all rules, by name: a name means the same in each of them."""
STATE_BLOCK: int = _facts["state_block"]
"""Elements of an 8-bit state that share a scale."""
NORM_HISTORY: int = _facts["norm_history"]
"""Norms of gradients that percentile clipping looks back on."""
FORMATS: Mapping[str, Format4bit] = {
    name: Format4bit(name, **facts | {"values": tuple(map(float, facts["values"]))})
    for name, facts in _facts["formats_4bit"].items()
}
"""Of 4-bit weights, by name: what `quant_type` may be."""
FORMATS_4BIT: tuple[str, ...] = tuple(FORMATS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What operators take and give as numbers: `is_float` in csrc/core/check.cpp."""
MOST_INT8_PRODUCTS: int = _facts["most_int8_products"]
"""Of two int8, whose sum an int32 holds for certain."""


def codec_at(codec: str, place: int) -> str:
    """What an operator's argument of this name says of a state: one for all, or one each with commas between."""
    names = codec.split(",")
    return names[0] if len(names) == 1 else names[place]


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def in_words(values: Iterable[str]) -> str:
    """ "'nf4' or 'fp4'"."""
    return " or ".join(map(repr, values))
