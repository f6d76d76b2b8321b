"""8-bit block-wise quantization with bitsandbytes' names and signatures, over `torch.ops.bnbops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbops.codebooks import create_dynamic_map
from bnbops.facts import FLOATS
from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting

with lasting():
    _DEFAULT_MAP = create_dynamic_map()  # made at import: under a tracer it would be a fake tensor


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor to 8 bits in blocks of `blocksize` elements, each scaled by its largest magnitude.

    An element becomes the index of the codebook's nearest entry to `x / absmax`. Infinities saturate; a NaN becomes
    the entry nearest to zero and does not count towards absmax.

    Args:
        A: fp32, bf16 or fp16 tensor of any shape.
        code: fp32 codebook, 256 values in ascending order; the signed dynamic map by default.
        absmax: fp32 tensor to copy the scales into, `[ceil(A.numel() / blocksize)]`.
        out: uint8 tensor of A's shape to copy the codes into.
        blocksize: elements that share a scale.
        nested: quantize the scales, too (less their mean, with the default codebook).

    Returns:
        uint8 codes of A's shape, and what `dequantize_blockwise` needs to undo it.

    Raises:
        ValueError: a dtype or blocksize that is not supported.
        RuntimeError: a codebook, absmax or out of wrong shape or dtype.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section 2.1.
    """
    if A.dtype not in FLOATS:
        raise ValueError(f"quantize_blockwise takes float32, bfloat16 or float16 tensors, got {A.dtype}")
    if blocksize <= 0:
        raise ValueError(f"blocksize must be positive, got {blocksize}")
    code = (_DEFAULT_MAP if code is None else code).to(A.device)
    codes, scales = torch.ops.bnbops.quantize_blockwise(A, code, blocksize)
    # A copy of the codebook: the state is the caller's, who may change it.
    described = {"code": code.clone(), "blocksize": blocksize, "dtype": A.dtype}
    return returned(codes, scales, out, absmax, blocksize if nested else None, **described)


def returned(
    codes: Tensor,
    scales: Tensor,
    out: Tensor | None,
    absmax: Tensor | None,
    nested_blocksize: int | None,
    **described: Any,
) -> tuple[Tensor, QuantState]:
    """What a quantization returns: codes and scales, copied to `out` and `absmax` where these are given. The scales are
    quantized, too, if there is a `nested_blocksize`."""
    offset = state2 = None
    if nested_blocksize is not None:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=nested_blocksize)
    codes = codes if out is None else out.copy_(codes)
    scales = scales if absmax is None else absmax.copy_(scales)
    return codes, QuantState(scales, offset=offset, state2=state2, **described)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Undoes `quantize_blockwise`: `code[A] * absmax[block]` in fp32, rounded to the state's dtype.

    Args:
        A: uint8 codes.
        quant_state: what `quantize_blockwise` returned; or else
        absmax: fp32 scales, one a block, with
        code: fp32 codebook of 256 values, the signed dynamic map by default, and
        blocksize: elements that share a scale. The result then is fp32.
        out: tensor of A's shape and the state's dtype to write to.
        nested: unused; the state knows.

    Returns:
        Tensor of A's shape (`out`, if given).

    Raises:
        ValueError: neither a state nor scales given, or a blocksize or dtype that is not supported.
        RuntimeError: scales, codebook or out of wrong shape or dtype.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise needs a quant_state or an absmax")
        code = _DEFAULT_MAP if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if not quant_state.blocksize or quant_state.blocksize < 0:
        raise ValueError(f"blocksize must be positive, got {quant_state.blocksize}")
    if quant_state.code is None:
        raise ValueError("dequantize_blockwise needs a quant_state with a codebook, but its code is None")
    scales = quant_state.absmax
    if quant_state.nested:
        assert quant_state.offset is not None
        scales = dequantize_blockwise(scales, quant_state.state2) + quant_state.offset
    args = (A, scales.float(), quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype)
    if out is None:
        return torch.ops.bnbops.dequantize_blockwise(*args)
    torch.ops.bnbops.dequantize_blockwise.out(*args, out=out)
    return out
