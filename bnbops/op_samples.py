"""Sample inputs of every operator: what `python -m bnbops` runs and what the tests feed to `torch.library.opcheck`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bnbops.codebooks import create_dynamic_map, create_linear_map

__all__ = ["SAMPLED", "Sample", "operator", "samples", "step_states"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 256  # of optimizer states


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
        return self.map(lambda x: _copy(x, x.device))

    def run(self, overload: Callable[..., Any]) -> Any:
        """Calls the operator. It may change this sample's tensors; `clone()` first to keep them."""
        return overload(*self.args, **self.kwargs)

    def arguments(self, overload: torch._ops.OpOverload) -> dict[str, Any]:
        """Arguments by their name in the schema; those left to their default are missing."""
        names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
        return dict(zip(names, self.args, strict=False)) | self.kwargs


def samples(name: str, device: torch.device | str = "cpu") -> list[Sample]:
    """Samples of the operator called "op" or "op.overload", in memory of their own."""
    return [sample.map(lambda x: _copy(x, torch.device(device))) for sample in _BUILDERS[name]()]


def operator(name: str) -> torch._ops.OpOverload:
    """The overload of `torch.ops.bnbops` called "op" or "op.overload"."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bnbops, packet), overload or "default")


def step_states(name: str) -> list[str]:
    """The states of an optimizer operator: its schema has a list of scales for each."""
    arguments = operator(name)._schema.arguments
    return [a.name.removesuffix("_absmax") for a in arguments if a.name.endswith("_absmax")]


def _copy(x: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides, expanded ones and gaps included."""
    if x.numel() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.detach().as_strided((extent,), (1,)).to(device, copy=True)
    return memory.as_strided(x.shape, x.stride()).requires_grad_(x.requires_grad)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    """fp32 values over several decades, so that all of a codebook is used."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** (-3 * torch.rand(shape, generator=generator))


def _codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def _strided(x: Tensor) -> Tensor:
    """The values of a matrix, every other element of a larger one."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


# ---- isa, step_ops -------------------------------------------------------------------------------------------------


def _without_arguments() -> list[Sample]:
    return [Sample("no arguments")]


# ---- quantize_blockwise, dequantize_blockwise ------------------------------------------------------------------


def _quantize() -> list[Sample]:
    x = _normal(5, 301)
    signed, unsigned, linear = create_dynamic_map(), create_dynamic_map(signed=False), create_linear_map()
    special = torch.tensor([math.nan, 1.0, -0.0, 0.0] + [0.0] * 4 + [math.inf, -1.0, math.nan, 0.0])
    return [
        *(Sample(f"{dtype}".removeprefix("torch."), (x.to(dtype), signed, 64)) for dtype in _DTYPES),
        Sample("unsigned dynamic map", (x.abs(), unsigned, 256)),
        Sample("linear map", (x, linear, 128)),
        Sample("linear map, bfloat16", (x.bfloat16(), linear, 100)),
        Sample("one block", (x, signed, 4096)),
        Sample("blocks of one", (x, signed, 1)),
        Sample("transposed", (x.t(), signed, 64)),
        Sample("strided", (_strided(x), linear, 64)),
        Sample("expanded", (torch.tensor([[0.5], [-2.0]]).expand(2, 33), signed, 16)),
        Sample("channels last", (_normal(2, 3, 5, 7).to(memory_format=torch.channels_last), signed, 64)),
        Sample("scalar", (torch.tensor(-3.0), signed, 64)),
        Sample("empty", (torch.empty(0), signed, 64)),
        Sample("empty rows", (torch.empty(3, 0), signed, 64)),
        Sample("zeros", (torch.zeros(2, 70), signed, 64)),
        Sample("nan, infinity and zeros", (special, signed, 4)),
        Sample("requires grad", (x.clone().requires_grad_(), signed, 64)),
    ]


def _dequantize() -> list[Sample]:
    codes, code = _codes(5, 301), create_dynamic_map()
    absmax = _normal(24).abs()  # ceil(5 * 301 / 64)
    return [
        *(Sample(f"to {dtype}".replace("torch.", ""), (codes, absmax, code, 64, dtype)) for dtype in _DTYPES),
        Sample("linear map", (codes, absmax[:6], create_linear_map(), 256, torch.float32)),
        Sample("blocks of 100", (codes, absmax[:16], code, 100, torch.float16)),
        Sample("one block", (codes, absmax[:1], code, 4096, torch.bfloat16)),
        Sample("absmax as a matrix", (codes, absmax.view(4, 6), code, 64, torch.float32)),
        Sample("strided absmax", (codes, _strided(absmax), code, 64, torch.float32)),
        Sample("transposed", (codes.t(), absmax, code, 64, torch.float32)),
        Sample("strided", (_strided(codes), absmax, code, 64, torch.bfloat16)),
        Sample("scalar", (torch.tensor(200, dtype=torch.uint8), absmax[:1], code, 64, torch.float32)),
        Sample("empty", (codes[:0], absmax[:0], code, 64, torch.float32)),
        Sample("absmax and code require grad", _differentiable(codes, absmax, code, torch.float32)),
        Sample("absmax requires grad, bfloat16", _differentiable(codes, absmax, code, torch.bfloat16)),
    ]


def _differentiable(codes: Tensor, absmax: Tensor, code: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    return codes, absmax.clone().requires_grad_(), code.clone().requires_grad_(dtype == torch.float32), 64, dtype


def _dequantize_out() -> list[Sample]:
    """The samples of dequantize_blockwise with an `out`, contiguous and not."""
    calls = []
    for sample in _dequantize():
        if "grad" in sample.name:  # out= is not differentiable
            continue
        codes, *_, dtype = sample.args
        calls.append(Sample(sample.name, sample.args, {"out": torch.full(codes.shape, -1.0, dtype=dtype)}))
    strided = {"strided out": torch.full((5, 602), -1.0)[:, ::2], "transposed out": torch.full((301, 5), -1.0).t()}
    return calls + [Sample(name, calls[0].args, {"out": out}) for name, out in strided.items()]


# ---- optimizer steps -------------------------------------------------------------------------------------------

_OPTIONS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
_SHAPES = ((3, 300), (70,))


def _step(name: str) -> list[Sample]:
    """Made from the schema alone, so that a new optimizer gets its samples with its schema."""

    def sample(
        what: str,
        bits: int,
        layout: str = "rows",
        *,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
        shapes: tuple[tuple[int, ...], ...] = _SHAPES,
        grad: Callable[[Tensor], Tensor] = lambda g: g,
        **scalars: Any,
    ) -> Sample:
        params = [_normal(*shape, seed=1).to(dtype) for shape in shapes]
        grads = [grad(_normal(*shape, seed=2).to(grad_dtype or dtype)) for shape in shapes]
        states, absmax = [], []
        for k in range(len(step_states(name))):
            states.append([_state(shape, bits, seed=3 + k) for shape in shapes])
            absmax.append([_scales(shape, layout, seed=3 + k) for shape in shapes] if bits == 8 else [])
        steps = [torch.tensor(float(3 * i)) for i in range(len(shapes))]
        names = {argument.name for argument in operator(name)._schema.arguments}
        options = {key: value for key, value in _OPTIONS.items() if key in names}
        kwargs = {"lr": torch.tensor(0.1, dtype=torch.float64), **options, **scalars}
        return Sample(what, (params, grads, *states, *absmax, steps), kwargs)

    low, one, overflow = torch.bfloat16, torch.ones(1), torch.tensor(1.0)
    return [
        *(sample(f"float32 states, {dtype}".replace("torch.", ""), 32, dtype=dtype) for dtype in _DTYPES),
        *(sample(f"8-bit states in rows, {dtype}".replace("torch.", ""), 8, dtype=dtype) for dtype in _DTYPES),
        *(sample(f"flat 8-bit states, {dtype}".replace("torch.", ""), 8, "flat", dtype=dtype) for dtype in _DTYPES),
        sample("float32 states, float32 gradients", 32, dtype=low, grad_dtype=torch.float32),
        sample("8-bit states, float32 gradients", 8, dtype=low, grad_dtype=torch.float32),
        sample("three dimensions", 8, shapes=((2, 3, 90),)),
        sample("strided gradients", 8, grad=_strided),
        sample("expanded gradients", 32, grad=lambda g: g.flatten()[0].expand(g.shape)),
        sample("transposed gradients", 8, shapes=((30, 40),), grad=lambda g: g.t().contiguous().t()),
        sample("non-finite gradient elements", 8, grad=_with_non_finite),
        sample("maximize", 8, maximize=True),
        sample("float32 lr, scaled gradients", 32, lr=torch.tensor([0.1]), grad_scale=4 * one, found_inf=0 * one),
        sample("8-bit states, scaled gradients", 8, maximize=True, grad_scale=4 * overflow, found_inf=0 * overflow),
        sample("overflow found", 8, grad_scale=4 * one, found_inf=overflow),
        sample("no parameters", 8, shapes=()),
        sample("empty parameters", 8, shapes=((0,), (0, 5), (3, 0))),
        sample("empty parameters, float32 states", 32, shapes=((0,), (2, 2), (3, 0))),
        sample("scalar parameter", 32, shapes=((),)),
        sample("flat scalar parameter", 8, "flat", shapes=((), (1,))),
    ]


def _state(shape: tuple[int, ...], bits: int, seed: int) -> Tensor:
    return _codes(*shape, seed=seed) if bits == 8 else 0.1 * _normal(*shape, seed=seed).square()


def _scales(shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    if layout == "flat":
        return 0.1 * _normal(-(math.prod(shape) // -_BLOCK), seed=seed).abs()
    return 0.1 * _normal(shape[0], -(math.prod(shape[1:]) // -_BLOCK), seed=seed).abs()


def _with_non_finite(grad: Tensor) -> Tensor:
    for start, value in enumerate((math.nan, math.inf, -math.inf)):
        grad.view(-1)[start::7] = value
    return grad


_BUILDERS: dict[str, Callable[[], list[Sample]]] = {
    "isa": _without_arguments,
    "step_ops": _without_arguments,
    "quantize_blockwise": _quantize,
    "dequantize_blockwise": _dequantize,
    "dequantize_blockwise.out": _dequantize_out,
    **{name: partial(_step, name) for name in torch.ops.bnbops.step_ops()},
}
SAMPLED = tuple(sorted(_BUILDERS))
"""The operators that have samples: all of them, as a test makes sure."""
