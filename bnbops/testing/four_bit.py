"""The operators on 4-bit weights: sample calls, and what they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnbops.codebooks import create_dynamic_map
from bnbops.facts import FLOATS, FORMATS, name_of
from bnbops.nn.weights.numbers import from_bits, to_bits
from bnbops.testing.expect import Arguments, Checked, exactly, expect, expect_encoded, expect_product
from bnbops.testing.references.blockwise import decode
from bnbops.testing.sample import Sample, full, normal, random_codes, strided, tensor, with_out

_FLOAT, _BYTES = torch.float32, torch.uint8


def _weight(shape: list[int], blocksize: int = 64, storage: torch.dtype = _BYTES) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a tensor of `shape`."""
    numel = math.prod(shape)
    return random_codes((numel + 1) // 2).view(storage).view(-1, 1), 0.1 + normal(-(numel // -blocksize)).abs()


def _bits(nested: tuple[Tensor, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
    """Scales, and what `_nested` gives, as layers hold them."""
    codes, arguments = nested
    return codes, {name: to_bits(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _nested(blocks: int, nested_blocksize: int | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Scales in 8 bits, and the arguments that tell their values."""
    count = -(blocks // -(nested_blocksize or 256))
    arguments: dict[str, Any] = {
        "nested_absmax": 0.1 * normal(count, seed=1).abs(),
        "nested_code": create_dynamic_map(),
        "nested_offset": tensor([0.5]),
    }
    if nested_blocksize is not None:
        arguments["nested_blocksize"] = nested_blocksize
    return random_codes(blocks), arguments


def _quantize() -> list[Sample]:
    x, even = normal(5, 301), -normal(6, 64).abs()  # codes below 8: no bits of a NaN
    special = tensor([math.nan, 1.0, -0.0, 1e-9, -1e-9, 1e-40] + [0.0] * 58 + [math.inf, -1.0, math.nan])
    return [
        *(Sample(name_of(dtype), (x.to(dtype), 64, "nf4", _BYTES)) for dtype in FLOATS),
        *(
            Sample(f"{format.name} in blocks of {size}", (x.to(dtype), size, format.name, _BYTES))
            for format in FORMATS.values()
            for size, dtype in zip((*format.blocks[:3], 256, 1024, 4096), 2 * FLOATS, strict=True)
        ),
        *(Sample(f"stored as {name_of(dtype)}", (even, 64, "nf4", dtype)) for dtype in (torch.int8, *FLOATS)),
        Sample("three dimensions", (normal(3, 4, 70), 128, "nf4", _BYTES)),
        Sample("transposed, two blocks", (x.t(), 1024, "nf4", _BYTES)),
        Sample("strided", (strided(x), 64, "fp4", _BYTES)),
        Sample("expanded", (tensor([[0.5], [-2.0]]).expand(2, 33), 64, "nf4", _BYTES)),
        Sample("scalar", (tensor(-3.0), 64, "nf4", _BYTES)),
        Sample("empty", (full((3, 0), 0.0), 64, "nf4", _FLOAT)),
        Sample("zeros", (full((2, 70), 0.0), 64, "fp4", _BYTES)),
        Sample("nan, infinity, zeros and tiny values", (special, 64, "fp4", _BYTES)),
        Sample("requires grad", (x.clone().requires_grad_(), 64, "nf4", _BYTES)),
    ]


def _dequantize() -> list[Sample]:
    odd, even = [5, 301], [6, 64]
    packed, absmax = _weight(odd)
    nested_absmax, nested = _nested(24)
    return [
        *(Sample(f"to {name_of(dtype)}", (packed, absmax, 64, "nf4", odd, dtype)) for dtype in FLOATS),
        *(Sample(name, (packed, absmax, 64, name, odd, _FLOAT)) for name in FORMATS),
        *(
            Sample(f"stored as {name_of(dtype)}", (*_weight(even, 32, dtype), 32, "nf4", even, torch.bfloat16))
            for dtype in (torch.int8, *FLOATS)
        ),
        Sample("one block", (*_weight(odd, 4096), 4096, "fp4", odd, torch.float16)),
        Sample("codes and scales as matrices", (packed.t(), absmax.view(4, 6), 64, "nf4", odd, _FLOAT)),
        Sample("three dimensions", (packed, absmax, 64, "nf4", [5, 7, 43], _FLOAT)),
        Sample("scalar", (*_weight([]), 64, "nf4", [], _FLOAT)),
        Sample("empty", (*_weight([0, 8]), 64, "nf4", [0, 8], _FLOAT)),
        Sample("nested", (packed, nested_absmax, 64, "nf4", odd, torch.bfloat16), nested),
        Sample("nested in blocks of 16", (packed, _nested(24)[0], 64, "fp4", odd, _FLOAT), _nested(24, 16)[1]),
        Sample("bits of scales", (packed, to_bits(absmax), 64, "nf4", odd, _FLOAT)),
        Sample("nested, bits of scales", (packed, nested_absmax, 64, "nf4", odd, _FLOAT), _bits(_nested(24))[1]),
        Sample("absmax requires grad", (packed, absmax.clone().requires_grad_(), 64, "nf4", odd, _FLOAT)),
    ]


def _dequantize_out() -> list[Sample]:
    names = ("to bfloat16", "stored as float32", "scalar", "empty", "nested in blocks of 16", "nested, bits of scales")
    calls = [sample for sample in _dequantize() if sample.name in names]
    return with_out(calls, lambda *args: full(args[4], -1.0, args[5]))


def _embedding() -> list[Sample]:
    shape = [7, 65]  # rows begin within blocks and bytes
    weight, by_blocks = _weight(shape), _weight([7, 128], storage=torch.bfloat16)
    indices = tensor([[0, 6, 3], [6, 1, 0]], torch.int64)
    codes, nested_absmax = weight[0], _nested(8)[0]
    return [
        *(Sample(f"to {name_of(dtype)}", (indices, *weight, shape, 64, "nf4", dtype)) for dtype in FLOATS),
        *(Sample(f"int32 indices, {name}", (indices.int(), *weight, shape, 64, name, _FLOAT)) for name in FORMATS),
        Sample("transposed indices", (indices.t(), *weight, shape, 64, "nf4", _FLOAT)),
        Sample("one index", (tensor(4, torch.int64), *weight, shape, 64, "nf4", _FLOAT)),
        Sample("no indices", (indices[:0], *weight, shape, 64, "nf4", _FLOAT)),
        Sample("rows of two blocks", (indices, *by_blocks, [7, 128], 64, "nf4", _FLOAT)),
        Sample("nested", (indices, codes, nested_absmax, shape, 64, "nf4", torch.bfloat16), _nested(8)[1]),
        Sample("nested in blocks of 3", (indices, codes, nested_absmax, shape, 64, "nf4", _FLOAT), _nested(8, 3)[1]),
        Sample("bits of scales", (indices, codes, to_bits(weight[1]), shape, 64, "nf4", _FLOAT)),
    ]


# ---- products, and those with the transpose --------------------------------------------------------------------


def _product(
    transposed: bool,
    name: str,
    *rows: int,
    of: list[int],
    dtype: torch.dtype = _FLOAT,
    quant_type: str = "nf4",
    blocksize: int = 64,
    storage: torch.dtype = _BYTES,
    ends: list[int] | None = None,
    bias: bool = False,
    grad: bool = False,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    nested: bool = False,
    nested_blocksize: int | None = None,
    bits: bool = False,
) -> Sample:
    packed, absmax = _weight(of, blocksize, storage)
    absmax, arguments = _nested(absmax.numel(), nested_blocksize) if nested else (absmax, {})
    if bits:
        absmax, arguments = _bits((absmax, arguments)) if nested else (to_bits(absmax), arguments)
    x = view(normal(*rows, of[-2 if transposed else -1], seed=1).to(dtype)).requires_grad_(grad)
    b = [] if transposed else [normal(*of[:-1], seed=2).to(dtype).requires_grad_(grad) if bias else None]
    offsets = [] if ends is None else [tensor(ends, torch.int32)]
    return Sample(name, (x, packed, absmax, *b, *offsets, of, blocksize, quant_type), arguments)


def _linear(transposed: bool) -> list[Sample]:
    """Samples of linear_4bit, or of its adjoint."""
    sample, low = partial(_product, transposed, of=[10, 96]), torch.bfloat16
    # Tensor cores have a kernel for any rows of the weight; for rows of whole blocks, one by the number of rows of x,
    # and one for more features than a GPU works on at a time.
    whole, many = [40, 128], [12288, 64]
    odd, smallest = "rows that are no multiple of a block or a byte", "in its smallest blocks"
    return [
        *(sample(name_of(dtype), 3, dtype=dtype) for dtype in FLOATS),
        sample("one row", bias=True),
        sample("three dimensions, bias", 2, 3, bias=True, quant_type="fp4", blocksize=32),
        *(sample(f"{n} rows, {name_of(t)}", n, of=whole, dtype=t) for n in (2, 16, 32, 64) for t in FLOATS[1:]),
        *(sample(f"many features, {name_of(dtype)}", 1, of=many, dtype=dtype) for dtype in FLOATS[1:]),
        sample("many rows, bias", 70, dtype=low, bias=True, storage=low),
        *(sample(f"{odd}, {name}", 3, of=[9, 65], quant_type=name, storage=torch.int8) for name in FORMATS),
        *(
            sample(f"{name} {smallest}", 3, dtype=low, blocksize=format.smallest_block, quant_type=name)
            for name, format in FORMATS.items()
        ),
        sample("rows of several blocks", 2, of=[5, 192], dtype=torch.float16, storage=_FLOAT),
        sample("strided", 4, view=strided),
        sample("transposed", 4, view=lambda x: x.t().contiguous().t(), dtype=low),
        sample("no rows", 0, bias=True),
        sample("no features", 3, of=[0, 96]),
        sample("requires grad", 2, 3, grad=True, bias=True),
        sample("requires grad, bfloat16", 40, grad=True, bias=True, dtype=low, quant_type="fp4"),
        sample("nested", 3, dtype=low, nested=True, bias=True),
        sample("nested in blocks of 4, requires grad", 3, nested=True, nested_blocksize=4, grad=True),
        sample("bits of scales", 3, dtype=low, bits=True),
        sample("nested, bits of scales, requires grad", 3, nested=True, bits=True, grad=True),
    ]


def _grouped(transposed: bool) -> list[Sample]:
    """Samples of grouped_linear_4bit, or of its adjoint."""
    sample, low = partial(_product, transposed, of=[3, 10, 64]), torch.bfloat16
    return [
        *(sample(name_of(dtype), 7, ends=[2, 4, 7], dtype=dtype) for dtype in FLOATS),
        sample("bias, an expert without rows", 7, ends=[3, 3, 7], bias=True),
        *(sample(f"rows for no expert, {name}", 9, ends=[0, 2, 5], quant_type=name, dtype=low) for name in FORMATS),
        sample("only rows for no expert", 3, ends=[0, 0, 0], bias=True),
        sample("many rows for one", 50, ends=[1, 49, 50], dtype=low, bias=True),
        sample("experts begin within bytes", 4, ends=[1, 2, 4], of=[3, 3, 21]),
        sample("strided", 5, ends=[1, 3, 5], view=strided),
        sample("no rows", 0, ends=[0, 0, 0], dtype=torch.float16, bias=True),
        sample("requires grad", 7, ends=[3, 3, 6], grad=True, bias=True),
        sample("nested, requires grad", 5, ends=[1, 3, 5], nested=True, grad=True, dtype=low),
        sample("nested in blocks of 7", 5, ends=[1, 3, 5], nested=True, nested_blocksize=7),
        sample("bits of scales", 5, ends=[1, 3, 5], bits=True),
    ]


# ---- references ------------------------------------------------------------------------------------------------


def _codes(packed: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """The codes of all elements, and of the padding behind an odd number of them; and what the 16 codes stand for."""
    format = FORMATS[quant_type]
    values = torch.tensor(format.values, dtype=torch.float32, device=packed.device)
    return format.codes(packed.reshape(-1).view(torch.uint8)), values


def _values(a: Arguments, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the arguments of a call mean."""
    if a.nested_absmax is None:
        absmax = from_bits(a.absmax).flatten()
    else:
        absmax = decode(a.absmax.flatten(), a.nested_absmax.flatten(), a.nested_code, a.nested_blocksize)
        absmax = absmax + a.nested_offset
    codes, values = _codes(packed, a.quant_type)
    return decode(codes[: torch.Size(a.shape).numel()], absmax, values, a.blocksize).to(dtype).view(a.shape)


def _expect_quantized(a: Arguments, result: tuple[Tensor, Tensor]) -> None:
    x, (packed, absmax) = a.A.flatten(), result
    expect(packed.shape[1:] == (1,) and packed.dtype == a.quant_storage, "codes of the wrong shape or dtype")
    codes, values = _codes(packed, a.quant_type)
    padded = torch.nn.functional.pad(x, (0, x.numel() % 2))  # with a zero, whose code is that of zero
    error = torch.zeros_like(padded, dtype=torch.float64)
    expect_encoded(codes, absmax, padded, error, values, "codes", size=a.blocksize)


def _expect_product(a: Arguments, result: Tensor) -> None:
    """x @ weight.T + bias, or grad @ weight; of each expert, and zeros for the rows after the last."""
    weight, backwards = _values(a, a.weight), hasattr(a, "grad")
    x, weight, bias = (a.grad, weight, None) if backwards else (a.x, weight.mT, a.bias)
    terms = torch.finfo(x.dtype).eps / 2 + 1e-5  # which may be rounded to x's dtype
    if weight.dim() == 2:
        return expect_product(result, x, weight, bias, terms)
    start = 0
    for expert, end in enumerate(a.offsets.tolist()):
        rows = slice(start, end)
        expect_product(result[rows], x[rows], weight[expert], None if bias is None else bias[expert], terms)
        start = end
    expect(result.shape[0] == x.shape[0] and (result[start:] == 0).all(), "rows that belong to no expert are not zero")


_decoded = exactly(lambda a: _values(a, a.A, a.dtype))
OPERATORS: dict[str, Checked] = {
    "quantize_4bit": (_quantize, _expect_quantized),
    "dequantize_4bit": (_dequantize, _decoded),
    "dequantize_4bit.out": (_dequantize_out, _decoded),
    "embedding_4bit": (_embedding, exactly(lambda a: _values(a, a.weight, a.dtype)[a.indices.long()])),
    "linear_4bit": (partial(_linear, False), _expect_product),
    "linear_4bit_input_grad": (partial(_linear, True), _expect_product),
    "grouped_linear_4bit": (partial(_grouped, False), _expect_product),
    "grouped_linear_4bit_input_grad": (partial(_grouped, True), _expect_product),
}
