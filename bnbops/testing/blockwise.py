"""The blockwise operators: sample calls, and what they give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnbops.codebooks import create_dynamic_map, create_linear_map
from bnbops.facts import FLOATS, name_of
from bnbops.testing.expect import Arguments, Checked, exactly, expect, expect_encoded
from bnbops.testing.references.blockwise import decode
from bnbops.testing.sample import Sample, full, normal, random_codes, strided, tensor, with_out


def _quantize() -> list[Sample]:
    x = normal(5, 301)
    signed, unsigned, linear = create_dynamic_map(), create_dynamic_map(signed=False), create_linear_map()
    special = tensor([math.nan, 1.0, -0.0, 0.0] + [0.0] * 4 + [math.inf, -1.0, math.nan, 0.0])
    return [
        *(Sample(name_of(dtype), (x.to(dtype), signed, 64)) for dtype in FLOATS),
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
    grad = absmax.clone().requires_grad_()
    return [
        *(Sample(f"to {name_of(dtype)}", (codes, absmax, code, 64, dtype)) for dtype in FLOATS),
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
        Sample("absmax and code require grad", (codes, grad, code.clone().requires_grad_(), 64, torch.float32)),
        Sample("absmax requires grad, bfloat16", (codes, grad, code, 64, torch.bfloat16)),
    ]


def _dequantize_out() -> list[Sample]:
    calls = [sample for sample in _dequantize() if "grad" not in sample.name]  # out= is not differentiable
    return with_out(calls, lambda codes, absmax, code, blocksize, dtype: full(codes.shape, -1.0, dtype))


def _expect_quantized(a: Arguments, result: tuple[Tensor, Tensor]) -> None:
    codes, absmax = result
    expect(codes.shape == a.A.shape and codes.dtype == torch.uint8, "codes of the wrong shape or dtype")
    exact = torch.zeros_like(a.A, dtype=torch.float64)
    expect_encoded(codes, absmax, a.A, exact, a.code, "codes", size=a.blocksize)


_decoded = exactly(lambda a: decode(a.A, a.absmax.flatten(), a.code, a.blocksize).to(a.dtype))
OPERATORS: dict[str, Checked] = {
    "quantize_blockwise": (_quantize, _expect_quantized),
    "dequantize_blockwise": (_dequantize, _decoded),
    "dequantize_blockwise.out": (_dequantize_out, _decoded),
}
