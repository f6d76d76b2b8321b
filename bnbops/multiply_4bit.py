"""Products with 4-bit weights with bitsandbytes' names and signatures, over `torch.ops.bnbops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnbops.functional_4bit import in_own_order, scale_arguments
from bnbops.quant_state import QuantState


def _matrix_shape(function: str, state: QuantState | None) -> Sequence[int]:
    if state is None:
        raise ValueError(f"{function} needs the state that quantize_4bit returned")
    if len(state.shape) != 2:
        raise ValueError(
            f"{function} multiplies by a matrix, but the state's shape is {list(state.shape)}; the experts of a "
            "three-dimensional weight go through torch.ops.bnbops.grouped_linear_4bit"
        )
    return state.shape


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W.t() + bias` for a weight W in 4 bits, with gradients to A and bias.

    Args:
        A: fp32, bf16 or fp16 tensor `[..., K]`.
        B: packed codes of W, of any shape, or a transpose of them.
        quant_state: W's scales and its shape `[N, K]`. If W was quantized as `[K, N]` (and is not square), the result
            is `A @ W + bias`.
        out: tensor `[..., N]` to copy the result into.
        bias: `[N]` in A's dtype.

    Returns:
        Tensor `[..., N]` in A's dtype (`out`, if given); under autocast in its dtype.

    Raises:
        ValueError: no state, or one of a weight that is no matrix.
        RuntimeError: shapes or dtypes that do not fit.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), equation 5.
    """
    rows, columns = _matrix_shape("matmul_4bit", quant_state)
    packed, _ = in_own_order(B)
    scales, nested = scale_arguments(quant_state)
    described = ([rows, columns], quant_state.blocksize, quant_state.quant_type)
    if A.shape[-1] == rows != columns:
        result = torch.ops.bnbops.linear_4bit_input_grad(A, packed, scales, *described, **nested)
        return _written(result if bias is None else result + bias, out)
    return _written(torch.ops.bnbops.linear_4bit(A, packed, scales, bias, *described, **nested), out)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`A @ W.t()` for a weight W in 4 bits: `matmul_4bit` under its older name.

    Args:
        A: fp32, bf16 or fp16 tensor `[..., K]`.
        B: packed codes of W, of any shape, or a transpose of them.
        out: tensor `[..., N]` to copy the result into.
        transposed_A, transposed_B: unused; the state knows W's shape.
        state: W's scales and its shape `[N, K]`.

    Returns:
        Tensor `[..., N]` in A's dtype (`out`, if given).

    Raises:
        ValueError: no state, or one of a weight that is no matrix.
        RuntimeError: shapes or dtypes that do not fit.
    """
    rows, columns = _matrix_shape("gemv_4bit", state)
    packed, _ = in_own_order(B)
    scales, nested = scale_arguments(state)
    described = ([rows, columns], state.blocksize, state.quant_type)
    return _written(torch.ops.bnbops.linear_4bit(A, packed, scales, None, *described, **nested), out)
