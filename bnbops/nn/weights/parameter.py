"""What the parameters of quantized weights share: every method that moves or casts one goes through its `to`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from bnbops.nn.weights.codes import CodesParameter, codes_as_they_are

_Device = torch.device | str | int | None
_PRESERVE = torch.preserve_format


def _parse_to(
    *args: Any, copy: bool = False, **kwargs: Any
) -> tuple[torch.device | None, torch.dtype | None, bool, bool, torch.memory_format | None]:
    """device, dtype, non_blocking, copy and memory_format of a call of `torch.Tensor.to`."""
    before_copy = 2 if args and isinstance(args[0], Tensor | torch.dtype) else 3
    if len(args) == before_copy + 1:
        *args, copy = args
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, non_blocking, copy, memory_format


def _mover(kind: str) -> Callable[..., Tensor]:
    def move(
        self: QuantizedParameter,
        device: _Device = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = _PRESERVE,
    ) -> Tensor:
        device = f"{kind}:{device}" if isinstance(device, int) else kind if device is None else device
        return self.to(device, non_blocking=non_blocking, memory_format=memory_format)

    move.__name__, move.__doc__ = kind, f"`.to({kind!r})`, or a given device of that kind."
    return move


def _caster(dtype: torch.dtype) -> Callable[..., Tensor]:
    def cast(self: QuantizedParameter, memory_format: torch.memory_format = _PRESERVE) -> Tensor:
        return self.to(dtype, memory_format=memory_format)

    cast.__doc__ = f"`.to({dtype})`."
    return cast


def sparing_integers(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` is given, without the cast that `nn.Module.type` makes of integers, too."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        cast = not tensor.is_floating_point() and applied.dtype != tensor.dtype
        return tensor.to(applied.device) if cast else applied

    return apply


class QuantizedParameter(CodesParameter):
    """A weight that its first move to a device quantizes.

    Quantized, it keeps its class and its codes through casts to floats, and its scales go where it goes. What views,
    indexes, clones or detaches it gives plain tensors of codes, as for any parameter.

    A kind of weights defines, beside what a CodesParameter has:

    _quantizes: whether the next move to a device quantizes.
    _quantize_on(device): does that, in place, and returns the parameter.
    _with(data, copy): a parameter like this one, on the device of its data; with scales of its own if they are copied.
    _scale_tensors(): what goes where the codes go, by the names of which a module registers `weight_<name>`.
    """

    _quantizes: bool

    def _become(self, other: QuantizedParameter) -> None:
        """Takes the other one's data and what describes them; who holds this parameter keeps it."""
        self.grad = None
        self.requires_grad_(False)
        with codes_as_they_are():  # which may be of another dtype
            self.data = other.data
        vars(self).update(vars(other))

    def _converted(self, fn: Callable[[Tensor], Tensor]) -> QuantizedParameter:
        """What `torch.nn.Module._apply` makes of a parameter: itself, changed in place, or another one where torch
        cannot do that (from and to the meta device)."""
        grad = self.grad
        if self._holds_codes:
            data = fn(self.data.view(torch.uint8)).view(self.dtype)  # integers: casts let them be
        elif (data := fn(self)) is self:
            return self
        new = self
        if torch._has_compatible_shallow_copy_type(self, data):
            self.data = data.data
        else:
            new = self._with(data.data)
        new.grad = None if grad is None else fn(grad)
        return new

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `torch.Tensor.to`, but a float weight that is given a device other than "meta" is quantized, in place
        unless `copy=True`, and returned. Quantizing, and codes, ignore a dtype.

        Raises:
            ValueError: a dtype, values or settings that quantization does not support; nothing has changed.
        """
        device, dtype, non_blocking, copy, memory_format = _parse_to(*args, **kwargs)
        if self._quantizes and device is not None and device.type != "meta":
            return (deepcopy(self) if copy else self)._quantize_on(device)
        moved = super().to(
            device=self.device if device is None else device,
            dtype=self.dtype if dtype is None or self._holds_codes else dtype,
            non_blocking=non_blocking,
            copy=copy,
            memory_format=_PRESERVE if memory_format is None else memory_format,
        )
        return moved if moved is self or moved.grad_fn is not None else self._with(moved, copy)

    def cpu(self, memory_format: torch.memory_format = _PRESERVE) -> Tensor:
        """`.to("cpu")`."""
        return self.to("cpu", memory_format=memory_format)

    cuda, xpu, mtia, ipu, hpu, npu = map(_mover, ("cuda", "xpu", "mtia", "ipu", "hpu", "npu"))
    half, bfloat16, float, double = map(_caster, (torch.float16, torch.bfloat16, torch.float32, torch.float64))

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """As `torch.Tensor.type`; a type of the device that the weight is on only casts."""
        if dtype is None:
            return super().type()
        like = self.new_empty(0, dtype=torch.uint8).type(dtype)
        return self.to(
            device=None if like.device == self.device else like.device, dtype=like.dtype, non_blocking=non_blocking
        )

    def type_as(self, other: Tensor) -> Tensor:
        """As `torch.Tensor.type_as`."""
        return self.type(other.type())

    def share_memory_(self) -> QuantizedParameter:
        """As `torch.Tensor.share_memory_`, for the scales, too."""
        for tensor in self._scale_tensors().values():
            tensor.share_memory_()
        return super().share_memory_()
