"""Fakes of quantize_blockwise and dequantize_blockwise."""

from __future__ import annotations

import torch

from bnbops.codebooks import ENTRIES

from . import checks as C
from .checks import blocks, fake, row

_code = row("code", C.float32, C.device, C.contiguous, C.shape(lambda a: [ENTRIES]))
_blocksize = row("blocksize", C.positive)
_scales = C.one_for_each_block(lambda a: a.A.numel(), "blocksize", "{numel} codes in blocks of {size} need {needed}")
_absmax = row("absmax", C.float32, C.device, _scales)
_dequantize = (row("A", C.uint8), _code, _blocksize, _absmax, row("dtype", C.floats))
_shape = C.must(lambda a, x: x.shape == a.A.shape, "has shape {shape}, but A has {shapes[A]}")

fake(
    "quantize_blockwise",
    row("A", C.floats),
    _code,
    _blocksize,
    result=lambda a: (
        a.A.new_empty(a.A.shape, dtype=torch.uint8),
        a.A.new_empty((blocks(a.A.numel(), a.blocksize),), dtype=torch.float32),
    ),
)
fake("dequantize_blockwise", *_dequantize, result=lambda a: a.A.new_empty(a.A.shape, dtype=a.dtype))
fake("dequantize_blockwise.out", *_dequantize, row("out", C.dtype_of("dtype"), C.device, _shape, C.not_expanded))
