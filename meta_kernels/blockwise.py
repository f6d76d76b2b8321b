"""Fakes and gradients of quantize_blockwise and dequantize_blockwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .checks import (
    FLOAT_DTYPES,
    check,
    check_contiguous,
    check_device,
    check_dtype,
    check_float,
    check_not_expanded,
    name_of,
)


def _check_codebook(op: str, code: Tensor, like: Tensor) -> None:
    check_dtype(f"{op}: code", code, torch.float32)
    check_device(f"{op}: code", code, like)
    check_contiguous(f"{op}: code", code)
    check(tuple(code.shape) == (256,), f"{op}: code must have shape [256], got {list(code.shape)}")


def _check_blocksize(op: str, blocksize: int) -> None:
    check(blocksize > 0, f"{op}: blocksize must be positive, got {blocksize}")


@torch.library.register_fake("bnbops::quantize_blockwise")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    op = "quantize_blockwise"
    check_float(f"{op}: A", A)
    _check_codebook(op, code, A)
    _check_blocksize(op, blocksize)
    blocks = -(A.numel() // -blocksize)
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    return codes, torch.empty((blocks,), dtype=torch.float32, device=A.device)


# Codes and scales are not differentiable: they must not require a gradient that no formula computes.
_library = torch.library.Library("bnbops", "IMPL")
_library.impl("quantize_blockwise", torch.library.fallthrough_kernel, "Autograd")


def _check_dequantize(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> None:
    op = "dequantize_blockwise"
    check_dtype(f"{op}: A", A, torch.uint8)
    _check_codebook(op, code, A)
    _check_blocksize(op, blocksize)
    check_dtype(f"{op}: absmax", absmax, torch.float32)
    check_device(f"{op}: absmax", absmax, A)
    blocks = -(A.numel() // -blocksize)
    check(
        absmax.numel() == blocks,
        f"{op}: absmax has {absmax.numel()} elements, but {A.numel()} codes in blocks of {blocksize} need {blocks}",
    )
    check(dtype in FLOAT_DTYPES, f"{op}: dtype must be float32, bfloat16 or float16, got {name_of(dtype)}")


@torch.library.register_fake("bnbops::dequantize_blockwise")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(A, absmax, code, blocksize, dtype)
    return torch.empty(A.shape, dtype=dtype, device=A.device)


@torch.library.register_fake("bnbops::dequantize_blockwise.out")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, *, out: Tensor) -> None:
    op = "dequantize_blockwise"
    _check_dequantize(A, absmax, code, blocksize, dtype)
    check_dtype(f"{op}: out", out, dtype)
    check_device(f"{op}: out", out, A)
    check(out.shape == A.shape, f"{op}: out has shape {list(out.shape)}, but A has {list(A.shape)}")
    check_not_expanded(f"{op}: out", out)


def _bump_version(keyset, *args, out: Tensor) -> None:
    overload = torch.ops.bnbops.dequantize_blockwise.out
    overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, out=out)
    increment_version(out)


# An operator from C++ writes behind autograd's back: a graph that saved what `out` held would not notice.
_library.impl("dequantize_blockwise.out", _bump_version, "ADInplaceOrView", with_keyset=True)


def _save_for_dequantize(ctx, inputs, output) -> None:
    A, absmax, code, ctx.blocksize, _ = inputs
    ctx.save_for_backward(A, absmax, code)


def _dequantize_backward(ctx, grad: Tensor):
    """value = code[A] * absmax[block]: the gradient of absmax is a sum over each block, that of code one over each
    entry's occurrences."""
    A, absmax, code = ctx.saved_tensors
    _, need_absmax, need_code, _, _ = ctx.needs_input_grad
    grad, index = grad.float().flatten(), A.flatten().long()
    block = torch.arange(index.numel(), dtype=torch.int64, device=A.device) // ctx.blocksize
    grad_absmax = grad_code = None
    if need_absmax:
        zeros = torch.zeros(absmax.numel(), dtype=torch.float32, device=A.device)
        grad_absmax = zeros.index_add(0, block, grad * code[index]).view(absmax.shape)
    if need_code:
        grad_code = torch.zeros_like(code).index_add(0, index, grad * absmax.flatten()[block])
    return None, grad_absmax, grad_code, None, None


torch.library.register_autograd(
    "bnbops::dequantize_blockwise", _dequantize_backward, setup_context=_save_for_dequantize
)
