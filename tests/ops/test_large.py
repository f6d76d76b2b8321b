"""Sizes beyond 2**31 elements: indices are 64-bit throughout."""

import torch

import bnbops.functional as F


def test_dequantize_more_than_2_to_the_31_elements():
    count, blocksize = 2**31 + 300, 2**20
    code = F.create_dynamic_map()
    codes = torch.zeros(count, dtype=torch.uint8)  # pages that are never written cost no memory
    absmax = torch.zeros(-(count // -blocksize))
    spots = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 1, count - 1])
    codes[spots] = torch.tensor([255, 254, 128, 200, 255], dtype=torch.uint8)
    absmax[spots // blocksize] = torch.tensor([2.0, 3.0, 5.0, 5.0, 5.0])

    values = torch.ops.bnbops.dequantize_blockwise(codes, absmax, code, blocksize, torch.float16)

    expected = code[codes[spots].long()] * absmax[spots // blocksize]
    assert torch.equal(values[spots], expected.half())
    last_block = codes[2**31 :]
    assert torch.equal(values[2**31 :], (code[last_block.long()] * 5.0).half())


def test_quantize_4bit_more_than_2_to_the_31_elements():
    count, blocksize = 2**31 + 301, 4096
    x = torch.zeros(count, dtype=torch.float16)
    x[2**31 - 2 :] = torch.linspace(-3, 3, 303).half()
    packed, absmax = torch.ops.bnbops.quantize_4bit(x, blocksize, "nf4", torch.uint8)
    start = 2**31 - blocksize
    expected, scales = torch.ops.bnbops.quantize_4bit(x[start:], blocksize, "nf4", torch.uint8)
    assert torch.equal(packed[start // 2 :], expected) and torch.equal(absmax[-2:], scales)
    assert packed.shape == ((count + 1) // 2, 1) and (packed[:1000] == 0x77).all() and not absmax[:-2].any()

    values = torch.ops.bnbops.dequantize_4bit(packed, absmax, blocksize, "nf4", [count], torch.float16)
    tail = torch.ops.bnbops.dequantize_4bit(expected, scales, blocksize, "nf4", [count - start], torch.float16)
    assert torch.equal(values[start:], tail) and not values[:1000].any()


def test_4bit_tables_and_experts_of_more_than_2_to_the_31_elements():
    """Only the last row, or expert, is looked at."""
    rows, dim = 2**21 + 3, 1024
    x = torch.randn(64, dim, generator=torch.Generator().manual_seed(0))
    own, own_absmax = torch.ops.bnbops.quantize_4bit(x, 1024, "nf4", torch.uint8)
    packed, absmax = torch.zeros(rows * dim // 2, dtype=torch.uint8), torch.zeros(rows)
    packed[-own.numel() :], absmax[-64:] = own.view(-1), own_absmax
    expected = torch.ops.bnbops.dequantize_4bit(own, own_absmax, 1024, "nf4", [64, dim], torch.float32)
    indices = torch.arange(rows - 64, rows)
    table = torch.ops.bnbops.embedding_4bit(indices, packed, absmax, [rows, dim], 1024, "nf4", torch.float32)
    assert torch.equal(table, expected)

    experts = (rows - 3) // 64  # all experts but three rows at the beginning
    packed, absmax = packed[3 * dim // 2 :], absmax[3:]
    offsets = torch.zeros(experts, dtype=torch.int32)
    offsets[-1] = 5
    args = (packed, absmax, None, offsets, [experts, 64, dim], 1024, "nf4")
    alone = (own, own_absmax, None, [64, dim], 1024, "nf4")
    y = torch.ops.bnbops.grouped_linear_4bit(x[:5], *args)
    assert torch.equal(y, torch.ops.bnbops.linear_4bit(x[:5], *alone))
