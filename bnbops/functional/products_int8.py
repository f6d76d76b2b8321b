"""LLM.int8 matrix products (Dettmers et al. 2022, arXiv:2208.07339), for functions and for `bnbops.nn.Linear8bitLt`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bnbops.autocast import is_autocast, to_autocast_dtype


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
        return torch.ops.bnbops.linear_int8_weight_only(x, weight, scales, bias)
    return torch.ops.bnbops.linear_int8(x, weight, scales, bias, threshold)


def linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    """`matmul`, for int8 codes with `scales`, or for a float weight with None, which is quantized on the fly. In
    training on a CPU, all columns of x are multiplied in floating point."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be positive, or 0 for none, got {threshold}")
    if is_autocast(x.device.type):
        x = to_autocast_dtype(x, x.device.type)
    bias = None if bias is None else bias.to(x.dtype)
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
