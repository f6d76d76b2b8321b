"""Fakes of the norm operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bnbops.facts import NORM_HISTORY

from . import checks as C
from .checks import Arguments, each, fake, row


def _any_tensor(a: Arguments) -> Iterator[str]:
    if not a.tensors:
        yield "needs at least one tensor"


fake(
    "squared_norms",
    _any_tensor,
    each("tensors", row("tensors", C.floats, C.device)),
    result=lambda a: a.tensors[0].new_empty((len(a.tensors),), dtype=torch.float64),
)

_count = C.shape(lambda a: [len(a.gnorm_vec)], ", one number for each of gnorm_vec")
_flag = (C.float32, C.one_element, C.readable)

fake(
    "percentile_clip_",
    row("percentile", C.must(lambda a, x: 0 <= x < NORM_HISTORY, f"must be in [0, {NORM_HISTORY}), got {{x}}")),
    row("steps", C.as_many(lambda a: len(a.gnorm_vec), "has {found} tensors for {needed} in gnorm_vec")),
    row("squared_norms", C.float64, C.contiguous, _count),
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
