"""What the bytes of a 4-bit weight mean, and its scales as tensors that a module can register.

What a module registers gets cast: by `.half()`, `.to(torch.bfloat16)`, by FSDP's mixed precision. Scales must not be.
So fp32 tensors are registered as the int32 tensors of the same bits, which is how the operators take them, too.

A module registers, each name with a prefix of its own:

    absmax          parameter, uint8 codes if doubly quantized, else bits of fp32; [..., in / blocksize] if blocks keep
                    within rows, so that a slice of rows has its scales in the same slice, else [blocks]
    nested_absmax   parameter, bits of fp32 [ceil(blocks / nested_blocksize)], or None
    nested_offset   parameter, bits of fp32 [1], or None
    nested_code     buffer, bits of fp32 [256], or None; a persistent one, since Transformers empties the others after
                    it has loaded a model
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bnbops.functional.four_bit import get_4bit_type, weight_arguments
from bnbops.functional.quant_state import NO_NUMBERS, QuantState
from bnbops.nn.weights.numbers import are_scales, from_bits, is_finite, to_bits

_PARAMETERS = ("absmax", "nested_absmax", "nested_offset")
_BUFFER = "nested_code"
NAMES = (*_PARAMETERS, _BUFFER)


class Format(NamedTuple):
    """What neither the packed codes nor the registered tensors tell of themselves. With those it makes a QuantState,
    bitsandbytes' description of the same."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested_blocksize: int

    @classmethod
    def of(cls, state: QuantState) -> Format:
        nested_blocksize = state.state2.blocksize if state.nested else 256
        return cls(tuple(state.shape), state.dtype, state.blocksize, state.quant_type, nested_blocksize)

    @property
    def by_rows(self) -> bool:
        """Whether blocks keep within rows. (A single row of bytes, [1, n], would read as a transposed [n, 1].)"""
        return len(self.shape) > 1 and self.shape[-1] % self.blocksize == 0 and self.shape[0] > 1

    def in_rows(self, packed: Tensor) -> Tensor:
        """A view of the packed weight: [..., in / 2 / itemsize] if blocks keep within rows, else [n, 1]."""
        if not self.by_rows:
            return packed.view(-1, 1)
        return packed.view(*self.shape[:-1], self.shape[-1] // 2 // packed.element_size())

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What the operators take beside the codes."""
        shape, blocksize, quant_type = self.described
        described = {"absmax": tensors["absmax"], "shape": shape, "blocksize": blocksize, "quant_type": quant_type}
        return described | self.nested(tensors)

    @property
    def described(self) -> tuple[tuple[int, ...], int, str]:
        """`shape`, `blocksize` and `quant_type`, as the operators take them."""
        return self.shape, self.blocksize, self.quant_type

    def nested(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What the operators take of scales that are quantized; nothing if they are not."""
        if _BUFFER not in tensors:
            return {}
        return {name: tensors[name] for name in NAMES[1:]} | {"nested_blocksize": self.nested_blocksize}

    def dequantize(self, packed: Tensor, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its shape, and in `dtype` or its own."""
        return torch.ops.bnbops.dequantize_4bit(packed, dtype=dtype or self.dtype, **self.arguments(tensors))

    def state(self, tensors: dict[str, Tensor]) -> QuantState:
        """The registered tensors as bitsandbytes shows them, in the same memory."""
        # .data: a view that autograd knows of keeps its base in use, and torch refuses to swap parameters in use
        absmax, *nested = (tensors[name].data.view(-1) for name in NAMES if name in tensors)
        code = get_4bit_type(self.quant_type, absmax.device)
        own = (torch.Size(self.shape), code, self.blocksize, self.quant_type, self.dtype)
        if not nested:
            return QuantState(from_bits(absmax), *own)
        scales, offset, code = map(from_bits, nested)
        state2 = QuantState(scales, code=code, blocksize=self.nested_blocksize, dtype=torch.float32)
        return QuantState(absmax, *own, offset.view(()), state2)


# ---- the tensors to register, by name ------------------------------------------------------------------------------


def tensors_of(state: QuantState) -> dict[str, Tensor]:
    """They share the state's memory."""
    format = Format.of(state)
    tensors = {"absmax": state.absmax.detach().contiguous() if state.nested else to_bits(state.absmax)}
    if format.by_rows:
        tensors["absmax"] = tensors["absmax"].view(*format.shape[:-1], format.shape[-1] // format.blocksize)
    if state.nested:
        tensors["nested_absmax"] = to_bits(state.state2.absmax)
        tensors["nested_offset"] = to_bits(state.offset.reshape(1))
        tensors[_BUFFER] = to_bits(state.state2.code)
    return tensors


def set_scales(module: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Registers tensors, or the parameters that another module has; of an empty dict the names alone."""
    for name in _PARAMETERS:
        tensor = tensors.get(name)
        new = tensor is not None and not isinstance(tensor, nn.Parameter)
        module.register_parameter(prefix + name, nn.Parameter(tensor, requires_grad=False) if new else tensor)
    module.register_buffer(prefix + _BUFFER, tensors.get(_BUFFER))


def scales_of(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Those that are registered."""
    named = {name: getattr(module, prefix + name) for name in NAMES}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


# ---- checks --------------------------------------------------------------------------------------------------------


def packed_bytes(shape: Sequence[int]) -> int:
    """Two codes a byte."""
    return (math.prod(shape) + 1) // 2


def check_settings(shape: Sequence[int], blocksize: int, quant_type: str, quant_storage: torch.dtype) -> None:
    """Refuses what a weight of this shape cannot be quantized to, by a ValueError that says why."""
    try:
        weight = torch.empty(shape, dtype=torch.float32, device="meta")
        torch.ops.bnbops.quantize_4bit(weight, blocksize, quant_type, quant_storage)
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("bnbops::")) from None


def check_state(packed: Tensor, state: QuantState) -> None:
    """Refuses, by a ValueError, a state that does not belong to `packed` or that the operators cannot compute with."""
    if state.shape is None or state.quant_type is None:
        raise ValueError("a 4-bit quantization state needs a shape and a quant_type")
    if not state.nested and not state.absmax.is_floating_point():
        raise ValueError(f"absmax is {state.absmax.dtype}: codes of scales, but there is no nested_absmax")
    found, needed = packed.nbytes, packed_bytes(state.shape)
    if found != needed:
        raise ValueError(
            f"the codes are {packed.dtype} {list(packed.shape)}, which is {found} bytes, but a weight of shape "
            f"{list(state.shape)} needs {needed}; {NO_NUMBERS}"
        )
    if state.nested and state.absmax.dtype != torch.uint8:
        raise ValueError(f"absmax is {state.absmax.dtype}, expected uint8, codes of scales; {NO_NUMBERS}")
    name, scales = ("nested_absmax", state.state2.absmax) if state.nested else ("absmax", state.absmax)
    if not are_scales(scales):
        raise ValueError(f"{name} has values that are negative, infinite or NaN")
    if state.nested and not is_finite(state.offset.view(1)):
        raise ValueError("nested_offset is infinite or NaN")
    # Operators check tensors without data as they check others.
    arguments = {"A": packed, "dtype": state.dtype, **weight_arguments(state)}
    try:
        torch.ops.bnbops.dequantize_4bit(**tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments))
    except RuntimeError as error:
        raise ValueError(str(error).removeprefix("bnbops::")) from None
    if state.code is not None and not state.code.is_meta:
        expected = get_4bit_type(state.quant_type, state.code.device)
        if state.code.shape != expected.shape or (state.code - expected).abs().max() > 1e-6:
            raise ValueError(f"the quant_map is not that of {state.quant_type}: {state.code.tolist()}")
