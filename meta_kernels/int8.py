"""Fakes of the int8 operators."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from bnbops.facts import MOST_INT8_PRODUCTS

from . import checks as C
from .checks import Arguments, Count, Problem, Row, fake, row

_has_rows = C.must(lambda a, x: x.dim() > 0, "must have at least one dimension, got a scalar")
_is_matrix = C.must(lambda a, x: x.dim() == 2, "must have two dimensions, got {shape}")
_threshold = row("threshold", C.must(lambda a, x: x >= 0, "must be positive, or 0 for none, got {x:g}"))


def _summable(a: Arguments, x: Tensor) -> Problem:
    most, found = MOST_INT8_PRODUCTS, x.shape[-1]
    return found > most and f"has {found} columns; an int32 holds the sum of at most {most} products"


def _rows_of(x: Tensor) -> int:
    return prod(x.shape[:-1])


def _stats(name: str, count: Count, what: str) -> Row:
    words = f"has {{found}} elements, but there are {{needed}} {what}"
    return row(name, C.scales, C.device, C.as_many(count, words))


def _inner(x: str, weight: str) -> tuple[Row, Row]:
    """`x` [..., K] and `weight` [N, K]."""
    words = f"has shape {{shape}}, but {x} has {{shapes[{x}]}}: their last dimensions must be equal"
    return row(weight, C.must(lambda a, w: w.shape[-1] == getattr(a, x).shape[-1], words)), row(x, _summable)


# ---- quantization ----------------------------------------------------------------------------------------------


def _codes_and_stats(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    codes = a.A.new_empty(a.A.shape, dtype=torch.int8)
    stats = a.A.new_empty((_rows_of(a.A),), dtype=torch.float32)
    return codes, stats, a.A.new_empty(a.A.shape[-1:], dtype=torch.bool)


def _of_rows_and_columns(a: Arguments) -> tuple[Tensor, ...]:
    codes, stats, outliers = _codes_and_stats(a)
    return codes, torch.empty_like(codes), stats, stats.new_empty(a.A.shape[-1:]), outliers


_quant = (row("A", C.floats, _has_rows), _threshold)
fake("int8_vectorwise_quant", *_quant, result=_codes_and_stats)
fake("int8_double_quant", *_quant, result=_of_rows_and_columns)
fake(
    "int8_vectorwise_dequant",
    row("A", C.int8, _has_rows),
    _stats("stats", lambda a: _rows_of(a.A), "rows in A"),
    result=lambda a: a.A.new_empty(a.A.shape, dtype=torch.float32),
)


# ---- products --------------------------------------------------------------------------------------------------


def _product(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns), dtype=dtype)


def _epilogue(columns: Count) -> tuple[Row, ...]:
    """How sums of products of codes become numbers."""
    return (
        _stats("row_stats", lambda a: _rows_of(a.A), "rows"),
        _stats("col_stats", columns, "columns"),
        row("bias", C.floats, C.device, C.shape(lambda a: [columns(a)])),
        row("dtype", C.floats),
    )


_matmul = (row("A", C.int8, _has_rows), row("B", C.int8, C.device, _is_matrix), *_inner("A", "B"))
_fits_product = C.must(
    lambda a, out: out.shape == (*a.A.shape[:-1], a.B.shape[0]),
    "has shape {shape}, but A has {shapes[A]} and B {shapes[B]}",
)
fake("int8_linear_matmul", *_matmul, result=lambda a: _product(a.A, a.B.shape[0], torch.int32))
fake("int8_linear_matmul.out", *_matmul, row("out", C.int32, C.device, _fits_product, C.not_expanded))
fake(
    "int8_mm_dequant",
    row("A", C.int32, _has_rows),
    *_epilogue(lambda a: a.A.shape[-1]),
    result=lambda a: _product(a.A, a.A.shape[-1], a.dtype or torch.float16),
)
fake(
    "int8_scaled_mm",
    *_matmul,
    *_epilogue(lambda a: a.B.shape[0]),
    result=lambda a: _product(a.A, a.B.shape[0], a.dtype or torch.float16),
)


# ---- the linear layer ------------------------------------------------------------------------------------------

_weight = row("weight", C.int8, C.device, _is_matrix)
_scale = _stats("scale", lambda a: a.weight.shape[0], "rows in weight")
_bias = row("bias", C.floats, C.device, C.shape(lambda a: a.weight.shape[:1]), C.dtype_of("x"))
_columns_of_grad = C.must(
    lambda a, grad: grad.shape[-1] == a.weight.shape[0],
    "has shape {shape}, but weight has {shapes[weight]}: grad needs a column for each row of weight",
)
for _op in ("linear_int8", "linear_int8_weight_only"):
    fake(
        _op,
        row("x", C.floats, _has_rows),
        _weight,
        *_inner("x", "weight"),
        _scale,
        _bias,
        _threshold,
        result=lambda a: _product(a.x, a.weight.shape[0], a.x.dtype),
    )
fake(
    "linear_int8_input_grad",
    row("grad", C.floats, _has_rows),
    _weight,
    row("grad", _columns_of_grad),
    _scale,
    result=lambda a: _product(a.grad, a.weight.shape[1], a.grad.dtype),
)
