"""What lies above the kernels: gradients, autocast, version counters, and clear refusals of torch.func's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import increment_version

from bnbops._library import device_operators, implementations, operator
from bnbops.lasting import to_autocast_dtype

_Adjoint = tuple[torch._ops.OpOverload, list[str]]
"""The operator that multiplies by the transpose, and its arguments after the first."""


def _refuse(op: str, what: str) -> NoReturn:
    raise RuntimeError(f"bnbops::{op.partition('.')[0]}: {what}")


# ---- gradients: of decoded values ------------------------------------------------------------------------------


def _save_for_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    A, absmax, code, ctx.blocksize, _ = inputs
    ctx.save_for_backward(A, absmax, code)


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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


def _save_for_int8_dequant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    A, stats = inputs
    ctx.save_for_backward(A)
    ctx.stats_shape = stats.shape


def _int8_dequant_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """value = A * stats / 127."""
    (A,) = ctx.saved_tensors
    return None, (grad * A).sum(-1).mul(1 / 127).view(ctx.stats_shape)


_OF_VALUES = {
    "dequantize_blockwise": (_dequantize_backward, _save_for_dequantize),
    "int8_vectorwise_dequant": (_int8_dequant_backward, _save_for_int8_dequant),
}


# ---- gradients: of products with a frozen weight ---------------------------------------------------------------


def _bias_gradient(grad: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The sum over rows, over those of each expert if `offsets` tell where they end, in float32."""
    rows = grad.reshape(-1, grad.shape[-1])
    if offsets is None:
        return rows.sum(0, dtype=torch.float32).to(grad.dtype)
    row = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    expert = torch.bucketize(row, offsets, right=True)  # one past the last for rows that belong to none
    sums = torch.zeros((offsets.numel() + 1, rows.shape[1]), dtype=torch.float32, device=rows.device)
    return sums.index_add(0, expert, rows.float())[:-1].to(grad.dtype)


class _Frozen(torch.autograd.Function):
    """Saves the tensors that are not differentiated, which live anyway, and the numbers. Gradients are those of x and
    bias, or of `grad`, where the adjoint multiplies by the transpose; of `linear_int8` as if x had not been rounded to
    codes (the straight-through estimator)."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[[], Tensor], adjoint: _Adjoint, frozen: dict[str, Any], *_inputs: Tensor | None
    ) -> Tensor:
        tensors = {name: value for name, value in frozen.items() if isinstance(value, Tensor)}
        ctx.adjoint, ctx.names = adjoint, list(tensors)
        ctx.others = {name: value for name, value in frozen.items() if name not in tensors}
        ctx.save_for_backward(*tensors.values())
        return call()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        frozen = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
        adjoint, names = ctx.adjoint
        weight = {name: frozen.get(name) for name in names if name in frozen or name == "bias"}
        _, _, _, needs_x, *needs_bias = ctx.needs_input_grad
        of_x = adjoint(grad, **weight) if needs_x else None
        return None, None, None, of_x, *(_bias_gradient(grad, frozen.get("offsets")) if n else None for n in needs_bias)


def _differentiable(op: str, adjoint: str) -> Callable[..., Tensor]:
    """An autograd kernel. By hand, because torch.library.register_autograd takes no keyword-only tensors, and because
    transforms that it does not know would give wrong derivatives without a word."""
    overload, backwards = operator(op), operator(adjoint)
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
    of_adjoint = [argument.name for argument in backwards._schema.arguments[1:]]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
        def call() -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

        frozen = dict(zip(names, args, strict=True)) | kwargs
        values = [frozen.pop(name) for name in ("grad", "x", "bias") if name in frozen]
        given = [value for value in values if value is not None]
        for name, value in frozen.items():
            if isinstance(value, Tensor) and value.requires_grad:
                _refuse(op, f"{name} is not differentiable; detach it")
        differentiable = torch.is_grad_enabled() and any(value.requires_grad for value in given)
        transformed = differentiable and torch._C._are_functorch_transforms_active()
        if transformed or any(unpack_dual(value).tangent is not None for value in given):
            _refuse(op, "torch.func's grad, vjp and jvp are not supported; use torch.autograd.grad")
        if not differentiable:
            return call()
        return _Frozen.apply(call, (backwards, of_adjoint), frozen, *values)  # type: ignore[no-untyped-call]  # torch's

    return kernel


_ADJOINTS = {
    "linear_4bit": "linear_4bit_input_grad",
    "linear_4bit_input_grad": "linear_4bit",
    "grouped_linear_4bit": "grouped_linear_4bit_input_grad",
    "grouped_linear_4bit_input_grad": "grouped_linear_4bit",
    "linear_int8": "linear_int8_input_grad",
    "linear_int8_weight_only": "linear_int8_input_grad",
    "linear_int8_input_grad": "linear_int8_weight_only",
}
_AUTOCAST = ("linear_4bit", "grouped_linear_4bit", "linear_int8", "linear_int8_weight_only")


# ---- autocast --------------------------------------------------------------------------------------------------


def _register_autocast(op: str, device: str) -> None:
    """x and bias are cast; scales stay float32."""
    overload = operator(op)
    key = "Autocast" + torch._C._dispatch_key_for_device(device)
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(below):
            bias = None if bias is None else to_autocast_dtype(bias, device)
            return overload(to_autocast_dtype(x, device), weight, scales, bias, *args, **kwargs)

    implementations.impl(op, kernel, key)


# ---- version counters and vmap ---------------------------------------------------------------------------------


def _counted(op: str) -> Callable[..., None]:
    """An operator from C++ writes behind autograd's back: a graph that saved what `out` held would not notice."""
    overload = operator(op)

    def kernel(keyset: Any, *args: Any, out: Tensor, **kwargs: Any) -> None:
        overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, out=out, **kwargs)
        increment_version(out)

    return kernel


def _refuses_vmap(op: str, advice: str) -> Callable[..., None]:
    """torch's fallback would loop, one call an element: slow, and other numbers where an operator looks at all rows."""
    return lambda *args, **kwargs: _refuse(op, f"vmap is not supported; {advice}")


_IN_A_LOOP = "call it in a loop, or on a {} with one more dimension"
_VMAP_ADVICE = {
    **dict.fromkeys(_ADJOINTS, "it takes a batch of any size in one call"),
    **dict.fromkeys(["dequantize_4bit", "dequantize_4bit.out"], _IN_A_LOOP.format("weight")),
    **dict.fromkeys(
        ["quantize_4bit", "int8_vectorwise_quant", "int8_vectorwise_dequant", "int8_double_quant"],
        _IN_A_LOOP.format("tensor"),
    ),
    "embedding_4bit": "indices may have any number of dimensions, so pass all of them in one call",
}


# ---- registration ----------------------------------------------------------------------------------------------


for _op, (_backward, _save) in _OF_VALUES.items():
    torch.library.register_autograd(f"bnbops::{_op}", _backward, setup_context=_save, lib=implementations)
for _op, _adjoint in _ADJOINTS.items():
    implementations.impl(_op, _differentiable(_op, _adjoint), "Autograd", with_keyset=True)
for _op in _AUTOCAST:
    for _device in ("cpu", "cuda"):
        _register_autocast(_op, _device)
for _op, _advice in _VMAP_ADVICE.items():
    implementations.impl(_op, _refuses_vmap(_op, _advice), "FuncTorchBatched")
for _op in device_operators():
    if _op.endswith(".out"):
        implementations.impl(_op, _counted(_op), "ADInplaceOrView", with_keyset=True)
    elif _op not in _OF_VALUES | _ADJOINTS and any("Tensor" in str(x.type) for x in operator(_op)._schema.returns):
        # Not differentiable: what it returns must not require a gradient that no formula computes.
        implementations.impl(_op, torch.library.fallthrough_kernel, "Autograd")
