"""What the self-check expects of the int8 operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnbops.nn.weights.scale_bits import from_bits
from bnbops.testing.expect import expect, expect_close
from bnbops.testing.references import int8 as ref

__all__ = ["REFERENCES"]

_SCALES = ("scale", "stats", "row_stats", "col_stats")  # which may come as bits


def _plain(before: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the references take them."""
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in before.items()}
    return {name: from_bits(x) if name in _SCALES else x for name, x in plain.items()}


def _exact(
    reference: Callable[[dict[str, Any]], Any], before: dict[str, Any], result: Any, after: dict[str, Any]
) -> None:
    actual, expected = after.get("out", result), reference(_plain(before))
    if isinstance(expected, Tensor):
        actual, expected = (actual,), (expected,)
    for i, (x, wanted) in enumerate(zip(actual, expected, strict=True)):
        expect(x.dtype == wanted.dtype and torch.equal(x.detach(), wanted), f"result {i} wrong")


def _double_quant(a: dict[str, Any]) -> tuple[Tensor, ...]:
    rows, row_stats, outliers = ref.quantize_rows(a["A"], a.get("threshold", 0.0))
    columns, column_stats = ref.quantize_columns(a["A"], a.get("threshold", 0.0))
    return rows, columns, row_stats, column_stats, outliers


def _scaled(sums: Tensor, a: dict[str, Any]) -> Tensor:
    return ref.dequantize_product(sums, a["row_stats"], a["col_stats"], a.get("bias"), a.get("dtype") or torch.float16)


def _linear(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    a = _plain(before)
    expected, error = ref.linear(*(a[name] for name in ("x", "weight", "scale", "bias", "threshold")))
    expect(result.dtype == a["x"].dtype, "result of the wrong dtype")
    off = (result.detach().double() - expected).abs()
    expect(((result == expected) | (off <= error)).all(), "values off by more than rounding")


def _expect_product(actual: Tensor, x: Tensor, W: Tensor, bias: Tensor | None) -> None:
    """x @ W.T + bias, of float64."""
    expected, magnitude = ref.matrix(x).double() @ W.t(), ref.matrix(x).double().abs() @ W.t().abs()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    expect(actual.dtype == x.dtype, "result of the wrong dtype")
    expect_close(ref.matrix(actual.detach()), expected, "values", magnitude)


def _weight_only(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    a = _plain(before)
    _expect_product(result, a["x"], ref.dequantize(a["weight"], a["scale"]).to(result.dtype).double(), a["bias"])


def _input_grad(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    a = _plain(before)
    _expect_product(result, a["grad"], ref.dequantize(a["weight"], a["scale"]).to(result.dtype).double().t(), None)


_EXACT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "int8_vectorwise_quant": lambda a: ref.quantize_rows(a["A"], a.get("threshold", 0.0)),
    "int8_vectorwise_dequant": lambda a: ref.dequantize(a["A"], a["stats"]),
    "int8_double_quant": _double_quant,
    "int8_linear_matmul": lambda a: ref.product(a["A"], a["B"]),
    "int8_linear_matmul.out": lambda a: ref.product(a["A"], a["B"]),
    "int8_mm_dequant": lambda a: _scaled(a["A"], a),
    "int8_scaled_mm": lambda a: _scaled(ref.product(a["A"], a["B"]), a),
}
REFERENCES: dict[str, Callable[[dict[str, Any], Any, dict[str, Any]], None]] = {
    **{name: partial(_exact, reference) for name, reference in _EXACT.items()},
    "linear_int8": _linear,
    "linear_int8_weight_only": _weight_only,
    "linear_int8_input_grad": _input_grad,
}
