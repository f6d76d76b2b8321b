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
