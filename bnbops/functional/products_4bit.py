"""Products with 4-bit weights with bitsandbytes' names and signatures, over `torch.ops.bnbops`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bnbops.functional.four_bit import in_own_order, weight_arguments
from bnbops.functional.quant_state import QuantState
from bnbops.tracing import is_compiling


def _weight_arguments(function: str, packed: Tensor, state: QuantState | None) -> dict[str, Any]:
    """What the operators take to know a weight matrix."""
    if state is None:
        raise ValueError(f"{function} needs the state that quantize_4bit returned")
    weight = weight_arguments(state)
    if len(weight["shape"]) != 2:
        raise ValueError(
            f"{function} multiplies by a matrix, but the state's shape is {weight['shape']}; the experts of a "
            "three-dimensional weight go through torch.ops.bnbops.grouped_linear_4bit"
        )
    return weight | {"weight": in_own_order(packed)[0]}


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
            is `A @ W + bias`, with a DeprecationWarning, as bitsandbytes gives it.
        out: tensor `[..., N]` to copy the result into.
        bias: `[N]` in A's dtype.

    Returns:
        Tensor `[..., N]` in A's dtype (`out`, if given); under autocast in its dtype.

    Raises:
        ValueError: no state, or one of a weight that is no matrix.
        RuntimeError: shapes or dtypes that do not fit.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), equation 5.
    """
    weight = _weight_arguments("matmul_4bit", B, quant_state)
    rows, columns = weight["shape"]
    if A.shape[-1] == rows != columns:
        if not is_compiling():
            warnings.warn(
                f"matmul_4bit: weight was quantized from a [K, N] tensor, of shape {[rows, columns]}. Re-quantize from "
                "the weight as [N, K] (out_features, in_features): bitsandbytes will refuse the other form",
                DeprecationWarning,
                stacklevel=2,
            )
        result = torch.ops.bnbops.linear_4bit_input_grad(A, **weight)
        return _written(result if bias is None else result + bias, out)
    return _written(torch.ops.bnbops.linear_4bit(A, bias=bias, **weight), out)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`A @ W.t()` for a weight W in 4 bits: `matmul_4bit` under its older name.

    Args, results and errors are as there, but for `transposed_A` and `transposed_B`, which are unused, and for a W that
    was quantized as `[K, N]`, which does not fit.
    """
    return _written(torch.ops.bnbops.linear_4bit(A, bias=None, **_weight_arguments("gemv_4bit", B, state)), out)
