"""Runs every operator on its samples and compares with plain torch computations: is this build right on this machine?

The computations here are short and slow; the tests have finer ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bnbops._library import defaults
from bnbops.nn.weights.numbers import from_bits
from bnbops.testing.expect import Arguments, Difference, Reference
from bnbops.testing.samples import OPERATORS, SAMPLED, Sample, operator, samples

REFERENCES: dict[str, Reference] = {name: reference for name, (_, reference) in OPERATORS.items()}
_MAY_BE_BITS = ("scale", "stats", "row_stats", "col_stats", "nested_absmax", "nested_code", "nested_offset")


def check(name: str, sample: Sample) -> str | None:
    """Runs the operator on a copy of the sample; what differs from the reference, or None."""
    overload, after = operator(name), sample.clone()
    try:
        # Autocast changes the dtype of what linear layers take, and so of what they return.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            result = tree_map_only(Tensor, Tensor.detach, after.run(overload))
        before, written = (_arguments(overload, call) for call in (sample, after))
        REFERENCES[name](Arguments(**before, after=Arguments(**written)), result)
    except Difference as difference:
        return f"{sample.name}: {difference}"
    except RuntimeError as error:
        return f"{sample.name}: {error}".splitlines()[0]
    return None


def _arguments(overload: torch._ops.OpOverload, call: Sample) -> dict[str, Any]:
    """All arguments, as the references take them: without gradients, and scales of weights by their values."""
    found = defaults(overload) | call.map(Tensor.detach).arguments(overload)
    return found | {name: from_bits(x) for name, x in found.items() if name in _MAY_BE_BITS and x is not None}


def run(device: torch.device | str = "cpu") -> Iterator[tuple[str, int, list[str]]]:
    """Checks all operators; yields each one's name, number of samples, and what differs."""
    for name in SAMPLED:
        found = samples(name, device)
        yield name, len(found), [problem for sample in found if (problem := check(name, sample))]
