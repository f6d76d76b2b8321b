"""The int8 functions of LLM.int8() with bitsandbytes' names and signatures, over `torch.ops.bnbops`.

Rows are what all dimensions but the last one count. A code c of a row with statistic s (its largest magnitude) means
c * s / 127.

Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (arXiv:2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnbops.eager import call
from bnbops.lasting import is_autocast, to_autocast_dtype


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


# ---- products, also for `bnbops.nn.Linear8bitLt` -------------------------------------------------------------------


@dataclass(eq=False)
class MatmulLtState:
    """What `matmul` knows of a weight, attribute for attribute as bitsandbytes has it.

    Attributes:
        CB: the weight's int8 codes `[N, K]`, or None.
        SCB: fp32 scales `[N]` of its rows, their largest magnitudes, or None.
        threshold: magnitude from which on a column of activations is multiplied in floating point; 0 for none.
        has_fp16_weights: the weight is a float tensor, quantized anew for each product.
        is_training: on a CPU, activations are not rounded to codes.

    The others have no meaning here; they are for code that reads or sets them.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    idx: Tensor | None = None
    has_accumulated_gradients: bool = False
    threshold: float = 0.0
    is_training: bool = True
    has_fp16_weights: bool = True
    use_pool: bool = False

    def reset_grads(self) -> None:
        """Forgets the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `[N, K]` and fp32 scales `[N]` of a float weight, rounded to float16 first, as bitsandbytes does."""
    codes, scales, _ = torch.ops.bnbops.int8_vectorwise_quant(weight.detach().to(torch.float16))
    return codes, scales


class _LinearOfFloatWeight(torch.autograd.Function):
    """The product with a float weight quantized on the fly, and the gradients of LLM.int8: to the input through the
    quantized weight, to the weight as if it had not been quantized (straight through)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, training: bool) -> Tensor:
        return _product(x, *quantize_weight(weight), bias, threshold, training)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *_ = inputs
        ctx.save_for_backward(x, weight)  # the codes are made again: they would take half the weight's memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.ops.bnbops.linear_int8_input_grad(grad, *quantize_weight(weight)) if need_x else None
        grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if need_weight else None
        return grad_x, grad_weight, rows.sum(0) if need_bias else None, None, None


def _product(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    """bitsandbytes rounds activations to codes, but in training on a CPU, where it has no fast product of codes."""
    if training and x.device.type == "cpu":
        return call(torch.ops.bnbops.linear_int8_weight_only.default, x, weight, scales, bias)
    return call(torch.ops.bnbops.linear_int8.default, x, weight, scales, bias, threshold)


def linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    """`matmul`, for int8 codes with `scales`, or for a float weight with None, which is quantized on the fly. In
    training on a CPU, all columns of x are multiplied in floating point."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be positive, or 0 for none, got {threshold}")
    if is_autocast(x.device.type):
        x = to_autocast_dtype(x, x.device.type)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if scales is not None:
        return _product(x, weight, scales, bias, threshold, training)
    return _LinearOfFloatWeight.apply(x, weight, bias, threshold, training)  # type: ignore[no-untyped-call]  # torch's


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`A @ B.T + bias` by LLM.int8 (arXiv:2208.07339), in A's dtype, or autocast's.

    Args:
        A: fp32, bf16 or fp16 `[..., K]`.
        B: `[N, K]`: a float weight, quantized for this product; or int8 codes, with scales in `B.SCB` or `state.SCB`.
        out: tensor of the result's shape and dtype to write to; not differentiable then.
        state: options, and a quantized weight. If it says `has_fp16_weights=False`, its CB and SCB stand for B,
            whatever that is; where it has none yet, a float B is quantized into it. It is not changed otherwise. By
            default it says `is_training`, so that activations are rounded to codes on other devices than a CPU alone.
        threshold: if positive, instead of the state's.
        bias: float tensor `[N]` or None; it is cast to the dtype of the result.

    Returns:
        `[..., N]` (`out`, if given). Gradients go to A, bias, and a float B unless the state holds a quantized one.

    Raises:
        ValueError: codes without scales, a negative threshold, or an `out` that does not fit.
        RuntimeError: shapes or dtypes that do not fit.
    """
    state = MatmulLtState() if state is None else state
    threshold = threshold if threshold > 0 else state.threshold
    weight, scales = _weight_of(B, state)
    result = linear(A, weight, scales, bias, threshold, state.is_training)
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(
            f"out has shape {list(out.shape)} and {out.dtype}, but the result {list(result.shape)} and {result.dtype}"
        )
    if torch.is_grad_enabled() and (out.requires_grad or result.requires_grad):
        raise ValueError("matmul with out= has no gradient; call it under torch.no_grad() or without out")
    return out.copy_(result)


def _weight_of(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor | None]:
    """What `linear` takes as weight and scales."""
    frozen = not state.has_fp16_weights
    if frozen and B.requires_grad:
        raise ValueError("B needs a gradient, which only has_fp16_weights=True gives it, but the state says False")
    if frozen and state.CB is not None and state.SCB is not None:
        return state.CB, state.SCB
    if B.dtype == torch.int8:
        scales = getattr(B, "SCB", None)
        scales = state.SCB if scales is None else scales
        if scales is None:
            raise ValueError("B is int8, but neither B.SCB nor state.SCB holds its scales")
        return B, scales
    if frozen:
        state.CB, state.SCB = quantize_weight(B)
        return state.CB, state.SCB
    return B, None
