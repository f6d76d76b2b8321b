"""`torch.ops.bitsandbytes`: bitsandbytes' operators, as compositions of those of bnbops.

All but one are CompositeImplicitAutograd: compiled graphs hold bnbops' operators in their place, and go on working
after `uninstall`; gradients are those of bnbops' operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbops import functional
from bnbops._library import operator
from bnbops.codebooks import ENTRIES
from bnbops.functional.four_bit import in_own_order
from bnbops.functional.optimizer import optimizer_update_8bit_blockwise, update_32bit

_NAMESPACE = "bitsandbytes"
_WEIGHT_TYPES = ("nf4", "fp4")  # bitsandbytes' own
_OUT = "Tensor! out) -> ()"
_STEP = "float beta1, float beta2, float beta3, float alpha, float eps"

_library: torch.library.Library | None = None
_operators: dict[str, Callable[..., Any]] = {}  # by schema


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _operators[schema] = function
        return function

    return add


def _same(*schemas: str) -> None:
    """Operators that bnbops has, too, with the same arguments."""

    def add(schema: str) -> None:
        twin = operator(schema.partition("(")[0])

        def call(*args: Any) -> Any:
            return twin(*args)

        def write(*args: Any) -> None:
            twin(*args[:-1], out=args[-1])

        _operators[schema] = write if schema.endswith(_OUT) else call

    for schema in schemas:
        add(schema)


def install() -> None:
    """Registers them.

    Operators that exist already are bitsandbytes' own, from an import that has failed or was undone: they stay.
    """
    global _library
    existing = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{_NAMESPACE}::")}
    if existing:
        warnings.warn(
            f"torch.ops.{_NAMESPACE} has operators already, which bnbops leaves as they are. Whatever registered them "
            "was imported before bnbops.install_as_bitsandbytes()",
            stacklevel=3,
        )
        return
    _library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    for schema, function in _operators.items():
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        composite = name not in _FAKES
        _library.impl(name, function, "CompositeImplicitAutograd" if composite else "CompositeExplicitAutograd")
        if not composite:
            torch.library.register_fake(f"{_NAMESPACE}::{name}", _FAKES[name], lib=_library)


def uninstall() -> None:
    """Takes away those that `install` has registered."""
    global _library
    if _library is None:
        return
    for value in vars(torch.ops.bitsandbytes).values():
        if isinstance(value, torch._ops.OpOverloadPacket):
            _retire(value)
    _library._destroy()
    _library = None


def _retire(packet: torch._ops.OpOverloadPacket) -> None:
    """Whoever has kept an operator gets an error by calling it; torch would end the process."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError(f"{packet} was bnbops', which is no longer installed as bitsandbytes")

    for caller in (packet, *(getattr(packet, overload) for overload in packet.overloads())):
        caller._op = refuse


_DEQUANTIZE = "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_DEQUANTIZE_4BIT = "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_MM_DEQUANT = "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None)"
_SCALED_MM = "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None)"
_same(
    "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    f"dequantize_blockwise{_DEQUANTIZE}) -> Tensor",
    f"dequantize_blockwise.out{_DEQUANTIZE}, {_OUT}",
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    f"dequantize_4bit{_DEQUANTIZE_4BIT}) -> Tensor",
    f"dequantize_4bit.out{_DEQUANTIZE_4BIT}, {_OUT}",
    "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
    "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
    f"int8_linear_matmul.out(Tensor A, Tensor B, {_OUT}",
    f"int8_mm_dequant{_MM_DEQUANT} -> Tensor",
    f"int8_scaled_mm{_SCALED_MM} -> Tensor",
)
_QUANT = "_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor"
_operator(f"int8_vectorwise{_QUANT}, Tensor?)")(functional.int8_vectorwise_quant)
_operator(f"int8_double{_QUANT}, Tensor, Tensor, Tensor?)")(
    lambda A, threshold=0.0: functional.int8_double_quant(A, threshold=threshold)
)


@_operator(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    nested = {}
    if absmax_8bit is not None:
        if absmax_code is None or absmax_offset is None:
            raise ValueError("gemm_4bit: absmax_8bit needs absmax_code and absmax_offset")
        nested = {"nested_absmax": absmax, "nested_code": absmax_code, "nested_offset": absmax_offset.float()}
        absmax = absmax_8bit
    packed = in_own_order(B)[0]
    return torch.ops.bnbops.linear_4bit(A, packed, absmax, bias, shapeB, blocksize, quant_type, **nested)


_GEMV_4BIT = "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"


@_operator(f"gemv_4bit{_GEMV_4BIT}) -> Tensor")
def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """The weight's type is told by the values of its codes. Those on another device are not read, which would have to
    wait for it: the weight is decoded by them, as one of any other type is."""
    packed = in_own_order(B)[0]
    known = (name for name in _WEIGHT_TYPES if torch.equal(code, functional.get_4bit_type(name, "cpu")))
    quant_type = next(known, None) if code.device.type == "cpu" else None
    if quant_type is not None:
        return torch.ops.bnbops.linear_4bit(A, packed, absmax, None, shapeB, blocksize, quant_type)
    both = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([both >> 4, both & 15], dim=1).view(-1)[: shapeB[0] * shapeB[1]].view(shapeB)
    table = torch.nn.functional.pad(code, (0, ENTRIES - code.numel()))
    weight = torch.ops.bnbops.dequantize_blockwise(codes, absmax, table, blocksize, A.dtype)
    return torch.nn.functional.linear(A, weight)


@_operator(f"gemv_4bit.out{_GEMV_4BIT}, {_OUT}")
def _gemv_4bit_out(*arguments: Any) -> None:
    *inputs, out = arguments
    result = torch.ops.bitsandbytes.gemv_4bit(*inputs)
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(
            f"out must have shape {list(result.shape)} and {result.dtype}, got {list(out.shape)} and {out.dtype}"
        )
    out.copy_(result)


def _gemv_4bit_fake(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, _code: Tensor, size: int) -> Tensor:
    return torch.ops.bnbops.linear_4bit(A, in_own_order(B)[0], absmax, None, shapeB, size, "nf4")


_FAKES = {"gemv_4bit": _gemv_4bit_fake}  # of the operators that look at values


@_operator(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)"
)
def _int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The product of codes, and that of the outlier columns; these columns, too."""
    product = torch.ops.bnbops.int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is None:
        return product, A.new_empty(0)
    outliers = A.index_select(-1, outlier_cols)
    weight = torch.ops.bnbops.int8_vectorwise_dequant(CB.index_select(1, outlier_cols), SCB).to(A.dtype)
    return product + outliers @ weight.t(), outliers


_operator(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    f"Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, {_STEP}, float weight_decay, int step, float lr, "
    "float gnorm_scale, bool skip_zeros=False) -> ()"
)(update_32bit)


_operator(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    f"Tensor(a3!)? state2, {_STEP}, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, "
    "Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()"
)(optimizer_update_8bit_blockwise)
