"""The int8 functions of LLM.int8() with bitsandbytes' names and signatures, over `torch.ops.bnbops`.

Rows are what all dimensions but the last one count. A code c of a row with statistic s (its largest magnitude) means
c * s / 127.

Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (arXiv:2208.07339).
"""

from __future__ import annotations

import torch
from torch import Tensor


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes each row to int8, scaled by its largest magnitude: `round(x * 127 / absmax)`, ties to even.

    With a threshold, elements of that magnitude or more are outliers: they do not count towards their row's absmax, and
    the codes of their column are 0 in all rows. A NaN counts as 0, an infinity as the largest float.

    Args:
        A: fp32, bf16 or fp16 tensor `[..., K]`.
        threshold: magnitude from which an element is an outlier; 0 for none.

    Returns:
        int8 codes of A's shape, fp32 absmax `[rows]`, and the int64 indices of the outlier columns (None without a
        threshold).

    Raises:
        RuntimeError: A is of another dtype or a scalar, or the threshold is negative.

    Source: arXiv:2208.07339, sections 2.1 and 3.2.
    """
    codes, stats, outliers = torch.ops.bnbops.int8_vectorwise_quant(A, threshold)
    return codes, stats, _indices(outliers, threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Undoes `int8_vectorwise_quant`: `A * stats / 127`.

    Args:
        A: int8 codes `[..., K]`.
        stats: fp32, one number for each row.

    Returns:
        fp32 tensor of A's shape.

    Raises:
        RuntimeError: a wrong dtype, or not one number for each row.
    """
    return torch.ops.bnbops.int8_vectorwise_dequant(A, stats)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantizes by rows, as `int8_vectorwise_quant`, and by columns.

    Args:
        A: fp32, bf16 or fp16 tensor `[..., K]`.
        col_stats, row_stats, out_col, out_row: must be None, as in bitsandbytes.
        threshold: magnitude from which an element is an outlier; 0 for none. In the codes of columns only the outliers
            themselves are 0.

    Returns:
        int8 codes of rows and of columns (both of A's shape), fp32 absmax of rows `[rows]` and of columns `[K]`, and
        the int64 indices of the outlier columns (None without a threshold).

    Raises:
        ValueError: a preallocated output.
        RuntimeError: A is of another dtype or a scalar, or the threshold is negative.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, tensor in given.items():
        if tensor is not None:
            raise ValueError(f"int8_double_quant makes its results; {name} must be None")
    *results, outliers = torch.ops.bnbops.int8_double_quant(A, threshold)
    return (*results, _indices(outliers, threshold))


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """The exact product `A @ B.T` of int8 matrices.

    Args:
        A: int8 `[..., K]`, K at most 131071.
        B: int8 `[N, K]`.
        out: int32 `[..., N]` to write to.
        dtype: int32; there is no other.

    Returns:
        int32 `[..., N]` (`out`, if given).

    Raises:
        ValueError: another dtype asked for.
        RuntimeError: a wrong dtype or shape, or an `out` that shares memory with A or B.
    """
    if dtype != torch.int32:
        raise ValueError(f"int8_linear_matmul gives int32, not {dtype}")
    if out is None:
        return torch.ops.bnbops.int8_linear_matmul(A, B)
    torch.ops.bnbops.int8_linear_matmul.out(A, B, out=out)
    return out


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """What the product of two quantized matrices means: `A * row_stats * col_stats / 127**2 + bias`.

    Args:
        A: int32 `[..., N]`, of `int8_linear_matmul`.
        row_stats: fp32, one number for each row.
        col_stats: fp32, one number for each of the N columns.
        out: tensor of A's shape to copy the result into.
        bias: fp32, bf16 or fp16 `[N]`.

    Returns:
        fp16 tensor of A's shape (`out`, if given). `torch.ops.bnbops.int8_mm_dequant` has other dtypes.

    Raises:
        RuntimeError: a wrong dtype or number of elements.
    """
    result = torch.ops.bnbops.int8_mm_dequant(A, row_stats, col_stats, torch.float16, bias)
    return result if out is None else out.copy_(result)


def _indices(outliers: Tensor, threshold: float) -> Tensor | None:
    return outliers.nonzero().flatten() if threshold > 0 else None
