"""Fakes and gradients of the int8 operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bnbops.facts import MOST_INT8_PRODUCTS

from .checks import FLOAT_DTYPES, check, check_device, check_dtype, check_float, check_scales, name_of
from .frozen import bias_gradient, refuse_vmap, register_autocast, register_gradients


def _rows(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _check_has_rows(what: str, tensor: Tensor) -> None:
    check(tensor.dim() > 0, f"{what} must have at least one dimension, got a scalar")


def _check_int8(what: str, tensor: Tensor, first: Tensor) -> None:
    check_dtype(what, tensor, torch.int8)
    check_device(what, tensor, first)


def _check_matrix(what: str, tensor: Tensor) -> None:
    check(tensor.dim() == 2, f"{what} must have two dimensions, got {list(tensor.shape)}")


def _check_stats(what: str, stats: Tensor, first: Tensor, count: int, of: str) -> None:
    check_scales(what, stats)
    check_device(what, stats, first)
    check(stats.numel() == count, f"{what} has {stats.numel()} elements, but there are {count} {of}")


def _check_bias(what: str, bias: Tensor, first: Tensor, columns: int) -> None:
    check_float(what, bias)
    check_device(what, bias, first)
    fits = bias.dim() == 1 and bias.numel() == columns
    check(fits, f"{what} must have shape [{columns}], got {list(bias.shape)}")


def _check_threshold(op: str, threshold: float) -> None:
    check(threshold >= 0, f"{op}: threshold must be positive, or 0 for none, got {threshold:g}")


def _check_inner(op: str, a: str, A: Tensor, b: str, B: Tensor) -> None:
    shapes = f"{op}: {b} has shape {list(B.shape)}, but {a} has {list(A.shape)}"
    check(B.shape[-1] == A.shape[-1], f"{shapes}: their last dimensions must be equal")
    message = f"{op}: {a} has {A.shape[-1]} columns; an int32 holds the sum of at most {MOST_INT8_PRODUCTS} products"
    check(A.shape[-1] <= MOST_INT8_PRODUCTS, message)


def _check_matmul(op: str, A: Tensor, B: Tensor) -> None:
    check_dtype(f"{op}: A", A, torch.int8)
    _check_has_rows(f"{op}: A", A)
    _check_int8(f"{op}: B", B, A)
    _check_matrix(f"{op}: B", B)
    _check_inner(op, "A", A, "B", B)


def _check_scales(
    op: str,
    first: Tensor,
    columns: int,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    _check_stats(f"{op}: row_stats", row_stats, first, _rows(first), "rows")
    _check_stats(f"{op}: col_stats", col_stats, first, columns, "columns")
    if bias is not None:
        _check_bias(f"{op}: bias", bias, first, columns)
    check(dtype in FLOAT_DTYPES, f"{op}: dtype must be float32, bfloat16 or float16, got {name_of(dtype)}")


def _check_quant(op: str, A: Tensor, threshold: float) -> None:
    check_float(f"{op}: A", A)
    _check_has_rows(f"{op}: A", A)
    _check_threshold(op, threshold)


# ---- quantization ----------------------------------------------------------------------------------------------


@torch.library.register_fake("bnbops::int8_vectorwise_quant")
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    _check_quant("int8_vectorwise_quant", A, threshold)
    codes = torch.empty(A.shape, dtype=torch.int8, device=A.device)
    stats = torch.empty(_rows(A), dtype=torch.float32, device=A.device)
    return codes, stats, torch.empty(A.shape[-1], dtype=torch.bool, device=A.device)


@torch.library.register_fake("bnbops::int8_double_quant")
def int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_quant("int8_double_quant", A, threshold)
    row_codes, row_stats, outliers = int8_vectorwise_quant(A, threshold)
    col_stats = torch.empty(A.shape[-1], dtype=torch.float32, device=A.device)
    return row_codes, torch.empty_like(row_codes), row_stats, col_stats, outliers


@torch.library.register_fake("bnbops::int8_vectorwise_dequant")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    op = "int8_vectorwise_dequant"
    check_dtype(f"{op}: A", A, torch.int8)
    _check_has_rows(f"{op}: A", A)
    _check_stats(f"{op}: stats", stats, A, _rows(A), "rows in A")
    return torch.empty(A.shape, dtype=torch.float32, device=A.device)


def _save_for_dequant(ctx, inputs, output) -> None:
    A, stats = inputs
    ctx.save_for_backward(A)
    ctx.stats_shape = stats.shape


def _dequant_backward(ctx, grad: Tensor):
    """value = A * stats / 127."""
    (A,) = ctx.saved_tensors
    return None, (grad * A).sum(-1).mul(1 / 127).view(ctx.stats_shape)


torch.library.register_autograd("bnbops::int8_vectorwise_dequant", _dequant_backward, setup_context=_save_for_dequant)


# ---- products --------------------------------------------------------------------------------------------------


def _product(A: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((*A.shape[:-1], columns), dtype=dtype, device=A.device)


@torch.library.register_fake("bnbops::int8_linear_matmul")
def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    _check_matmul("int8_linear_matmul", A, B)
    return _product(A, B.shape[0], torch.int32)


@torch.library.register_fake("bnbops::int8_linear_matmul.out")
def int8_linear_matmul_out(A: Tensor, B: Tensor, *, out: Tensor) -> None:
    op = "int8_linear_matmul"
    _check_matmul(op, A, B)
    check_dtype(f"{op}: out", out, torch.int32)
    check_device(f"{op}: out", out, A)
    fits = out.shape == (*A.shape[:-1], B.shape[0])
    check(fits, f"{op}: out has shape {list(out.shape)}, but A has {list(A.shape)} and B {list(B.shape)}")
    expanded = any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True))
    check(not expanded, f"{op}: out is expanded; its elements need memory of their own")


@torch.library.register_fake("bnbops::int8_mm_dequant")
def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    op, dtype = "int8_mm_dequant", dtype or torch.float16
    check_dtype(f"{op}: A", A, torch.int32)
    _check_has_rows(f"{op}: A", A)
    _check_scales(op, A, A.shape[-1], row_stats, col_stats, bias, dtype)
    return _product(A, A.shape[-1], dtype)


@torch.library.register_fake("bnbops::int8_scaled_mm")
def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    op, dtype = "int8_scaled_mm", dtype or torch.float16
    _check_matmul(op, A, B)
    _check_scales(op, A, B.shape[0], row_stats, col_stats, bias, dtype)
    return _product(A, B.shape[0], dtype)


# Not differentiable: what they return must not require a gradient that no formula computes.
_library = torch.library.Library("bnbops", "IMPL")
for _op in ("int8_vectorwise_quant", "int8_double_quant", "int8_linear_matmul", "int8_mm_dequant", "int8_scaled_mm"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def _bump_version(keyset, *args, out: Tensor) -> None:
    overload = torch.ops.bnbops.int8_linear_matmul.out
    overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, out=out)
    increment_version(out)


# An operator from C++ writes behind autograd's back: a graph that saved what `out` held would not notice.
_library.impl("int8_linear_matmul.out", _bump_version, "ADInplaceOrView", with_keyset=True)


# ---- the linear layer ------------------------------------------------------------------------------------------


def _linear(op: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float = 0.0) -> Tensor:
    check_float(f"{op}: x", x)
    _check_has_rows(f"{op}: x", x)
    _check_int8(f"{op}: weight", weight, x)
    _check_matrix(f"{op}: weight", weight)
    _check_inner(op, "x", x, "weight", weight)
    _check_stats(f"{op}: scale", scale, x, weight.shape[0], "rows in weight")
    if bias is not None:
        _check_bias(f"{op}: bias", bias, x, weight.shape[0])
        check_dtype(f"{op}: bias", bias, x.dtype)
    _check_threshold(op, threshold)
    return _product(x, weight.shape[0], x.dtype)


@torch.library.register_fake("bnbops::linear_int8")
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return _linear("linear_int8", x, weight, scale, bias, threshold)


@torch.library.register_fake("bnbops::linear_int8_weight_only")
def linear_int8_weight_only(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return _linear("linear_int8_weight_only", x, weight, scale, bias)


@torch.library.register_fake("bnbops::linear_int8_input_grad")
def linear_int8_input_grad(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    op = "linear_int8_input_grad"
    check_float(f"{op}: grad", grad)
    _check_has_rows(f"{op}: grad", grad)
    _check_int8(f"{op}: weight", weight, grad)
    _check_matrix(f"{op}: weight", weight)
    shapes = f"{op}: grad has shape {list(grad.shape)}, but weight has {list(weight.shape)}"
    check(grad.shape[-1] == weight.shape[0], f"{shapes}: grad needs a column for each row of weight")
    _check_stats(f"{op}: scale", scale, grad, weight.shape[0], "rows in weight")
    return _product(grad, weight.shape[1], grad.dtype)


def _linear_gradients(frozen: dict[str, Any], grad: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of `linear_int8` as if x had not been rounded to codes (the straight-through estimator)."""
    need_x, need_bias = needed
    grad_x = torch.ops.bnbops.linear_int8_input_grad(grad, frozen["weight"], frozen["scale"]) if need_x else None
    return grad_x, bias_gradient(grad) if need_bias else None


def _input_grad_gradients(frozen: dict[str, Any], grad: Tensor, _needed: Sequence[bool]) -> tuple[Tensor]:
    """The adjoint of grad @ W."""
    return (torch.ops.bnbops.linear_int8_weight_only(grad, frozen["weight"], frozen["scale"], None),)


for _op in ("linear_int8", "linear_int8_weight_only"):
    register_gradients(_op, ["x", "bias"], _linear_gradients)
    register_autocast(_op)
register_gradients("linear_int8_input_grad", ["grad"], _input_grad_gradients)
for _op in ("linear_int8", "linear_int8_weight_only", "linear_int8_input_grad"):
    refuse_vmap(_op, "it takes a batch of any size in one call")
for _op in ("int8_vectorwise_quant", "int8_vectorwise_dequant", "int8_double_quant"):
    refuse_vmap(_op, "call it in a loop, or on a tensor with one more dimension")
