"""The self-check's references of the operators on 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import FORMATS
from bnbops.nn.weights.scale_bits import from_bits
from bnbops.testing.expect import absmax_of, blocked, expect, expect_nearest, normalise


def _codes(packed: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """The codes of all elements, and of the padding behind an odd number of them; and what the 16 codes stand for."""
    format = FORMATS[quant_type]
    values = torch.tensor(format.values, dtype=torch.float32, device=packed.device)
    return format.codes(packed.reshape(-1).view(torch.uint8)), values


def _weight(before: dict[str, Any], packed: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
    """What the arguments of a call mean."""
    absmax, size = before["absmax"].detach().flatten(), before["blocksize"]
    if before.get("nested_absmax") is not None:
        scale, code, offset = (from_bits(before[f"nested_{name}"]) for name in ("absmax", "code", "offset"))
        scale = scale.repeat_interleave(before.get("nested_blocksize", 256))[: absmax.numel()]
        absmax = code[absmax.long()] * scale + offset
    else:
        absmax = from_bits(absmax)
    numel = torch.Size(before["shape"]).numel()
    codes, values = _codes(before[packed], before["quant_type"])
    return (values[codes[:numel].long()] * absmax.repeat_interleave(size)[:numel]).to(dtype).view(before["shape"])


def _quantize(before: dict[str, Any], result: tuple[Tensor, Tensor], _after: dict[str, Any]) -> None:
    A, (packed, absmax) = before["A"].detach().double().flatten(), result
    blocks = blocked(A, before["blocksize"])
    expect(packed.shape[1:] == (1,) and packed.dtype == before["quant_storage"], "codes of the wrong shape or dtype")
    expect(torch.equal(absmax.double(), absmax_of(blocks)), "absmax wrong")
    codes, values = _codes(packed, before["quant_type"])
    padded = torch.nn.functional.pad(normalise(blocks).flatten()[: A.numel()], (0, A.numel() % 2))
    expect_nearest(codes, padded, values, "codes")


def _dequantize(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    expect(torch.equal(result, _weight(before, "A", before["dtype"])), "values wrong")


def _dequantize_out(before: dict[str, Any], _result: None, after: dict[str, Any]) -> None:
    expect(torch.equal(after["out"], _weight(before, "A", before["dtype"])), "values wrong")


def _embedding(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    expect(torch.equal(result, _weight(before, dtype=before["dtype"])[before["indices"].long()]), "rows wrong")


def _expect_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x @ weight, whose terms may be rounded to x's dtype and are added in fp32, and one rounding of the sum."""
    x, weight = x.detach().double(), weight.double()
    expected, magnitude = x @ weight, x.abs() @ weight.abs()
    if bias is not None:
        expected, magnitude = expected + bias.detach().double(), magnitude + bias.detach().double().abs()
    expect(actual.shape == expected.shape and actual.dtype != torch.float64, "product of the wrong shape or dtype")
    off = (actual.detach().double() - expected).abs()
    allowed = (torch.finfo(actual.dtype).eps + 1e-5) * magnitude
    expect((off <= allowed).all(), f"product off by up to {off.max().item() if off.numel() else 0:.3g}")


def _linear(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_product(result, before["x"], _weight(before).t(), before["bias"])


def _linear_input_grad(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_product(result, before["grad"], _weight(before), None)


def _expect_products(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> None:
    """One product an expert, and zeros for the rows after the last."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        _expect_product(actual[start:end], x[start:end], weight[expert], None if bias is None else bias[expert])
        start = end
    expect(actual.shape[0] == x.shape[0] and (actual[start:] == 0).all(), "rows that belong to no expert are not zero")


def _grouped(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_products(result, before["x"], _weight(before).transpose(1, 2), before["bias"], before["offsets"])


def _grouped_input_grad(before: dict[str, Any], result: Tensor, _after: dict[str, Any]) -> None:
    _expect_products(result, before["grad"], _weight(before), None, before["offsets"])


REFERENCES_4BIT: dict[str, Callable[[dict[str, Any], Any, dict[str, Any]], None]] = {
    "quantize_4bit": _quantize,
    "dequantize_4bit": _dequantize,
    "dequantize_4bit.out": _dequantize_out,
    "embedding_4bit": _embedding,
    "linear_4bit": _linear,
    "linear_4bit_input_grad": _linear_input_grad,
    "grouped_linear_4bit": _grouped,
    "grouped_linear_4bit_input_grad": _grouped_input_grad,
}
