"""Fakes and gradients of linear_4bit, grouped_linear_4bit and their adjoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check, check_contiguous, check_device, check_dtype, check_float
from .frozen import Gradients, bias_gradient, refuse_vmap, register_autocast, register_gradients
from .quantize_4bit import Weight4bit

# Each operator's gradient with respect to its first argument is the other one.
_ADJOINTS = {
    "linear_4bit": "linear_4bit_input_grad",
    "linear_4bit_input_grad": "linear_4bit",
    "grouped_linear_4bit": "grouped_linear_4bit_input_grad",
    "grouped_linear_4bit_input_grad": "grouped_linear_4bit",
}


# ---- fakes -----------------------------------------------------------------------------------------------------


def _check_features(what: str, x: Tensor, weight: Weight4bit, last: int, which: str) -> None:
    check_float(what, x)
    check_device(what, x, weight.codes)
    check(
        x.dim() >= 1 and x.shape[-1] == last,
        f"{what} has shape {list(x.shape)}, but its last dimension must be {which} = {last} of a weight of shape "
        f"{list(weight.shape)}",
    )


def _check_bias(op: str, bias: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    if bias is not None:
        what = f"{op}: bias"
        check_dtype(what, bias, x.dtype)
        check_device(what, bias, x)
        fits = list(bias.shape) == list(shape)
        check(fits, f"{what} must have shape {list(shape)}, got {list(bias.shape)}")


def _check_offsets(weight: Weight4bit, offsets: Tensor, rows_name: str, rows: Tensor) -> None:
    fits = rows.dim() == 2
    check(fits, f"{weight.op}: {rows_name} must be a matrix [tokens, features], got {list(rows.shape)}")
    what, experts = f"{weight.op}: offsets", weight.shape[0]
    check_dtype(what, offsets, torch.int32)
    check_device(what, offsets, weight.codes)
    check_contiguous(what, offsets)
    fits = list(offsets.shape) == [experts]
    check(fits, f"{what} must have shape [{experts}], one end for each expert, got {list(offsets.shape)}")


@torch.library.register_fake("bnbops::linear_4bit")
def _(x, weight, absmax, bias, shape, blocksize, quant_type, **nested) -> Tensor:
    op = "linear_4bit"
    described = Weight4bit(op, weight, absmax, shape, blocksize, quant_type, **nested)
    described.check(dims=2)
    _check_features(f"{op}: x", x, described, shape[1], "in_features")
    _check_bias(op, bias, x, shape[:1])
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("bnbops::linear_4bit_input_grad")
def _(grad, weight, absmax, shape, blocksize, quant_type, **nested) -> Tensor:
    op = "linear_4bit_input_grad"
    described = Weight4bit(op, weight, absmax, shape, blocksize, quant_type, **nested)
    described.check(dims=2)
    _check_features(f"{op}: grad", grad, described, shape[0], "out_features")
    return grad.new_empty((*grad.shape[:-1], shape[1]))


@torch.library.register_fake("bnbops::grouped_linear_4bit")
def _(x, weight, absmax, bias, offsets, shape, blocksize, quant_type, **nested) -> Tensor:
    op = "grouped_linear_4bit"
    described = Weight4bit(op, weight, absmax, shape, blocksize, quant_type, **nested)
    described.check(dims=3)
    _check_features(f"{op}: x", x, described, shape[2], "in_features")
    _check_bias(op, bias, x, shape[:2])
    _check_offsets(described, offsets, "x", x)
    return x.new_empty((x.shape[0], shape[1]))


@torch.library.register_fake("bnbops::grouped_linear_4bit_input_grad")
def _(grad, weight, absmax, offsets, shape, blocksize, quant_type, **nested) -> Tensor:
    op = "grouped_linear_4bit_input_grad"
    described = Weight4bit(op, weight, absmax, shape, blocksize, quant_type, **nested)
    described.check(dims=3)
    _check_features(f"{op}: grad", grad, described, shape[1], "out_features")
    _check_offsets(described, offsets, "grad", grad)
    return grad.new_empty((grad.shape[0], shape[2]))


# ---- gradients: of x and bias; the weight is frozen ------------------------------------------------------------


def _gradients(op: str) -> Gradients:
    adjoint = getattr(torch.ops.bnbops, _ADJOINTS[op])
    extra = {"bias": None} if op.endswith("_input_grad") else {}

    def gradients(weight: dict[str, Any], grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        found = [adjoint(grad, **weight, **extra) if needed[0] else None]
        if len(needed) > 1:
            found.append(bias_gradient(grad, weight.get("offsets")) if needed[1] else None)
        return found

    return gradients


for _op in _ADJOINTS:
    register_gradients(_op, ["grad"] if _op.endswith("_input_grad") else ["x", "bias"], _gradients(_op))
    refuse_vmap(_op, "it takes a batch of any size in one call")
for _op in ("linear_4bit", "grouped_linear_4bit"):
    register_autocast(_op)
