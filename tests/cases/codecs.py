"""Choices of codecs for the states of an optimizer, and what their codes mean, from the tables alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import torch
from torch import Tensor

from bnbops.facts import CODECS, DEFAULT_CODEC, STATE_BLOCK, STATES, UNCODED

ADAM = ("exp_avg", "exp_avg_sq")
OTHER = list(CODECS)[-1]  # than the default, where there is one
CHOICES = list(
    dict.fromkeys([*CODECS, UNCODED, f"{DEFAULT_CODEC},{UNCODED}", f"{UNCODED},{OTHER}", f"{DEFAULT_CODEC},{OTHER}"])
)
"""Codecs of an optimizer's states in their order, again from the first where there are more states."""


def codecs_by_state(choice: str, states: tuple[str, ...] = ADAM) -> dict[str, str]:
    return dict(zip(states, cycle(choice.split(","))))


def option(choice: str, states: tuple[str, ...] = ADAM) -> str | dict[str, str]:
    """The optimizers' argument."""
    return codecs_by_state(choice, states) if "," in choice else choice


def scales_key(name: str, codec: str) -> str:
    return f"{name}_absmax" if codec == "dynamic8" else f"{name}_{codec}_absmax"


def codec_in(state: Mapping[str, object], name: str) -> str:
    """The codec of a parameter's state, by its scales' key."""
    found = [codec for codec in CODECS if scales_key(name, codec) in state]
    assert len(found) <= 1
    return found[0] if found else UNCODED


def as_bytes(x: Tensor) -> Tensor:
    """torch does not compare all types that codes have."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def naively_decoded(state: Mapping[str, Tensor], name: str) -> Tensor:
    """fp32 of the codes' shape, whose scales are laid out by rows."""
    codec = CODECS[codec_in(state, name)]
    codes, absmax = as_bytes(state[name]).long(), state[scales_key(name, codec.name)]
    table = torch.tensor(codec.signed if STATES[name].role.signed else codec.unsigned)
    rows = codes.shape[0]
    scales = absmax.repeat_interleave(STATE_BLOCK, dim=1)[:, : codes.numel() // rows].reshape(codes.shape)
    return table[codes] * scales
