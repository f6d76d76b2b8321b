"""Gradients and autocast of operators whose weight is frozen, and clear refusals of torch.func's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .checks import check

Gradients = Callable[[dict[str, Any], Tensor, Sequence[bool]], Sequence[Tensor | None]]

_library = torch.library.Library("bnbops", "IMPL")


class _Frozen(torch.autograd.Function):
    """Saves the tensors that are not differentiated, which live anyway, and the numbers."""

    @staticmethod
    def forward(ctx, call: Callable[[], Tensor], gradients: Gradients, frozen: dict[str, Any], *_inputs: Tensor | None):
        tensors = {name: value for name, value in frozen.items() if isinstance(value, Tensor)}
        ctx.gradients, ctx.names = gradients, list(tensors)
        ctx.others = {name: value for name, value in frozen.items() if name not in tensors}
        ctx.save_for_backward(*tensors.values())
        return call()

    @staticmethod
    def backward(ctx, grad: Tensor):
        frozen = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.others
        return None, None, None, *ctx.gradients(frozen, grad, ctx.needs_input_grad[3:])


def register_gradients(op: str, inputs: Sequence[str], gradients: Gradients) -> None:
    """Makes an operator differentiable with respect to `inputs`: `gradients(other arguments, grad, which are needed)`
    gives one for each. By hand, because torch.library.register_autograd takes no keyword-only tensors, and because
    transforms that it does not know would give wrong derivatives without a word."""
    overload = getattr(torch.ops.bnbops, op).default
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
    places = [names.index(name) for name in inputs]

    def kernel(keyset, *args: Any, **kwargs: Any) -> Tensor:
        def call() -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

        values = [args[place] for place in places]
        given = [value for value in values if value is not None]
        frozen = {name: value for name, value in zip(names, args, strict=True) if name not in inputs} | kwargs
        for name, value in frozen.items():
            if isinstance(value, Tensor) and value.requires_grad:
                check(False, f"{op}: {name} is not differentiable; detach it")
        differentiable = torch.is_grad_enabled() and any(value.requires_grad for value in given)
        transformed = differentiable and torch._C._are_functorch_transforms_active()
        if transformed or any(unpack_dual(value).tangent is not None for value in given):
            check(False, f"{op}: torch.func's grad, vjp and jvp are not supported; use torch.autograd.grad")
        return _Frozen.apply(call, gradients, frozen, *values) if differentiable else call()

    _library.impl(op, kernel, "Autograd", with_keyset=True)


def register_autocast(op: str) -> None:
    """x and bias of a linear operator in autocast's dtype, as for torch.nn.functional.linear; scales stay float32."""
    overload = getattr(torch.ops.bnbops, op).default

    def register(device: str) -> None:
        key = "Autocast" + torch._C._dispatch_key_for_device(device)
        below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(x: Tensor | None) -> Tensor | None:
            castable = x is not None and x.is_floating_point() and x.dtype != torch.float64
            return x.to(torch.get_autocast_dtype(device)) if castable else x

        def kernel(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
            with torch._C._ExcludeDispatchKeyGuard(below):
                return overload(cast(x), weight, scales, cast(bias), *args, **kwargs)

        _library.impl(op, kernel, key)

    for device in ("cpu", "cuda"):
        register(device)


def refuse_vmap(op: str, advice: str) -> None:
    """torch's fallback would loop, one call an element: slow, and other numbers where an operator looks at all rows."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        check(False, f"{op}: vmap is not supported; {advice}")

    _library.impl(op, refuse, "FuncTorchBatched")


def bias_gradient(grad: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The sum over rows, over those of each expert if `offsets` tell where they end, in float32."""
    rows = grad.reshape(-1, grad.shape[-1])
    if offsets is None:
        return rows.sum(0, dtype=torch.float32).to(grad.dtype)
    row = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    expert = torch.bucketize(row, offsets, right=True)  # one past the last for rows that belong to none
    sums = torch.zeros((offsets.numel() + 1, rows.shape[1]), dtype=torch.float32, device=rows.device)
    return sums.index_add(0, expert, rows.float())[:-1].to(grad.dtype)
