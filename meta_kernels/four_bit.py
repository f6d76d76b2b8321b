"""Fakes of the operators on weights in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from bnbops.codebooks import ENTRIES
from bnbops.facts import FLOATS, FORMATS, in_words, name_of

from . import checks as C
from .checks import Arguments, Problem, Row, blocks, fake, row

# ---- a weight --------------------------------------------------------------------------------------------------

_STORAGE = (torch.uint8, torch.int8, *FLOATS)
_NESTED = ("nested_absmax", "nested_code", "nested_offset")


def _blocksize(a: Arguments, x: int) -> Problem:
    sizes = FORMATS[a.quant_type].blocks
    return x not in sizes and f"must be a power of two from {sizes[0]} to {sizes[-1]}, got {x}"


_type = (
    row("quant_type", C.must(lambda a, x: x in FORMATS, f"must be {in_words(FORMATS)}, got '{{x}}'")),
    row("blocksize", _blocksize),
)
_not_negative = C.must(lambda a, x: all(size >= 0 for size in x), "must not have negative sizes, got {x}")
_scales = C.one_for_each_block(
    lambda a: prod(a.shape), "blocksize", "shape {a.shape} in blocks of {size} needs {needed}"
)
_nested_scales = C.one_for_each_block(
    lambda a: a.absmax.numel(), "nested_blocksize", "{numel} scales in blocks of {size} need {needed}"
)


def _two_codes_a_byte(a: Arguments, codes: Tensor) -> Problem:
    found, needed = codes.numel() * codes.element_size(), blocks(prod(a.shape), 2)
    return found != needed and f"has {found} bytes, but shape {list(a.shape)} needs {needed}"


def _is_nested(a: Arguments) -> bool:
    return any(getattr(a, name) is not None for name in _NESTED)


def _nested_or_not(a: Arguments) -> Iterator[str]:
    if _is_nested(a) and any(getattr(a, name) is None for name in _NESTED):
        yield "nested_absmax, nested_code and nested_offset go together: give all of them or none"


def _weight(name: str = "weight", dims: int | None = None) -> tuple[Row, ...]:
    """The arguments that describe a weight, of which `name` are the codes. `dims` is how many dimensions it must have,
    any by default."""
    dimensions = C.must(lambda a, x: dims in (None, len(x)), f"must have {dims} dimensions, got {{x}}")
    nested = (C.scales, C.device, C.contiguous)
    return (
        *_type,
        row("shape", dimensions, _not_negative),
        row(name, C.dtype(*_STORAGE), C.contiguous, _two_codes_a_byte),
        row("absmax", C.device, C.contiguous),
        _nested_or_not,
        row("absmax", lambda a, x: (C.uint8 if _is_nested(a) else C.scales)(a, x), _scales),
        row("nested_blocksize", lambda a, size: _is_nested(a) and C.positive(a, size)),
        row("nested_code", *nested, C.shape(lambda a: [ENTRIES])),
        row("nested_absmax", *nested),
        row("nested_offset", *nested, C.one_element),
        row("nested_absmax", _nested_scales),
    )


# ---- there and back --------------------------------------------------------------------------------------------


def _whole_storage(a: Arguments, A: Tensor) -> Problem:
    numel, size = A.numel(), a.quant_storage.itemsize
    return blocks(numel, 2) % size != 0 and (
        f"has {numel} elements, {blocks(numel, 2)} bytes when packed, which is not a whole number of "
        f"{name_of(a.quant_storage)} ({size} bytes each); use quant_storage uint8"
    )


fake(
    "quantize_4bit",
    row("A", C.floats),
    *_type,
    row("quant_storage", C.dtype(*_STORAGE)),
    row("A", _whole_storage),
    result=lambda a: (
        a.A.new_empty((blocks(a.A.numel(), 2) // a.quant_storage.itemsize, 1), dtype=a.quant_storage),
        a.A.new_empty((blocks(a.A.numel(), a.blocksize),), dtype=torch.float32),
    ),
)

_shape = C.must(lambda a, x: list(x.shape) == a.shape, "has shape {shape}, but shape is {a.shape}")
_dequantize = (*_weight("A"), row("dtype", C.floats))
fake("dequantize_4bit", *_dequantize, result=lambda a: a.A.new_empty(a.shape, dtype=a.dtype))
fake("dequantize_4bit.out", *_dequantize, row("out", C.dtype_of("dtype"), C.device, _shape, C.not_expanded))

fake(
    "embedding_4bit",
    *_weight(dims=2),
    row("dtype", C.floats),
    row("indices", C.dtype(torch.int32, torch.int64), C.device),
    like="weight",
    result=lambda a: a.weight.new_empty((*a.indices.shape, a.shape[1]), dtype=a.dtype),
)


# ---- products --------------------------------------------------------------------------------------------------

_is_matrix = C.must(lambda a, x: x.dim() == 2, "must be a matrix [tokens, features], got {shape}")
_ends = C.shape(lambda a: a.shape[:1], ", one end for each expert")


def _experts(x: str) -> tuple[Row, Row]:
    """Each takes the rows of `x` up to its offset."""
    return row(x, _is_matrix), row("offsets", C.int32, C.device, C.contiguous, _ends)


def _product(op: str, dims: int, x: str, *rows: Row) -> None:
    """`x` times a weight of `dims` dimensions, or `grad` times its transpose."""
    which, summed, kept = ("out_features", -2, -1) if x == "grad" else ("in_features", -1, -2)
    words = f"its last dimension must be {which} = {{a.shape[{dims + summed}]}} of a weight of shape {{a.shape}}"
    features = C.must(lambda a, x: list(x.shape[-1:]) == [a.shape[summed]], "has shape {shape}, but " + words)

    def result(a: Arguments) -> Tensor:
        tensor = getattr(a, x)
        return tensor.new_empty((*tensor.shape[:-1], a.shape[kept]))

    fake(op, *_weight(dims=dims), row(x, C.floats, C.device, features), *rows, result=result, like="weight")


_bias = row("bias", C.dtype_of("x"), C.device, C.shape(lambda a: a.shape[:-1]))
_product("linear_4bit", 2, "x", _bias)
_product("linear_4bit_input_grad", 2, "grad")
_product("grouped_linear_4bit", 3, "x", _bias, *_experts("x"))
_product("grouped_linear_4bit_input_grad", 3, "grad", *_experts("grad"))
