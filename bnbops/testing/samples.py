"""Sample inputs of every operator: what `python -m bnbops` runs and what the tests feed to `torch.library.opcheck`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnbops._library import operator
from bnbops.codebooks import create_dynamic_map, create_linear_map
from bnbops.testing.sample import DTYPES, Sample, copied, full, normal, random_codes, strided, tensor
from bnbops.testing.samples_4bit import BUILDERS_4BIT
from bnbops.testing.samples_int8 import BUILDERS as BUILDERS_INT8
from bnbops.testing.samples_optimizer import BUILDERS as BUILDERS_OPTIMIZER

__all__ = ["SAMPLED", "Sample", "operator", "samples"]


def samples(name: str, device: torch.device | str = "cpu") -> list[Sample]:
    """Samples of the operator called "op" or "op.overload", in memory of their own, but for `options` on the device."""
    found = []
    for sample in _BUILDERS[name]():
        on_device = sample.map(lambda x: copied(x, torch.device(device)))
        held = {key: x.clone() for key, x in sample.kwargs.items() if key == "options"}
        found.append(replace(on_device, kwargs=on_device.kwargs | held))
    return found


# ---- isa, isas, facts ----------------------------------------------------------------------------------------------


def _without_arguments() -> list[Sample]:
    return [Sample("no arguments")]


# ---- quantize_blockwise, dequantize_blockwise ------------------------------------------------------------------


def _quantize() -> list[Sample]:
    x = normal(5, 301)
    signed, unsigned, linear = create_dynamic_map(), create_dynamic_map(signed=False), create_linear_map()
    special = tensor([math.nan, 1.0, -0.0, 0.0] + [0.0] * 4 + [math.inf, -1.0, math.nan, 0.0])
    return [
        *(Sample(f"{dtype}".removeprefix("torch."), (x.to(dtype), signed, 64)) for dtype in DTYPES),
        Sample("unsigned dynamic map", (x.abs(), unsigned, 256)),
        Sample("linear map", (x, linear, 128)),
        Sample("linear map, bfloat16", (x.bfloat16(), linear, 100)),
        Sample("two blocks", (x, signed, 1024)),
        Sample("one block", (x, signed, 4096)),
        Sample("blocks of one", (x, signed, 1)),
        Sample("transposed", (x.t(), signed, 64)),
        Sample("strided", (strided(x), linear, 64)),
        Sample("expanded", (tensor([[0.5], [-2.0]]).expand(2, 33), signed, 16)),
        Sample("channels last", (normal(2, 3, 5, 7).to(memory_format=torch.channels_last), signed, 64)),
        Sample("scalar", (tensor(-3.0), signed, 64)),
        Sample("empty", (full((0,), 0.0), signed, 64)),
        Sample("empty rows", (full((3, 0), 0.0), signed, 64)),
        Sample("zeros", (full((2, 70), 0.0), signed, 64)),
        Sample("nan, infinity and zeros", (special, signed, 4)),
        Sample("requires grad", (x.clone().requires_grad_(), signed, 64)),
    ]


def _dequantize() -> list[Sample]:
    codes, code = random_codes(5, 301), create_dynamic_map()
    absmax = normal(24).abs()  # ceil(5 * 301 / 64)
    return [
        *(Sample(f"to {dtype}".replace("torch.", ""), (codes, absmax, code, 64, dtype)) for dtype in DTYPES),
        Sample("linear map", (codes, absmax[:6], create_linear_map(), 256, torch.float32)),
        Sample("blocks of 100", (codes, absmax[:16], code, 100, torch.float16)),
        Sample("two blocks", (codes, absmax[:2], code, 1024, torch.bfloat16)),
        Sample("one block", (codes, absmax[:1], code, 4096, torch.bfloat16)),
        Sample("absmax as a matrix", (codes, absmax.view(4, 6), code, 64, torch.float32)),
        Sample("strided absmax", (codes, strided(absmax), code, 64, torch.float32)),
        Sample("transposed", (codes.t(), absmax, code, 64, torch.float32)),
        Sample("strided", (strided(codes), absmax, code, 64, torch.bfloat16)),
        Sample("scalar", (tensor(200, torch.uint8), absmax[:1], code, 64, torch.float32)),
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
        calls.append(Sample(sample.name, sample.args, {"out": full(codes.shape, -1.0, dtype=dtype)}))
    strided = {"strided out": full((5, 602), -1.0)[:, ::2], "transposed out": full((301, 5), -1.0).t()}
    return calls + [Sample(name, calls[0].args, {"out": out}) for name, out in strided.items()]


_BUILDERS: dict[str, Callable[[], list[Sample]]] = {
    "isa": _without_arguments,
    "isas": _without_arguments,
    "facts": _without_arguments,
    "quantize_blockwise": _quantize,
    "dequantize_blockwise": _dequantize,
    "dequantize_blockwise.out": _dequantize_out,
    **BUILDERS_OPTIMIZER,
    **BUILDERS_4BIT,
    **BUILDERS_INT8,
}
SAMPLED = tuple(sorted(_BUILDERS))
"""The operators that have samples: all of them, as a test makes sure."""
