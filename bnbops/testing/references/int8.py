"""LLM.int8() by the formulas, one rounding at a time (Dettmers et al., arXiv:2208.07339, sections 2.1 and 3).

A row is a run along the last dimension. Sums of products are integers in float64, which holds them exactly; everything
else is float32, as the operators promise, so that their results can be compared bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnbops.testing.sample import tensor

MAX = torch.finfo(torch.float32).max
INVERSE = tensor(1 / 127)
INVERSE_SQUARED = tensor(1 / 127**2)


def matrix(x: Tensor) -> Tensor:
    """All dimensions but the last one count rows."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def counted(x: Tensor) -> Tensor:
    """float32 values, NaN as 0 and infinities as the largest float."""
    return x.float().nan_to_num(nan=0.0, posinf=MAX, neginf=-MAX)


def outliers(x: Tensor, threshold: float) -> Tensor:
    """Which elements are outliers."""
    return counted(x).abs().double() >= (threshold if threshold > 0 else torch.inf)


def largest(x: Tensor, dim: int) -> Tensor:
    """The largest magnitude, 0 of nothing."""
    return x.abs().amax(dim) if x.shape[dim] else x.sum(dim)


def codes(x: Tensor, absmax: Tensor) -> Tensor:
    """Three roundings: of the factor, of the product and to the nearest integer, ties to even."""
    factor = torch.where(absmax > 0, (127.0 * (1.0 / absmax)).clamp(max=MAX), 0.0)
    return (x * factor).round().to(torch.int8)


def quantize_rows(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, absmax of each row and the outlier columns."""
    x, out = matrix(counted(A)), matrix(outliers(A, threshold))
    kept = x.masked_fill(out, 0.0)
    stats, columns = largest(kept, 1), out.any(dim=0)
    return codes(kept, stats.unsqueeze(1)).masked_fill(columns, 0).view(A.shape), stats, columns


def quantize_columns(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes and absmax of each column. Outliers have code 0, the rest of their column has not."""
    kept = matrix(counted(A)).masked_fill(matrix(outliers(A, threshold)), 0.0)
    stats = largest(kept, 0)
    return codes(kept, stats).view(A.shape), stats


def dequantize(A: Tensor, stats: Tensor) -> Tensor:
    """Two roundings, in this order."""
    return A.float() * stats.view(*A.shape[:-1], 1).clamp(max=MAX) * INVERSE


def product(A: Tensor, B: Tensor) -> Tensor:
    return (A.double() @ B.double().t()).to(torch.int32)


def dequantize_product(
    sums: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float16
) -> Tensor:
    rows, columns = row_stats.reshape(*sums.shape[:-1], 1).clamp(max=MAX), col_stats.flatten().clamp(max=MAX)
    values = sums.float() * (rows * columns).clamp(max=MAX) * INVERSE_SQUARED
    return (values if bias is None else values + bias.float()).to(dtype)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """The result in float64, and a bound on what fp32 and the rounding to x's dtype may add."""
    rows, stats, columns = quantize_rows(matrix(x), threshold)
    main = dequantize_product(product(rows, weight), stats, scale, None, torch.float32).double()
    kept = counted(matrix(x)).double()[:, columns]
    W = dequantize(weight, scale.flatten()).to(x.dtype).double()[:, columns]
    terms, n = kept.abs() @ W.abs().t(), int(columns.sum())
    value = main + kept @ W.t()
    magnitude = main.abs() + terms
    if bias is not None:
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
    error = 2.0**-24 * (n * terms + 2 * magnitude)
    info = torch.finfo(x.dtype)
    error += info.eps / 2 * (value.abs() + error) + info.smallest_normal * info.eps
    shape = (*x.shape[:-1], weight.shape[0])
    return value.view(shape), error.view(shape)
