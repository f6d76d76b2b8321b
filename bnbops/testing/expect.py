"""What the self-check's references say when an operator did something else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import STATE_BLOCK
from bnbops.testing.references.blockwise import block_absmax, normalised, number, of_each_element
from bnbops.testing.sample import Sample

Arguments = SimpleNamespace
Reference = Callable[[Arguments, Any], None]
"""Gets the arguments of a call as they were before it, as `after` those after it, and the result."""


Checked = tuple[Callable[[], list[Sample]], Reference]
"""An operator's samples, and what it is compared with."""


class Difference(AssertionError):
    """What an operator did and should not have done."""


def expect(condition: Tensor | bool, what: str) -> None:
    if not condition:
        raise Difference(what)


def exactly(reference: Callable[[Arguments], Any]) -> Reference:
    """The results, or what was written to `out`, are those of the reference, to the bit."""

    def check(a: Arguments, result: Any) -> None:
        actual, expected = getattr(a.after, "out", result), reference(a)
        if isinstance(expected, Tensor):
            actual, expected = (actual,), (expected,)
        for i, (x, wanted) in enumerate(zip(actual, expected, strict=True)):
            expect(x.dtype == wanted.dtype and torch.equal(x, wanted), f"result {i} wrong")

    return check


def expect_within(actual: Tensor, expected: Tensor, error: Tensor, what: str) -> None:
    """`actual` is `expected`, known to within `error`."""
    expect(actual.shape == expected.shape, f"{what} of shape {list(actual.shape)}, not {list(expected.shape)}")
    off = torch.where(actual == expected, 0.0, (actual.double() - expected).abs())
    wrong = ~(off <= error)
    if wrong.any():
        worst = (off - error)[wrong].nan_to_num(nan=torch.inf).argmax()
        raise Difference(f"{what} off by {off[wrong][worst]:.3g}, where {error[wrong][worst]:.3g} is allowed")


def expect_close(
    actual: Tensor, expected: Tensor, what: str, magnitude: Tensor | None = None, terms: float = 1e-5
) -> None:
    """Equal up to a few fp32 roundings, or `terms`, of terms of a magnitude (the result's, if not given), and one
    rounding to `actual`'s dtype. The samples' values are around 1."""
    magnitude = expected.abs() if magnitude is None else magnitude
    unit = torch.finfo(actual.dtype).eps / 2
    expect_within(actual, expected.double(), unit * expected.double().abs() + terms * magnitude + 1e-6, what)


def expect_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, terms: float = 1e-5) -> None:
    """x [..., K] @ weight [K, N] + bias, in x's dtype, by sums in fp32."""
    dtype, x, weight = x.dtype, x.double(), weight.double()
    expected, magnitude = x @ weight, x.abs() @ weight.abs()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    expect(actual.dtype == dtype, f"product of {actual.dtype}, not {dtype}")
    expect_close(actual, expected, "product", magnitude, terms)


def expect_nearest(x: Tensor, codes: Tensor, values: Tensor, slack: Tensor, what: str = "codes") -> None:
    """Each code's value is nearest to `x`, or `x` lies within `slack` (absolute) of the midpoint that decides.

    Past a midpoint by d, the other neighbour is 2 d farther away than the nearest one; equal values are equally good.
    """
    x, values = x.double().flatten(), values.double()
    ascending = values[values.isfinite()].sort().values
    nearest = ascending[torch.bucketize(x, (ascending[1:] + ascending[:-1]) / 2)]
    excess = (x - values[number(codes.flatten())]).abs() - (x - nearest).abs()
    beyond = excess - 2 * slack.flatten()
    expect((beyond <= 0).all(), f"{what} not the nearest, by {beyond.max() if len(beyond) else 0:.3g} too much")


def expect_encoded(
    codes: Tensor,
    absmax: Tensor,
    x: Tensor,
    error: Tensor,
    values: Tensor,
    what: str,
    divisor: bool = False,
    size: int = STATE_BLOCK,
) -> None:
    """`absmax` is that of the blocks of `x`, and `codes` are the nearest to `x` over it, for an `x` known to within
    `error`. A `divisor` that is positive takes a positive value: the next step divides by it."""
    block_error = block_absmax(error, absmax, size)
    expect_within(absmax, block_absmax(x, absmax, size), block_error, f"absmax of {what}")
    scaled, scale = normalised(x, absmax, size), of_each_element(absmax.double(), x, size)
    if divisor:
        smallest = values[values > 0].min().double()
        positive = x > error.clamp_min(2.0**-126)
        # Within `error` of 0, or of an underflow, it may be either.
        either = ((x > 0) | (error > 0)) & (values[number(codes)] == smallest)
        scaled = torch.where(positive | either, scaled.clamp_min(smallest), scaled)
    error = error + scaled.abs() * of_each_element(block_error, x, size)
    roundings = 10 * 2**-23 * scaled.abs()  # of the inverse of absmax, the product, and a look-up table's midpoints
    expect_nearest(scaled, codes, values, roundings + torch.where(scale > 0, error / scale, 0.0), what)
