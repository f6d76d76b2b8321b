"""4-bit quantization, and products, with bitsandbytes' names and signatures, over `torch.ops.bnbops`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnbops.eager import call
from bnbops.facts import FLOATS, FORMATS, in_words
from bnbops.functional.blockwise import returned
from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting
from bnbops.tracing import is_compiling

_T = TypeVar("_T")
_BLOCKSIZE = 64  # by default
# What no weight can be in, but `get_4bit_type` knows. AF4: the quantiles that minimize the expected absolute error in
# blocks of 64.
_OTHER_TYPES = {
    "af4": [
        *(1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164),
        *(0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0),
    ],
}
with lasting():  # at import: no tracer sees the making
    _MAPS = {
        name: torch.tensor(values, dtype=torch.float32, device="cpu")
        for name, values in (_OTHER_TYPES | {format.name: format.values for format in FORMATS.values()}).items()
    }


def _check(function: str, dtype: torch.dtype | None, blocksize: int | None, quant_type: str | None) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{function} takes float32, bfloat16 or float16 tensors, got {dtype}")
    if quant_type is None or quant_type not in FORMATS:
        raise ValueError(f"quant_type must be {in_words(FORMATS)}, got {quant_type!r}")
    if blocksize not in (blocks := FORMATS[quant_type].blocks):
        raise ValueError(f"blocksize must be one of {', '.join(map(str, blocks))}; got {blocksize}")


def in_own_order(packed: Tensor) -> tuple[Tensor, bool]:
    """The packed weight in its own order, and whether it came as the transpose of one."""
    if packed.dim() == 2:
        if not packed.is_contiguous() and packed.t().is_contiguous():
            return packed.t(), True
        if packed.shape[0] == 1 and packed.shape[1] > 1:
            return packed, True
    return packed.contiguous(), False


def weight_arguments(state: QuantState) -> dict[str, Any]:
    """What the 4-bit operators take beside the codes."""
    described = {"shape": list(state.shape or ()), "blocksize": state.blocksize, "quant_type": state.quant_type}
    if (second := state.state2) is None:
        return described | {"absmax": state.absmax.float()}
    assert state.offset is not None
    return described | {
        "absmax": state.absmax,
        "nested_absmax": second.absmax.float(),
        "nested_code": second.code,
        "nested_offset": state.offset.float(),
        "nested_blocksize": second.blocksize,
    }


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The values of a 4-bit type's 16 codes, in [-1, 1].

    Args:
        typename: "nf4" (NormalFloat), "fp4" (a 4-bit float), "int4" or "af4" (AbnormalFloat).
        device: of the result; torch's default device by default.
        blocksize: "af4" is defined for 64 alone; the others do not depend on it.

    Returns:
        fp32 tensor of 16 values, in the order of their codes: ascending for NF4, descending for INT4 and AF4, by bits
        for FP4.

    Raises:
        NotImplementedError: no such type, or "af4" with another blocksize.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3 and appendix E (NF4); Yoshida, "NF4 Isn't
    Information Theoretically Optimal (and that's Good)" (arXiv:2306.06965) (AF4).
    """
    if typename not in _MAPS:
        raise NotImplementedError(f"4-bit types are {', '.join(_MAPS)}; got {typename!r}")
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"af4 is made for blocks of 64, got {blocksize}")
    device = torch.get_default_device() if device is None else device
    return _MAPS[typename].to(device, copy=True)


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor to 4 bits in flat blocks, each scaled by its largest magnitude; two codes share a byte.

    An element becomes the nearest of the type's 16 values to `x / absmax`. Infinities saturate; a NaN becomes 0 and
    does not count towards absmax.

    Args:
        A: fp32, bf16 or fp16 tensor of any shape.
        absmax: tensor to copy the scales into, `[ceil(A.numel() / blocksize)]`, fp32 (uint8 if compressed).
        out: tensor of the result's shape and dtype to copy it into.
        blocksize: elements that share a scale: a power of two up to 4096, at least 32 for NF4; 64 by default.
        compress_statistics: quantize the scales, too, less their mean, to 8 bits in blocks of 256.
        quant_type: "nf4" or another format (docs/linear_4bit.md).
        quant_storage: dtype of the result: uint8, int8, bf16, fp16 or fp32, whose bits are the packed codes.

    Returns:
        Packed codes `[ceil(A.numel() / 2) / quant_storage.itemsize, 1]`, and what `dequantize_4bit` needs.

    Raises:
        ValueError: a dtype, blocksize or type that is not supported.
        RuntimeError: packed codes that are not a whole number of `quant_storage`; an absmax or out of wrong shape.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3.
    """
    blocksize = _BLOCKSIZE if blocksize is None else blocksize
    _check("quantize_4bit", A.dtype, blocksize, quant_type)
    packed, scales = torch.ops.bnbops.quantize_4bit(A, blocksize, quant_type, quant_storage)
    described = {"shape": A.shape, "code": get_4bit_type(quant_type, device=A.device), "dtype": A.dtype}
    described |= {"blocksize": blocksize, "quant_type": quant_type}
    return returned(packed, scales, out, absmax, 256 if compress_statistics else None, **described)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Undoes `quantize_4bit`: each code's value times its block's scale in fp32, rounded to the state's dtype.

    Not differentiable, neither with respect to the codes nor to the scales: the result requires no grad.

    Args:
        A: packed codes of any shape; `[1, n]` and other transposes of packed codes give the transposed result.
        quant_state: what `quantize_4bit` returned, whose own type counts; or else
        absmax: fp32 scales, one a block, with `out`,
        blocksize: elements that share a scale, 64 by default, and
        quant_type: "nf4" or another format (docs/linear_4bit.md).
        out: tensor of the state's shape and dtype to write to; without a state it tells them.

    Returns:
        Tensor of the state's shape (`out`, if given).

    Raises:
        ValueError: neither a state nor both of absmax and out given; a blocksize, type or dtype that is not supported;
            transposed codes of a tensor that is no matrix.
        RuntimeError: codes, scales or out of wrong size or dtype.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit needs a quant_state, or both absmax and out")
        blocksize = _BLOCKSIZE if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    _check("dequantize_4bit", quant_state.dtype, quant_state.blocksize, quant_state.quant_type)
    packed, transposed = in_own_order(A)
    weight = weight_arguments(quant_state)
    if transposed and len(weight["shape"]) != 2:
        raise ValueError(
            f"packed codes of shape {list(A.shape)} stand for a transposed matrix, but the state's shape is "
            f"{weight['shape']}; pass them as [n, 1]"
        )
    if out is None:
        out = torch.ops.bnbops.dequantize_4bit(packed, **weight, dtype=quant_state.dtype)
    else:
        torch.ops.bnbops.dequantize_4bit.out(packed, **weight, dtype=quant_state.dtype, out=out)
    return out.t() if transposed else out


def of_type(function: Callable[..., _T], quant_type: str) -> Callable[..., _T]:
    """The function without its argument `quant_type`, which always is this one."""
    signature = inspect.signature(function)
    place = list(signature.parameters).index("quant_type")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> _T:
        if len(args) > place:
            return function(*args[:place], quant_type, *args[place:], **kwargs)
        return function(*args, quant_type=quant_type, **kwargs)

    others = [parameter for name, parameter in signature.parameters.items() if name != "quant_type"]
    call.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]  # what inspect looks for
    call.__name__ = call.__qualname__ = function.__name__.replace("4bit", quant_type)
    call.__doc__ = f"`{function.__name__}` with `quant_type={quant_type!r}`."
    return call


quantize_nf4, quantize_fp4 = of_type(quantize_4bit, "nf4"), of_type(quantize_4bit, "fp4")
dequantize_nf4, dequantize_fp4 = of_type(dequantize_4bit, "nf4"), of_type(dequantize_4bit, "fp4")


def _weight_arguments(function: str, packed: Tensor, state: QuantState | None) -> dict[str, Any]:
    """What the operators take to know a weight matrix."""
    if state is None:
        raise ValueError(f"{function} needs the state that quantize_4bit returned")
    weight = weight_arguments(state)
    if len(weight["shape"]) != 2:
        raise ValueError(
            f"{function} multiplies by a matrix, but the state's shape is {weight['shape']}; the experts of a "
            "three-dimensional weight go through torch.ops.bnbops.grouped_linear_4bit"
        )
    return weight | {"weight": in_own_order(packed)[0]}


def _written(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`A @ W.t() + bias` for a weight W in 4 bits, with gradients to A and bias.

    Args:
        A: fp32, bf16 or fp16 tensor `[..., K]`.
        B: packed codes of W, of any shape, or a transpose of them.
        quant_state: W's scales and its shape `[N, K]`. If W was quantized as `[K, N]` (and is not square), the result
            is `A @ W + bias`, with a DeprecationWarning, as bitsandbytes gives it.
        out: tensor `[..., N]` to copy the result into.
        bias: `[N]` in A's dtype.

    Returns:
        Tensor `[..., N]` in A's dtype (`out`, if given); under autocast in its dtype.

    Raises:
        ValueError: no state, or one of a weight that is no matrix.
        RuntimeError: shapes or dtypes that do not fit.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), equation 5.
    """
    weight = _weight_arguments("matmul_4bit", B, quant_state)
    rows, columns = weight["shape"]
    if A.shape[-1] == rows != columns:
        if not is_compiling():
            warnings.warn(
                f"matmul_4bit: weight was quantized from a [K, N] tensor, of shape {[rows, columns]}. Re-quantize from "
                "the weight as [N, K] (out_features, in_features): bitsandbytes will refuse the other form",
                DeprecationWarning,
                stacklevel=2,
            )
        result = call(torch.ops.bnbops.linear_4bit_input_grad.default, A, **weight)
        return _written(result if bias is None else result + bias, out)
    return _written(call(torch.ops.bnbops.linear_4bit.default, A, bias=bias, **weight), out)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """`A @ W.t()` for a weight W in 4 bits: `matmul_4bit` under its older name.

    Args, results and errors are as there, but for `transposed_A` and `transposed_B`, which are unused, and for a W that
    was quantized as `[K, N]`, which does not fit.
    """
    weight = _weight_arguments("gemv_4bit", B, state)
    return _written(call(torch.ops.bnbops.linear_4bit.default, A, bias=None, **weight), out)
