"""What the tests of 4-bit quantization share."""

import pytest
import torch
from torch import Tensor

from bnbops.facts import FORMATS
from reference import quantize as ref8
from reference import quantize_4bit as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = [*FORMATS]

quantize, dequantize = torch.ops.bnbops.quantize_4bit, torch.ops.bnbops.dequantize_4bit
types = pytest.mark.parametrize("quant_type", TYPES)
SIZES = [(name, size) for name, format in FORMATS.items() for size in format.blocks]
sizes = pytest.mark.parametrize(("quant_type", "blocksize"), SIZES)
SOME_SIZES = [(name, size) for name, size in SIZES if name == "nf4" or size in FORMATS[name].blocks[:2]]
some_sizes = pytest.mark.parametrize(("quant_type", "blocksize"), SOME_SIZES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values over a few decades, so that all codes are used."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (-2 * torch.rand(shape, generator=generator))
    return x.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of zeros with different signs and of packed codes that look like NaNs."""
    x, y = (tensor.reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(x, y)


def check(x: Tensor, blocksize: int, quant_type: str, packed: Tensor, absmax: Tensor) -> None:
    """`packed`, `absmax` are the reference's, bit for bit, and each value is the nearest (in float64)."""
    expected, expected_absmax = ref.quantize(x, blocksize, quant_type, packed.dtype)
    assert torch.equal(absmax, expected_absmax)
    assert same_bits(packed, expected) and packed.is_contiguous()
    code, scaled = ref.TABLES[quant_type].double(), ref8.normalised(x, min(blocksize, max(x.numel(), 1))).flatten()
    error = (scaled - code[ref.unpack(packed, x.numel(), quant_type).long()]).abs()
    nearest = (scaled[:, None] - code).abs().amin(dim=1)
    small = ref.spread(absmax, blocksize, x.numel()) < 2**-126  # 1 / absmax is not finite
    assert ((error - nearest <= 2**-22 * scaled.abs()) | small).all()
