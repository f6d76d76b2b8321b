"""The int8 operators: sample calls, and what they give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnbops.facts import FLOATS, name_of
from bnbops.nn.weights.numbers import to_bits
from bnbops.testing.expect import Arguments, Checked, exactly, expect, expect_product, expect_within
from bnbops.testing.references import int8 as ref
from bnbops.testing.sample import Sample, full, integers, normal, strided, with_out

_K, _N = 70, 67  # one vector and a rest; one panel of columns and a rest


def _codes(*shape: int, seed: int = 0) -> Tensor:
    return integers(-128, 128, shape, torch.int8, seed)


def _scales(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu") + 0.5


def _with_outliers(x: Tensor) -> Tensor:
    """A third of the columns have one of magnitude 6 or more."""
    x[::2, 1::3] += 6 * x[::2, 1::3].sign()
    return x


def _with_special(x: Tensor) -> Tensor:
    """A row each with a NaN, infinities and zeros."""
    x[0, 3], x[1, 5], x[1, 6], x[2] = math.nan, math.inf, -math.inf, 0.0
    return x


# ---- quantization ----------------------------------------------------------------------------------------------


def _quant() -> list[Sample]:
    x = normal(5, _K)
    return [
        *(Sample(name_of(dtype), (x.to(dtype),)) for dtype in FLOATS),
        *(Sample(f"outliers, {name_of(d)}", (_with_outliers(x.clone()).to(d), 6.0)) for d in FLOATS),
        Sample("every column has an outlier", (x, 1e-9)),
        Sample("no outliers", (x, 1e9)),
        Sample("three dimensions", (normal(2, 3, _K), 1.0)),
        Sample("one dimension", (normal(_K), 1.0)),
        Sample("long rows", (normal(3, 1100),)),
        Sample("long rows with a threshold", (normal(3, 1100), 1.0)),
        Sample("transposed", (x.t(), 1.0)),
        Sample("strided", (strided(x),)),
        Sample("expanded", (x[:1].expand(4, _K), 0.5)),
        Sample("no rows", (x[:0], 1.0)),
        Sample("no columns", (x[:, :0], 1.0)),
        Sample("nan, infinity and zeros", (_with_special(x.clone()),)),
        Sample("nan, infinity and zeros with a threshold", (_with_special(x.clone()), 1.0)),
    ]


def _dequant() -> list[Sample]:
    codes, stats = _codes(5, _K), _scales(5)
    return [
        Sample("matrix", (codes, stats)),
        Sample("three dimensions", (_codes(2, 3, _K), _scales(6).view(2, 3))),
        Sample("one dimension", (codes[0], stats[:1])),
        Sample("transposed, strided stats", (_codes(_K, 5).t(), strided(stats))),
        Sample("no rows", (codes[:0], stats[:0])),
        Sample("no columns", (codes[:, :0], stats)),
        Sample("stats require grad", (codes, stats.clone().requires_grad_())),
        Sample("bits of scales", (codes, to_bits(stats))),
    ]


# ---- products --------------------------------------------------------------------------------------------------


def _matmul() -> list[Sample]:
    A, B = _codes(5, _K), _codes(_N, _K, seed=1)
    extreme = full((2, 1000), -128, dtype=torch.int8)
    return [
        Sample("matrices", (A, B)),
        Sample("one row", (A[:1], B)),
        Sample("many rows", (_codes(300, 8), _codes(9, 8))),
        Sample("three dimensions", (_codes(2, 3, _K), B)),
        Sample("one dimension", (A[0], B)),
        Sample("largest products", (extreme, torch.cat([extreme, -1 - extreme]))),
        Sample("transposed", (_codes(_K, 5).t(), _codes(_K, _N).t())),
        Sample("no rows", (A[:0], B)),
        Sample("no columns", (A, B[:0])),
        Sample("no products", (A[:, :0], B[:, :0])),
    ]


def _matmul_out() -> list[Sample]:
    return with_out(_matmul(), lambda A, B: full((*A.shape[:-1], B.shape[0]), -1, torch.int32))


def _mm_dequant() -> list[Sample]:
    A = integers(-(2**24), 2**24, (5, _N), torch.int32)
    rows, columns, bias = 1e-3 * _scales(5), _scales(_N, seed=1), normal(_N)
    return [
        Sample("defaults", (A, rows, columns)),
        *(Sample(f"to {name_of(d)}", (A, rows, columns, d, bias.to(d))) for d in FLOATS),
        Sample("float16 bias", (A, rows, columns), {"bias": bias.half()}),
        Sample("three dimensions", (A[:4].view(2, 2, _N), rows[:4], columns, torch.float32)),
        Sample("one dimension", (A[0], rows[:1], columns)),
        Sample("strided", (strided(A), strided(rows), strided(columns), None, strided(bias))),
        Sample("no rows", (A[:0], rows[:0], columns)),
        Sample("no columns", (A[:, :0], rows, columns[:0])),
        Sample("bits of scales", (A, to_bits(rows), to_bits(columns))),
    ]


def _scaled_mm() -> list[Sample]:
    A, B = _codes(5, _K), _codes(_N, _K, seed=1)
    rows, columns, bias = _scales(5), 1e-2 * _scales(_N, seed=1), normal(_N)
    return [
        Sample("defaults", (A, B, rows, columns)),
        *(Sample(f"to {name_of(d)}", (A, B, rows, columns, bias.to(d), d)) for d in FLOATS),
        Sample("three dimensions", (_codes(2, 3, _K), B, _scales(6).view(2, 3), columns), {"dtype": torch.float32}),
        Sample("one dimension", (A[0], B, rows[:1], columns, bias)),
        Sample("transposed", (_codes(_K, 5).t(), _codes(_K, _N).t(), strided(rows), columns)),
        Sample("no rows", (A[:0], B, rows[:0], columns, bias)),
        Sample("no columns", (A, B[:0], rows, columns[:0])),
        Sample("no products", (A[:, :0], B[:, :0], rows, columns, bias)),
        Sample("bits of scales", (A, B, rows, to_bits(columns))),
    ]


# ---- the linear layer ------------------------------------------------------------------------------------------


def _linear() -> list[Sample]:
    x, weight, scale, bias = normal(5, _K), _codes(_N, _K), 0.1 * _scales(_N), normal(_N, seed=1)
    far = _with_outliers(x.clone())
    return [
        *(Sample(name_of(d), (x.to(d), weight, scale, None, 0.0)) for d in FLOATS),
        *(Sample(f"outliers, {name_of(d)}", (far.to(d), weight, scale, bias.to(d), 6.0)) for d in FLOATS),
        Sample("every column has an outlier", (x, weight, scale, bias, 1e-9)),
        Sample("many rows", (normal(300, 24), _codes(9, 24), scale[:9], None, 1.0)),
        Sample("three dimensions", (normal(2, 3, _K), weight, scale, bias, 1.0)),
        Sample("one dimension", (x[0], weight, scale, bias, 1.0)),
        Sample("transposed", (normal(_K, 5).t(), _codes(_K, _N).t(), strided(scale), strided(bias), 1.0)),
        Sample("no rows", (x[:0], weight, scale, bias, 1.0)),
        Sample("no columns", (x, weight[:0], scale[:0], None, 1.0)),
        Sample("no products", (x[:, :0], weight[:, :0], scale, bias, 1.0)),
        Sample("nan, infinity and zeros", (_with_special(x.clone()), weight, scale, bias, 0.0)),
        Sample("nan and zeros with a threshold", (_with_special(x.clone())[[0, 2]], weight, scale, bias, 1.0)),
        Sample("bits of scales", (far.bfloat16(), weight, to_bits(scale), None, 6.0)),
        *(Sample(f"requires grad, {name_of(d)}", _differentiable(d)) for d in FLOATS[:2]),
    ]


def _differentiable(dtype: torch.dtype) -> tuple[Tensor | float, ...]:
    x, bias = (t.to(dtype).requires_grad_() for t in (normal(2, 3, _K), normal(_N, seed=1)))
    return x, _codes(_N, _K), 0.1 * _scales(_N), bias, 1.0


def _weight_only() -> list[Sample]:
    """Those without a threshold, and a weight of several panels."""
    values = normal(5, _K)
    wide = Sample("several panels", (values, _codes(1100, _K), _scales(1100), normal(1100)))
    return [Sample(s.name, s.args[:-1]) for s in _linear() if "nan" not in s.name and "outlier" not in s.name] + [wide]


def _input_grad() -> list[Sample]:
    grad, weight, scale = normal(5, _N), _codes(_N, _K), 0.1 * _scales(_N)
    return [
        *(Sample(name_of(d), (grad.to(d), weight, scale)) for d in FLOATS),
        Sample("several panels", (normal(3, 9), _codes(9, 1100), scale[:9])),
        Sample("three dimensions", (normal(2, 3, _N), weight, scale)),
        Sample("one dimension", (grad[0], weight, scale)),
        Sample("transposed", (normal(_N, 5).t(), _codes(_K, _N).t(), strided(scale))),
        Sample("no rows", (grad[:0], weight, scale)),
        Sample("no columns", (grad, weight[:, :0], scale)),
        Sample("no products", (grad[:, :0], weight[:0], scale[:0])),
        Sample("requires grad, bits of scales", (grad.clone().requires_grad_(), weight, to_bits(scale))),
    ]


# ---- references ------------------------------------------------------------------------------------------------


def _double_quant(a: Arguments) -> tuple[Tensor, ...]:
    rows, row_stats, outliers = ref.quantize_rows(a.A, a.threshold)
    columns, column_stats = ref.quantize_columns(a.A, a.threshold)
    return rows, columns, row_stats, column_stats, outliers


def _scaled(sums: Tensor, a: Arguments) -> Tensor:
    return ref.dequantize_product(sums, a.row_stats, a.col_stats, a.bias, a.dtype or torch.float16)


def _expect_linear(a: Arguments, result: Tensor) -> None:
    expect(result.dtype == a.x.dtype, "result of the wrong dtype")
    expect_within(result, *ref.linear(a.x, a.weight, a.scale, a.bias, a.threshold), "values")


def _expect_product(a: Arguments, result: Tensor) -> None:
    """x @ weight.T + bias, or grad @ weight, of the weight in the dtype of x."""
    x, bias = (a.grad, None) if hasattr(a, "grad") else (a.x, a.bias)
    weight = ref.dequantize(a.weight, a.scale).to(x.dtype)
    expect_product(result, x, weight if hasattr(a, "grad") else weight.t(), bias)


_product = exactly(lambda a: ref.product(a.A, a.B))
OPERATORS: dict[str, Checked] = {
    "int8_vectorwise_quant": (_quant, exactly(lambda a: ref.quantize_rows(a.A, a.threshold))),
    "int8_vectorwise_dequant": (_dequant, exactly(lambda a: ref.dequantize(a.A, a.stats))),
    "int8_double_quant": (_quant, exactly(_double_quant)),
    "int8_linear_matmul": (_matmul, _product),
    "int8_linear_matmul.out": (_matmul_out, _product),
    "int8_mm_dequant": (_mm_dequant, exactly(lambda a: _scaled(a.A, a))),
    "int8_scaled_mm": (_scaled_mm, exactly(lambda a: _scaled(ref.product(a.A, a.B), a))),
    "linear_int8": (_linear, _expect_linear),
    "linear_int8_weight_only": (_weight_only, _expect_product),
    "linear_int8_input_grad": (_input_grad, _expect_product),
}
