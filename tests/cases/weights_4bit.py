"""Quantized weights that the tests of products share."""

import math

import torch
from torch import Tensor

import bnbops.functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.bnbops


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Weight:
    """A quantized weight: an operator's arguments, and its fp32 values."""

    def __init__(self, *shape: int, blocksize: int = 64, quant_type: str = "nf4", nested: bool = False, seed: int = 0):
        self.packed, self.state = F.quantize_4bit(
            normal(*shape, seed=seed) / math.sqrt(shape[-1]),
            blocksize=blocksize,
            compress_statistics=nested,
            quant_type=quant_type,
        )
        self.values = F.dequantize_4bit(self.packed, self.state)
        self.described = (list(shape), blocksize, quant_type)
        self.absmax, self.nested = self.state.absmax, {}
        if nested:
            second = self.state.state2
            self.nested = {
                "nested_absmax": second.absmax,
                "nested_code": second.code,
                "nested_offset": self.state.offset,
            }

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear_4bit(x, self.packed, self.absmax, bias, *self.described, **self.nested)

    def input_grad(self, grad: Tensor) -> Tensor:
        return ops.linear_4bit_input_grad(grad, self.packed, self.absmax, *self.described, **self.nested)

    def grouped(self, x: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.grouped_linear_4bit(x, self.packed, self.absmax, bias, offsets, *self.described, **self.nested)

    def grouped_input_grad(self, grad: Tensor, offsets: Tensor) -> Tensor:
        return ops.grouped_linear_4bit_input_grad(
            grad, self.packed, self.absmax, offsets, *self.described, **self.nested
        )


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype and torch.equal(actual, expected)


def offsets_of(ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)
