"""The CUDA kernels that quantize, dequantize and look up 4-bit weights have the bits of the CPU's."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bnbops.functional as F
from cases import backends
from cases.quantize_4bit import DTYPES, SOME_SIZES, data, dtypes, same_bits, sizes, types
from reference import quantize_4bit as ref

ops = torch.ops.bnbops


@pytest.fixture(scope="module")
def cuda() -> dict[str, Callable]:
    return backends.simulated()


def spoiled(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Data among which some are not finite, denormal or zero, and a few blocks of zeros."""
    x = data(n, seed=n)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-41, torch.finfo(dtype).max])
    x[3::97] = special[torch.arange(len(x[3::97])) % 7]
    x[500:700] = 0.0
    return x.to(dtype)


def nested_scales(absmax: Tensor, blocksize: int) -> tuple[Tensor, dict[str, object]]:
    """The codes of quantized scales, and what decodes them."""
    offset = absmax.nan_to_num(posinf=1.0).mean()
    codes, state = F.quantize_blockwise(absmax - offset, blocksize=blocksize)
    names = ("nested_absmax", "nested_code", "nested_offset", "nested_blocksize")
    return codes, dict(zip(names, (state.absmax, state.code, offset, blocksize), strict=True))


def check(cuda: dict[str, Callable], x: Tensor, blocksize: int, quant_type: str, place: Callable = torch.clone) -> None:
    """There, and back to every dtype, with plain and with nested scales."""
    x = place(x)
    packed, absmax = ops.quantize_4bit(x, blocksize, quant_type, torch.uint8)
    assert all(map(same_bits, cuda["quantize_4bit"](x, blocksize, quant_type, torch.uint8), (packed, absmax)))
    packed, (codes, nested) = place(packed), nested_scales(absmax, 7)
    for scales, options in ((place(absmax), {}), (place(codes), nested)):
        described = (packed, scales, blocksize, quant_type, [x.numel()], x.dtype)
        expected = ops.dequantize_4bit(*described, **options)
        out = place(torch.empty_like(x))
        cuda["dequantize_4bit.out"](*described, **options, out=out)
        assert same_bits(out, expected)
        assert same_bits(cuda["dequantize_4bit"](*described, **options), expected)


@sizes
@dtypes
def test_blocks(blocksize, dtype, quant_type, cuda):
    for n in (blocksize - 1, blocksize, 2 * blocksize + 9, 9001):
        check(cuda, spoiled(n, dtype), blocksize, quant_type)


@types
@dtypes
def test_every_length(dtype, quant_type, cuda, guard):
    """With every tail and misalignment, beside guarded memory."""
    for n in range(131):
        check(cuda, spoiled(n, dtype), 64, quant_type, guard)


@types
@dtypes
def test_every_offset(dtype, quant_type, cuda):
    x = spoiled(1100, dtype)
    for first in range(17):
        check(cuda, x[first:], 256, quant_type, lambda tensor: tensor)


@types
@dtypes
def test_all_numbers_of_16_bits(dtype, quant_type, cuda):
    """Every bfloat16 and float16, and the same numbers as fp32, in blocks whose scale is any of them."""
    halves = torch.bfloat16 if dtype == torch.float32 else dtype
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    x = bits[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))].view(halves).to(dtype)
    check(cuda, x, 32, quant_type)


@pytest.mark.parametrize("storage", ref.STORAGE_DTYPES, ids=str)
def test_storages(storage, cuda, guard):
    x = spoiled(1000)
    packed, absmax = ops.quantize_4bit(x, 64, "nf4", storage)
    assert all(map(same_bits, cuda["quantize_4bit"](x, 64, "nf4", storage), (packed, absmax)))
    described = (guard(packed), absmax, 64, "nf4", [8, 125], torch.float32)
    assert torch.equal(cuda["dequantize_4bit"](*described), ops.dequantize_4bit(*described))


# ---- look-up ---------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 12, 31, 33, 64, 96, 200, 511, 512, 520, 777, 1024, 1040])
def test_rows(width, nested, dtype, cuda, guard):
    """Rows that begin within blocks and bytes, and that one or more warps share."""
    x, indices = data(9, width, seed=width), torch.tensor([[8, 0, 3], [3, 1, 7]])
    for blocksize, quant_type in ((32, "nf4"), (256, "fp4")):
        packed, absmax = ops.quantize_4bit(x, blocksize, quant_type, torch.uint8)
        scales, options = nested_scales(absmax, 7) if nested else (absmax, {})
        described = (guard(packed), guard(scales), [9, width], blocksize, quant_type, dtype)
        for i in (indices, indices.int(), indices.t(), indices[0, 0], indices[:0]):
            rows = cuda["embedding_4bit"](i, *described, **options)
            assert same_bits(rows, ops.embedding_4bit(i, *described, **options))


@pytest.mark.parametrize("index", [9, -1, 1 << 40, -(1 << 62)])
def test_an_index_out_of_range_stops_the_device(index, cuda, capfd):
    """As with torch's embedding: a failed assertion, before anything is read for it. Here it ends a process."""
    packed, absmax = ops.quantize_4bit(torch.ones(9, 64), 64, "nf4", torch.uint8)
    child = os.fork()
    if child == 0:
        try:
            cuda["embedding_4bit"](torch.tensor([0, 8, index]), packed, absmax, [9, 64], 64, "nf4", torch.float32)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert "bnbops::embedding_4bit: an index is out of range" in capfd.readouterr().err


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1", "random:2"])
def test_order_of_threads_changes_no_bit(order, cuda, monkeypatch):
    monkeypatch.setenv("CUSIM_ORDER", order)
    for (quant_type, blocksize), dtype in zip(SOME_SIZES, 5 * DTYPES, strict=False):
        check(cuda, spoiled(20_011, dtype), blocksize, quant_type)
    packed, absmax = ops.quantize_4bit(data(50, 700), 64, "nf4", torch.uint8)
    look_up = (torch.arange(49, -1, -1), packed, absmax, [50, 700], 64, "nf4", torch.bfloat16)
    assert torch.equal(cuda["embedding_4bit"](*look_up), ops.embedding_4bit(*look_up))
