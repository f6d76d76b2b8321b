"""Fakes of quantize_4bit, dequantize_4bit and embedding_4bit, and the checks of a packed weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from bnbops.facts import BLOCKS_4BIT, FORMATS_4BIT, in_words

from .checks import (
    FLOAT_DTYPES,
    check,
    check_contiguous,
    check_device,
    check_dtype,
    check_float,
    check_not_expanded,
    check_one_element,
    check_scales,
    name_of,
)
from .frozen import refuse_vmap

_CODEBOOK_SIZE = 256  # of quantized scales


def _check_type(op: str, blocksize: int, quant_type: str) -> None:
    check(quant_type in FORMATS_4BIT, f"{op}: quant_type must be {in_words(FORMATS_4BIT)}, got '{quant_type}'")
    bounds = f"from {BLOCKS_4BIT[0]} to {BLOCKS_4BIT[-1]}"
    check(blocksize in BLOCKS_4BIT, f"{op}: blocksize must be a power of two {bounds}, got {blocksize}")


def _check_storage(what: str, dtype: torch.dtype) -> None:
    fits = dtype in (torch.uint8, torch.int8, *FLOAT_DTYPES)
    check(fits, f"{what} must be uint8, int8, float32, bfloat16 or float16, got {name_of(dtype)}")


def _check_result_dtype(op: str, dtype: torch.dtype) -> None:
    check(dtype in FLOAT_DTYPES, f"{op}: dtype must be float32, bfloat16 or float16, got {name_of(dtype)}")


@dataclass
class Weight4bit:
    """The arguments that describe a weight, and the checks of csrc/ops/weight_4bit/weight_4bit.cpp."""

    op: str
    codes: Tensor
    absmax: Tensor
    shape: Sequence[int]
    blocksize: int
    quant_type: str
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_blocksize: int = 256
    name: str = "weight"

    def check(self, dims: int | None = None) -> None:
        """`dims`: how many dimensions the shape must have, any by default."""
        op, shape = self.op, list(self.shape)
        _check_type(op, self.blocksize, self.quant_type)
        check(dims in (None, len(shape)), f"{op}: shape must have {dims} dimensions, got {shape}")
        check(all(size >= 0 for size in shape), f"{op}: shape must not have negative sizes, got {shape}")
        what = f"{op}: {self.name}"
        _check_storage(what, self.codes.dtype)
        check_contiguous(what, self.codes)
        found, needed = self.codes.numel() * self.codes.element_size(), (math.prod(shape) + 1) // 2
        check(found == needed, f"{what} has {found} bytes, but shape {shape} needs {needed}")
        self._check_scales(-(math.prod(shape) // -self.blocksize))

    def _check_scales(self, blocks: int) -> None:
        op, what = self.op, f"{self.op}: absmax"
        check_device(what, self.absmax, self.codes)
        check_contiguous(what, self.absmax)
        given = [x is not None for x in (self.nested_absmax, self.nested_code, self.nested_offset)]
        check(
            all(given) or not any(given),
            f"{op}: nested_absmax, nested_code and nested_offset go together: give all of them or none",
        )
        if any(given):
            check_dtype(what, self.absmax, torch.uint8)
        else:
            check_scales(what, self.absmax)
        check(
            self.absmax.numel() == blocks,
            f"{what} has {self.absmax.numel()} elements, but shape {list(self.shape)} in blocks of {self.blocksize} "
            f"needs {blocks}",
        )
        if any(given):
            self._check_nested(blocks)

    def _check_nested(self, blocks: int) -> None:
        op, size = self.op, self.nested_blocksize
        check(size > 0, f"{op}: nested_blocksize must be positive, got {size}")
        for name in ("nested_code", "nested_absmax", "nested_offset"):
            what, tensor = f"{op}: {name}", getattr(self, name)
            check_scales(what, tensor)
            check_device(what, tensor, self.codes)
            check_contiguous(what, tensor)
            if name == "nested_code":
                fits = tuple(tensor.shape) == (_CODEBOOK_SIZE,)
                check(fits, f"{what} must have shape [{_CODEBOOK_SIZE}], got {list(tensor.shape)}")
        check_one_element(f"{op}: nested_offset", self.nested_offset)
        found, needed = self.nested_absmax.numel(), -(blocks // -size)
        check(
            found == needed,
            f"{op}: nested_absmax has {found} elements, but {blocks} scales in blocks of {size} need {needed}",
        )


# ---- quantize_4bit ---------------------------------------------------------------------------------------------


@torch.library.register_fake("bnbops::quantize_4bit")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    op = "quantize_4bit"
    check_float(f"{op}: A", A)
    _check_type(op, blocksize, quant_type)
    _check_storage(f"{op}: quant_storage", quant_storage)
    numel, size = A.numel(), quant_storage.itemsize
    packed = (numel + 1) // 2
    check(
        packed % size == 0,
        f"{op}: A has {numel} elements, {packed} bytes when packed, which is not a whole number of "
        f"{name_of(quant_storage)} ({size} bytes each); use quant_storage uint8",
    )
    absmax = A.new_empty((-(numel // -blocksize),), dtype=torch.float32)
    return A.new_empty((packed // size, 1), dtype=quant_storage), absmax


# ---- dequantize_4bit -------------------------------------------------------------------------------------------


def _check_dequantize(A, absmax, blocksize, quant_type, shape, dtype, nested: dict[str, Any]) -> None:
    Weight4bit("dequantize_4bit", A, absmax, shape, blocksize, quant_type, name="A", **nested).check()
    _check_result_dtype("dequantize_4bit", dtype)


@torch.library.register_fake("bnbops::dequantize_4bit")
def _(A, absmax, blocksize, quant_type, shape, dtype, **nested) -> Tensor:
    _check_dequantize(A, absmax, blocksize, quant_type, shape, dtype, nested)
    return A.new_empty(shape, dtype=dtype)


@torch.library.register_fake("bnbops::dequantize_4bit.out")
def _(A, absmax, blocksize, quant_type, shape, dtype, *, out: Tensor, **nested) -> None:
    what = "dequantize_4bit: out"
    _check_dequantize(A, absmax, blocksize, quant_type, shape, dtype, nested)
    check_dtype(what, out, dtype)
    check_device(what, out, A)
    check(list(out.shape) == list(shape), f"{what} has shape {list(out.shape)}, but shape is {list(shape)}")
    check_not_expanded(what, out)


# ---- embedding_4bit --------------------------------------------------------------------------------------------


@torch.library.register_fake("bnbops::embedding_4bit")
def _(indices, weight, absmax, shape, blocksize, quant_type, dtype, **nested) -> Tensor:
    op = "embedding_4bit"
    Weight4bit(op, weight, absmax, shape, blocksize, quant_type, **nested).check(dims=2)
    _check_result_dtype(op, dtype)
    fits = indices.dtype in (torch.int32, torch.int64)
    check(fits, f"{op}: indices must be int32 or int64, got {name_of(indices.dtype)}")
    check_device(f"{op}: indices", indices, weight)
    return weight.new_empty((*indices.shape, shape[1]), dtype=dtype)


# ---- autograd and vmap -----------------------------------------------------------------------------------------

# Codes have no gradient, and that of the scales would have to be saved for; nothing computes it, so nothing that comes
# out of these operators may require it.
_library = torch.library.Library("bnbops", "IMPL")
for _op in ("quantize_4bit", "dequantize_4bit", "embedding_4bit"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def _bump_version(keyset, *args, out: Tensor, **nested) -> None:
    overload = torch.ops.bnbops.dequantize_4bit.out
    overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, out=out, **nested)
    increment_version(out)


# An operator from C++ writes behind autograd's back: a graph that saved what `out` held would not notice.
_library.impl("dequantize_4bit.out", _bump_version, "ADInplaceOrView", with_keyset=True)


refuse_vmap("quantize_4bit", "call it in a loop, or on a tensor with one more dimension")
refuse_vmap("dequantize_4bit", "call it in a loop, or on a weight with one more dimension")
refuse_vmap("dequantize_4bit.out", "call it in a loop, or on a weight with one more dimension")
refuse_vmap("embedding_4bit", "indices may have any number of dimensions, so pass all of them in one call")
