"""A sample call of an operator, and the tensors that samples are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Sample:
    """One call of an operator; `name` says what is special about it."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, f: Callable[[Tensor], Tensor]) -> Sample:
        """The same call on `f(tensor)` for every tensor, in lists too."""
        return Sample(self.name, *tree_map_only(Tensor, f, (self.args, self.kwargs)))

    def clone(self) -> Sample:
        """A copy that shares no memory and keeps strides."""
        return self.map(lambda x: copied(x, x.device))

    def run(self, overload: Callable[..., Any]) -> Any:
        """Calls the operator. It may change this sample's tensors; `clone()` first to keep them."""
        return overload(*self.args, **self.kwargs)

    def arguments(self, overload: torch._ops.OpOverload) -> dict[str, Any]:
        """Arguments by their name in the schema; those left to their default are missing."""
        names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def with_out(calls: Sequence[Sample], out_of: Callable[..., Tensor]) -> list[Sample]:
    """The calls with an `out` made of their arguments; the first one also with one that is not contiguous."""
    outs = [(call, call.name, out_of(*call.args)) for call in calls]
    first, _, out = outs[0]
    outs += [(first, "strided out", strided(out)), (first, "transposed out", out.t().contiguous().t())]
    return [Sample(name, call.args, call.kwargs | {"out": out}) for call, name, out in outs]


def copied(x: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides, expanded ones and gaps included."""
    if x.numel() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.detach().as_strided((extent,), (1,)).to(device, copy=True)
    return memory.as_strided(x.shape, x.stride()).requires_grad_(x.requires_grad)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """fp32 values over several decades, so that all of a codebook is used."""
    generator = torch.Generator().manual_seed(seed)
    values, decades = (
        draw(shape, generator=generator, dtype=torch.float32, device="cpu") for draw in (torch.randn, torch.rand)
    )
    return values * 10 ** (-3 * decades)


def integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")


def tensor(values: float | list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """On the CPU: torch's defaults of dtype and device are the user's, who may run the self-check under others."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the CPU, as `tensor`."""
    return torch.full(shape, value, dtype=dtype, device="cpu")


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return integers(0, 256, shape, torch.uint8, seed)


def strided(x: Tensor) -> Tensor:
    """The values of a matrix, every other element of a larger one."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]
