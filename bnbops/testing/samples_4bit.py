"""Sample inputs of the operators on 4-bit weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnbops.codebooks import create_dynamic_map
from bnbops.facts import FORMATS
from bnbops.nn.weights.scale_bits import to_bits
from bnbops.testing.sample import DTYPES, Sample, full, normal, random_codes, strided, tensor

_FLOAT, _BYTES = torch.float32, torch.uint8


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


# ---- quantize_4bit ---------------------------------------------------------------------------------------------


def _quantize() -> list[Sample]:
    x, even = normal(5, 301), -normal(6, 64).abs()  # codes below 8: no bits of a NaN
    special = tensor([math.nan, 1.0, -0.0, 1e-9, -1e-9, 1e-40] + [0.0] * 58 + [math.inf, -1.0, math.nan])
    return [
        *(Sample(_name(dtype), (x.to(dtype), 64, "nf4", _BYTES)) for dtype in DTYPES),
        *(
            Sample(f"{format.name} in blocks of {size}", (x.to(dtype), size, format.name, _BYTES))
            for format in FORMATS.values()
            for size, dtype in zip((*format.blocks[:3], 256, 1024, 4096), 2 * DTYPES, strict=True)
        ),
        *(Sample(f"stored as {_name(dtype)}", (even, 64, "nf4", dtype)) for dtype in (torch.int8, *DTYPES)),
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


# ---- dequantize_4bit -------------------------------------------------------------------------------------------


def _dequantize() -> list[Sample]:
    odd, even = [5, 301], [6, 64]
    packed, absmax = _weight(odd)
    nested_absmax, nested = _nested(24)
    return [
        *(Sample(f"to {_name(dtype)}", (packed, absmax, 64, "nf4", odd, dtype)) for dtype in DTYPES),
        *(Sample(name, (packed, absmax, 64, name, odd, _FLOAT)) for name in FORMATS),
        *(
            Sample(f"stored as {_name(dtype)}", (*_weight(even, 32, dtype), 32, "nf4", even, torch.bfloat16))
            for dtype in (torch.int8, *DTYPES)
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
    """Samples of dequantize_4bit with an `out`, contiguous and not."""
    names = ("to bfloat16", "stored as float32", "scalar", "empty", "nested in blocks of 16", "nested, bits of scales")
    calls = [sample for sample in _dequantize() if sample.name in names]

    def with_out(sample: Sample, name: str, out: Tensor) -> Sample:
        return Sample(name, sample.args, sample.kwargs | {"out": out})

    found = [with_out(s, s.name, full(s.args[4], -1.0, dtype=s.args[5])) for s in calls]
    found.append(with_out(calls[0], "strided out", full((5, 602), -1.0).bfloat16()[:, ::2]))
    found.append(with_out(calls[0], "transposed out", full((301, 5), -1.0).bfloat16().t()))
    return found


# ---- embedding_4bit --------------------------------------------------------------------------------------------


def _embedding() -> list[Sample]:
    shape = [7, 65]  # rows begin within blocks and bytes
    weight, by_blocks = _weight(shape), _weight([7, 128], storage=torch.bfloat16)
    indices = tensor([[0, 6, 3], [6, 1, 0]], torch.int64)
    codes, nested_absmax = weight[0], _nested(8)[0]
    return [
        *(Sample(f"to {_name(dtype)}", (indices, *weight, shape, 64, "nf4", dtype)) for dtype in DTYPES),
        *(Sample(f"int32 indices, {name}", (indices.int(), *weight, shape, 64, name, _FLOAT)) for name in FORMATS),
        Sample("transposed indices", (indices.t(), *weight, shape, 64, "nf4", _FLOAT)),
        Sample("one index", (tensor(4, torch.int64), *weight, shape, 64, "nf4", _FLOAT)),
        Sample("no indices", (indices[:0], *weight, shape, 64, "nf4", _FLOAT)),
        Sample("rows of two blocks", (indices, *by_blocks, [7, 128], 64, "nf4", _FLOAT)),
        Sample("nested", (indices, codes, nested_absmax, shape, 64, "nf4", torch.bfloat16), _nested(8)[1]),
        Sample("nested in blocks of 3", (indices, codes, nested_absmax, shape, 64, "nf4", _FLOAT), _nested(8, 3)[1]),
        Sample("bits of scales", (indices, codes, to_bits(weight[1]), shape, 64, "nf4", _FLOAT)),
    ]


# ---- linear_4bit, linear_4bit_input_grad -----------------------------------------------------------------------


def _linear() -> list[Sample]:
    return _products(biased=True)


def _linear_input_grad() -> list[Sample]:
    return _products(biased=False)


def _products(biased: bool) -> list[Sample]:
    """Samples of linear_4bit, or of its adjoint."""
    shape, odd = [10, 96], [9, 65]

    def sample(
        name: str,
        *rows: int,
        of: list[int] = shape,
        dtype: torch.dtype = _FLOAT,
        blocksize: int = 64,
        quant_type: str = "nf4",
        storage: torch.dtype = _BYTES,
        bias: bool = False,
        grad: bool = False,
        view: Callable[[Tensor], Tensor] = lambda x: x,
        nested: tuple[Tensor, dict[str, Any]] | None = None,
    ) -> Sample:
        packed, absmax = _weight(of, blocksize, storage)
        absmax, arguments = nested or (absmax, {})
        x = view(normal(*rows, of[1] if biased else of[0], seed=1).to(dtype)).requires_grad_(grad)
        b = [normal(of[0], seed=2).to(dtype).requires_grad_(grad) if bias else None] if biased else []
        return Sample(name, (x, packed, absmax, *b, of, blocksize, quant_type), arguments)

    low = torch.bfloat16
    # Tensor cores have a kernel for any rows of the weight; for rows of whole blocks, one by the number of rows of x,
    # and one for more features than a GPU works on at a time.
    whole, many = [40, 128], [12288, 64]
    return [
        *(sample(_name(dtype), 3, dtype=dtype) for dtype in DTYPES),
        sample("one row", bias=True),
        sample("three dimensions, bias", 2, 3, bias=True, quant_type="fp4", blocksize=32),
        *(sample(f"{n} rows, {_name(t)}", n, of=whole, dtype=t) for n in (2, 16, 32, 64) for t in DTYPES[1:]),
        *(sample(f"many features, {_name(dtype)}", 1, of=many, dtype=dtype) for dtype in DTYPES[1:]),
        sample("many rows, bias", 70, dtype=low, bias=True, storage=low),
        *(
            sample(
                f"rows that are no multiple of a block or a byte, {name}",
                3,
                of=odd,
                quant_type=name,
                storage=torch.int8,
            )
            for name in FORMATS
        ),
        *(
            sample(
                f"{format.name} in its smallest blocks",
                3,
                dtype=low,
                blocksize=format.smallest_block,
                quant_type=format.name,
            )
            for format in FORMATS.values()
        ),
        sample("rows of several blocks", 2, of=[5, 192], dtype=torch.float16, storage=_FLOAT),
        sample("strided", 4, view=strided),
        sample("transposed", 4, view=lambda x: x.t().contiguous().t(), dtype=low),
        sample("no rows", 0, bias=True),
        sample("no features", 3, of=[0, 96]),
        sample("requires grad", 2, 3, grad=True, bias=True),
        sample("requires grad, bfloat16", 40, grad=True, bias=True, dtype=low, quant_type="fp4"),
        sample("nested", 3, dtype=low, nested=_nested(15), bias=True),
        sample("nested in blocks of 4, requires grad", 3, nested=_nested(15, 4), grad=True),
        sample("bits of scales", 3, dtype=low, nested=(to_bits(_weight(shape)[1]), {})),
        sample("nested, bits of scales, requires grad", 3, nested=_bits(_nested(15)), grad=True),
    ]


# ---- grouped_linear_4bit, grouped_linear_4bit_input_grad -------------------------------------------------------


def _grouped() -> list[Sample]:
    return _grouped_products(biased=True)


def _grouped_input_grad() -> list[Sample]:
    return _grouped_products(biased=False)


def _grouped_products(biased: bool) -> list[Sample]:
    """Samples of grouped_linear_4bit, or of its adjoint."""
    shape = [3, 10, 64]

    def sample(
        name: str,
        tokens: int,
        ends: list[int],
        dtype: torch.dtype = _FLOAT,
        quant_type: str = "nf4",
        of: list[int] = shape,
        bias: bool = False,
        grad: bool = False,
        view: Callable[[Tensor], Tensor] = lambda x: x,
        nested_blocksize: int | None = None,
        nested: bool = False,
        bits: bool = False,
    ) -> Sample:
        packed, absmax = _weight(of)
        absmax, arguments = _nested(absmax.numel(), nested_blocksize) if nested else (absmax, {})
        absmax = to_bits(absmax) if bits else absmax
        x = view(normal(tokens, of[2] if biased else of[1], seed=1).to(dtype)).requires_grad_(grad)
        b = [normal(*of[:2], seed=2).to(dtype).requires_grad_(grad) if bias else None] if biased else []
        offsets = tensor(ends, torch.int32)
        return Sample(name, (x, packed, absmax, *b, offsets, of, 64, quant_type), arguments)

    low = torch.bfloat16
    return [
        *(sample(_name(dtype), 7, [2, 4, 7], dtype=dtype) for dtype in DTYPES),
        sample("bias, an expert without rows", 7, [3, 3, 7], bias=True),
        *(sample(f"rows for no expert, {name}", 9, [0, 2, 5], quant_type=name, dtype=low) for name in FORMATS),
        sample("only rows for no expert", 3, [0, 0, 0], bias=True),
        sample("many rows for one", 50, [1, 49, 50], dtype=low, bias=True),
        sample("experts begin within bytes", 4, [1, 2, 4], of=[3, 3, 21]),
        sample("strided", 5, [1, 3, 5], view=strided),
        sample("no rows", 0, [0, 0, 0], dtype=torch.float16, bias=True),
        sample("requires grad", 7, [3, 3, 6], grad=True, bias=True),
        sample("nested, requires grad", 5, [1, 3, 5], nested=True, grad=True, dtype=low),
        sample("nested in blocks of 7", 5, [1, 3, 5], nested=True, nested_blocksize=7),
        sample("bits of scales", 5, [1, 3, 5], bits=True),
    ]


BUILDERS_4BIT: dict[str, Callable[[], list[Sample]]] = {
    "quantize_4bit": _quantize,
    "dequantize_4bit": _dequantize,
    "dequantize_4bit.out": _dequantize_out,
    "embedding_4bit": _embedding,
    "linear_4bit": _linear,
    "linear_4bit_input_grad": _linear_input_grad,
    "grouped_linear_4bit": _grouped,
    "grouped_linear_4bit_input_grad": _grouped_input_grad,
}
