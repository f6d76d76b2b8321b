"""Plain computations of the int8 operators, for the self-check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnbops.nn.weights.scale_bits import from_bits
from bnbops.testing.expect import expect, expect_close
from bnbops.testing.sample import tensor

__all__ = ["REFERENCES"]

_FLOAT_MAX = torch.finfo(torch.float32).max
_INVERSE = tensor(1 / 127**2)


def _counted(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """x in fp32 with NaN as 0 and infinities as the largest float, and which elements are outliers."""
    x = x.detach().float().nan_to_num(nan=0.0, posinf=_FLOAT_MAX, neginf=-_FLOAT_MAX)
    return x, (x.abs() >= threshold) if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)


def _absmax(x: Tensor, dim: int) -> Tensor:
    return x.abs().amax(dim) if x.shape[dim] else x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :])


def _codes(x: Tensor, absmax: Tensor) -> Tensor:
    factor = torch.where(absmax > 0, (127 / absmax).clamp(max=_FLOAT_MAX), 0.0)
    return (x * factor).round().to(torch.int8)


def _quantized(x: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """Codes and scales of the rows and of the columns of a matrix, and its outlier columns."""
    x, outliers = _counted(x, threshold)
    kept = x.masked_fill(outliers, 0.0)
    rows, columns = _absmax(kept, 1), _absmax(kept, 0)
    row_codes = _codes(kept, rows[:, None]).masked_fill(outliers.any(0), 0)
    return row_codes, _codes(kept, columns), rows, columns, outliers.any(0)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _expect_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    expect(actual.dtype == expected.dtype and torch.equal(actual, expected), f"{what} wrong")


def _quant(before: dict[str, Any], result: tuple[Tensor, ...], _after: dict[str, Any]) -> None:
    A = before["A"]
    codes, _, stats, _, outliers = _quantized(_matrix(A), before.get("threshold", 0.0))
    _expect_equal(result[0], codes.view(A.shape), "codes")
    _expect_equal(result[1], stats, "row stats")
    _expect_equal(result[2], outliers, "outlier columns")


def _double_quant(before: dict[str, Any], result: tuple[Tensor, ...], _after: dict[str, Any]) -> None:
    A = before["A"]
    expected = list(_quantized(_matrix(A), before.get("threshold", 0.0)))
    expected[:2] = (codes.view(A.shape) for codes in expected[:2])
    for actual, wanted, what in zip(result, expected, ("codes", "codes", "stats", "stats", "outliers"), strict=True):
        _expect_equal(actual, wanted, what)


def _weight(weight: Tensor, scale: Tensor) -> Tensor:
    scales = from_bits(scale).detach().view(*weight.shape[:-1], 1)
    return weight * scales * tensor(1 / 127).to(weight.device)


def _dequant(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_equal(result.detach(), _weight(before["A"], before["stats"]), "values")


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Exact: the products and their sums are integers below 2^53."""
    return (A.double() @ B.double().t()).to(torch.int32)


def _matmul(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_equal(result, _product(before["A"], before["B"]), "products")


def _matmul_out(before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    _expect_equal(after["out"], _product(before["A"], before["B"]), "products")


def _scaled(sums: Tensor, before: dict[str, Any]) -> Tensor:
    rows, columns = from_bits(before["row_stats"]), from_bits(before["col_stats"])
    values = sums * (rows.reshape(*sums.shape[:-1], 1) * columns.flatten()) * _INVERSE.to(sums.device)
    if before.get("bias") is not None:
        values = values + before["bias"].float()
    return values.to(before.get("dtype") or torch.float16)


def _mm_dequant(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_equal(result, _scaled(before["A"], before), "values")


def _scaled_mm(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_equal(result, _scaled(_product(before["A"], before["B"]), before), "values")


def _linear(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    """The codes' product in fp32, where a row of an infinity may overflow, and the outliers' part in float64."""
    x, weight, scale, bias = (before[name] for name in ("x", "weight", "scale", "bias"))
    matrix = _matrix(x)
    codes, _, stats, _, outliers = _quantized(matrix, before["threshold"])
    scales = (stats[:, None] * from_bits(scale).flatten()).clamp(max=_FLOAT_MAX)
    parts = [(_product(codes, weight) * scales * _INVERSE.to(x.device)).double()]
    W = _weight(weight, scale).to(x.dtype)
    parts.append(_counted(matrix, 0.0)[0].double()[:, outliers] @ W.double().t()[outliers])
    if bias is not None:
        parts.append(bias.detach().double().expand(parts[0].shape))
    expected, magnitude = torch.stack(parts).sum(0), torch.stack(parts).abs().sum(0)
    expect(result.dtype == x.dtype, "result of the wrong dtype")
    expect_close(_matrix(result.detach()), expected, "values", magnitude)


def _weight_only(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    x, bias = _matrix(before["x"].detach()).double(), before["bias"]
    W = _weight(before["weight"], before["scale"]).to(result.dtype).double()
    bias = tensor(0.0).to(x) if bias is None else bias.detach().double()
    expect(result.dtype == before["x"].dtype, "result of the wrong dtype")
    expect_close(_matrix(result.detach()), x @ W.t() + bias, "values", x.abs() @ W.t().abs() + bias.abs())


def _input_grad(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    grad = _matrix(before["grad"].detach()).double()
    W = _weight(before["weight"], before["scale"]).to(result.dtype).double()
    expect(result.dtype == before["grad"].dtype, "result of the wrong dtype")
    expect_close(_matrix(result.detach()), grad @ W, "values", grad.abs() @ W.abs())


REFERENCES: dict[str, Callable[[dict[str, Any], Any, dict[str, Any]], None]] = {
    "int8_vectorwise_quant": _quant,
    "int8_vectorwise_dequant": _dequant,
    "int8_double_quant": _double_quant,
    "int8_linear_matmul": _matmul,
    "int8_linear_matmul.out": _matmul_out,
    "int8_mm_dequant": _mm_dequant,
    "int8_scaled_mm": _scaled_mm,
    "linear_int8": _linear,
    "linear_int8_weight_only": _weight_only,
    "linear_int8_input_grad": _input_grad,
}
