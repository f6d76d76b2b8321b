"""Numbers that know what fp32 could have made of them.

A result of the library is compared with the real number, so the tests need to know how far fp32 may stray from it on
the way. `Rounded` computes that beside the value: running error analysis (N. J. Higham, "Accuracy and Stability of
Numerical Algorithms", 2nd ed., section 3.3). Each operation hands on its operands' errors and adds its own rounding.
That of a sum is taken relative to its terms, which holds for any order and for fused operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnbops.testing.references.rules import divide

UNIT = 2.0**-24  # the relative error of one fp32 operation
TINY = 2.0**-149  # the absolute error of one that underflows


@dataclass(frozen=True)
class Rounded:
    """A value in float64, and a bound on the distance of an fp32 computation of it."""

    value: Tensor
    error: Tensor

    def __add__(self, other: Number) -> Rounded:
        a, b = self, rounded(other)
        terms = torch.where((a.value != 0) & (b.value != 0), a.value.abs() + b.value.abs(), 0.0)  # x + 0 is exact
        return Rounded(a.value + b.value, a.error + b.error + UNIT * terms)

    def __mul__(self, other: Number) -> Rounded:
        a, b = self, rounded(other)
        value = a.value * b.value
        error = _product(a.value.abs(), b.error) + _product(a.error, b.value.abs() + b.error)
        return Rounded(value, error + _rounding(value, error))

    def __truediv__(self, other: Number) -> Rounded:
        a, b = self, rounded(other)
        value = a.value / b.value
        smallest = (b.value.abs() - b.error).clamp_min(0)
        error = (a.error + _product(value.abs(), b.error)) / smallest  # infinite where `b` may be zero
        return Rounded(value, error + _rounding(value, error))

    def sqrt(self) -> Rounded:
        value = self.value.sqrt()
        lowest = (self.value - self.error).clamp_min(0).sqrt()
        error = value - lowest  # the root is steeper below
        return Rounded(value, error + _rounding(value, error))

    def sign(self) -> Rounded:
        """Certain where the value is larger than its error."""
        value = self.value.sign()
        doubtful = (self.value.abs() <= self.error) & (self.error > 0)
        return Rounded(value, torch.where(doubtful, 1 + value.abs(), 0.0))

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __sub__(self, other: Number) -> Rounded:
        return self + -rounded(other)

    def __radd__(self, other: float) -> Rounded:
        return self + other

    def __rmul__(self, other: float) -> Rounded:
        return self * other


Number = Rounded | Tensor | float


def rounded(x: Number) -> Rounded:
    """Tensors hold what the operator got, exactly; a constant is rounded to fp32."""
    if isinstance(x, Rounded):
        return x
    if isinstance(x, Tensor):
        return Rounded(x.double(), torch.zeros_like(x, dtype=torch.float64))
    constant = torch.tensor(x, dtype=torch.float64)
    return Rounded(constant, torch.where(constant.float() == constant, 0.0, UNIT * constant.abs() + TINY))


def _rounding(value: Tensor, error: Tensor) -> Tensor:
    """What one operation adds. A zero that is certain stays one."""
    return torch.where((value == 0) & (error == 0), 0.0, UNIT * value.abs() + TINY)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x * y, and 0 for zero times infinity: nothing is wrong with no part of something doubtful."""
    return torch.where((x == 0) | (y == 0), 0.0, x * y)


@divide.register
def _(x: Rounded, y: Rounded) -> Rounded:
    quotient = x / y
    certain = (y.value == 0) & (y.error == 0)
    error = torch.where(certain, 0.0, torch.where(quotient.error.isnan(), torch.inf, quotient.error))
    return Rounded(torch.where(y.value == 0, 0.0, quotient.value), error)


def where(condition: Tensor, x: Rounded, y: Rounded) -> Rounded:
    """torch.where."""
    return Rounded(torch.where(condition, x.value, y.value), torch.where(condition, x.error, y.error))


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance of two numbers of `dtype` around `x`: the error of one rounding to it."""
    info = torch.finfo(dtype)
    octave = torch.floor(torch.log2(x.abs().clamp_min(info.tiny)))
    return 2.0**octave * info.eps / 2
