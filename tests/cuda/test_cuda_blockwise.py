"""The CUDA kernels that quantize and dequantize blocks have the bits of the CPU's.

Block sizes sweep what the kernels distinguish: 8 threads, 32, 128 or 256 to a block, and blocks beyond 4096 elements,
which are read twice.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnbops.functional import create_dynamic_map, create_linear_map
from cases import backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = {"signed": create_dynamic_map(), "unsigned": create_dynamic_map(False), "other": create_linear_map()}
ops = torch.ops.bnbops

codes = pytest.mark.parametrize("code", CODES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def cuda() -> dict[str, Callable]:
    return backends.simulated()


def data(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values over many decades, and among them a few of those that are not finite, denormal or zero."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * 10 ** (-5 * torch.rand(n, generator=generator))
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-41, torch.finfo(dtype).max])
    x[3::97] = special[torch.arange(len(x[3::97])) % 7]
    x[500:700] = 0.0
    return x.to(dtype)


def check(cuda: dict[str, Callable], x: Tensor, code: Tensor, blocksize: int, place: Callable = torch.clone) -> None:
    x, code = place(x), place(code)
    expected, absmax = ops.quantize_blockwise(x, code, blocksize)
    actual = cuda["quantize_blockwise"](x, code, blocksize)
    assert torch.equal(actual[0], expected) and torch.equal(actual[1], absmax)
    described = (place(expected), place(absmax), code, blocksize, x.dtype)
    values = ops.dequantize_blockwise(*described)
    out = place(torch.empty_like(x))
    cuda["dequantize_blockwise.out"](*described, out=out)
    assert torch.equal(out, values) and torch.equal(cuda["dequantize_blockwise"](*described), values)


@codes
@dtypes
@pytest.mark.parametrize("blocksize", [1, 7, 32, 64, 100, 256, 500, 1024, 3000, 4096, 5000, 10_000, 2**63 - 1])
def test_blocks(blocksize, dtype, code, cuda):
    for n in (blocksize - 1, blocksize, 2 * blocksize + 9, 9001):
        check(cuda, data(min(n, 9001), dtype), CODES[code], blocksize)


@pytest.mark.parametrize("blocksize", [64, 256, 1024, 4096, 10_000])
def test_the_largest_element_counts_wherever_it_is(blocksize, cuda):
    positions = torch.tensor([*range(0, blocksize, blocksize // 64), blocksize - 1])
    x = torch.ones(len(positions), blocksize)
    x[torch.arange(len(positions)), positions] = -2.0
    _, absmax = cuda["quantize_blockwise"](x, CODES["signed"], blocksize)
    assert torch.equal(absmax, torch.full_like(absmax, 2.0))


@codes
@dtypes
def test_every_length(dtype, code, cuda, guard):
    """With every tail and misalignment, beside guarded memory."""
    for n in range(131):
        check(cuda, data(n, dtype), CODES[code], 64, guard)


@dtypes
def test_every_offset(dtype, cuda):
    x = data(1100, dtype)
    for first in range(17):
        check(cuda, x[first:], CODES["signed"], 256, lambda tensor: tensor)


@dtypes
def test_all_numbers_of_16_bits(dtype, cuda):
    """Every bfloat16 and float16, and the same numbers as fp32, in blocks whose scale is any of them."""
    halves = torch.bfloat16 if dtype == torch.float32 else dtype
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    x = bits[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))].view(halves).to(dtype)
    for code in CODES.values():
        check(cuda, x, code, 32)


@pytest.mark.parametrize("code", ["signed", "unsigned"])
def test_every_step_of_a_dynamic_map(code, cuda):
    """The kernels look codes up in buckets of |x| + 2^-31: both sides of every bucket's edge, some numbers within, and
    what surrounds the middle between two entries, where the code changes."""
    magnitudes = CODES[code][CODES[code] >= 0]
    middles = ((magnitudes[1:] + magnitudes[:-1]) / 2).view(torch.int32)
    around = middles[:, None] + torch.arange(-40, 41, dtype=torch.int32)
    smallest, one = torch.tensor([2.0**-31, 1.0]).view(torch.int32).tolist()
    edges = torch.arange(smallest, one + 1, 1 << 16, dtype=torch.int32).view(torch.float32) - 2**-31
    beside = edges.view(torch.int32)[1:, None] + torch.arange(-2, 3, dtype=torch.int32)
    within = torch.arange(smallest, one + 1, 9973, dtype=torch.int32)
    x = torch.cat([bits.flatten() for bits in (around, beside, within)]).view(torch.float32).clamp(max=1.0)
    x = torch.cat([x, -x]) if code == "signed" else x
    assert x.abs().max() == 1.0  # the scale
    check(cuda, x, CODES[code], len(x))


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
def test_order_of_threads_changes_no_bit(order, cuda, monkeypatch):
    monkeypatch.setenv("CUSIM_ORDER", order)
    for blocksize in (64, 256, 1024, 4096, 6000):
        check(cuda, data(20_011), CODES["signed"], blocksize)
