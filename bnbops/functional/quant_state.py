"""QuantState: what it takes, beside the codes, to undo a quantization."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnbops.facts import FORMATS_4BIT

# To add to what is wrong with the entries of a state dict.
NO_NUMBERS = "quantized entries cannot be averaged or cast: do that with the float weights, and quantize the result"
PACKED = "quant_state.bitsandbytes__"  # and the quant_type
_KEYS = ("absmax", "quant_map", "blocksize", "dtype", "quant_type", "shape")
_NESTED_KEYS = ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")


def _pack(source_dict: dict[str, Any]) -> Tensor:
    """JSON text as a uint8 tensor, so that a state dict holds tensors only."""
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


def _unpack(tensor_data: Tensor, key: str = "tensor_data") -> dict[str, Any]:
    if tensor_data.dtype != torch.uint8:
        raise ValueError(f"{key} is {tensor_data.dtype}, expected uint8, the bytes of a text; {NO_NUMBERS}")
    try:
        values = json.loads(bytes(tensor_data.cpu().tolist()).decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{key} is not the JSON text of a quantization state: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{key} is not the JSON text of a quantization state, but of a {type(values).__name__}")
    return values


def _check_complete(values: dict[str, Any]) -> None:
    needed = (*_KEYS, *(_NESTED_KEYS if "nested_absmax" in values else ()))
    if missing := [name for name in needed if name not in values]:
        raise ValueError(
            f"there is no {', '.join(missing)} in the quantization state, only {', '.join(sorted(values))}"
        )
    for name in needed:
        if name.endswith(("absmax", "quant_map")) and not isinstance(values[name], Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(values[name]).__name__}")


def _dtype_from_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"'{name}' is not the name of a torch dtype")
    return dtype


@dataclass(eq=False, repr=False)
class QuantState:
    """Scales and description of a quantized tensor, attribute for attribute as bitsandbytes has it.

    Attributes:
        absmax: fp32 scales, one a block; uint8 codes of them where `nested`.
        shape: shape of the original tensor, or None.
        code: fp32 codebook.
        blocksize: elements that share a scale.
        quant_type: the 4-bit format, or None (8-bit blocks).
        dtype: dtype of the original tensor.
        offset: 0-dim fp32 mean that was subtracted from the scales before they were quantized (nested), or None.
        state2: QuantState of the scales (nested), or None.
    """

    absmax: Tensor
    shape: torch.Size | None = None
    code: Tensor | None = None
    blocksize: int | None = None
    quant_type: str | None = None
    dtype: torch.dtype | None = None
    offset: Tensor | None = None
    state2: QuantState | None = None

    valid_quant_types = FORMATS_4BIT
    valid_qs_keys = (*_KEYS, *_NESTED_KEYS, "quant_state")
    valid_qs_type_keys = tuple(f"bitsandbytes__{quant_type}" for quant_type in FORMATS_4BIT)

    def __post_init__(self) -> None:
        self.nested = self.state2 is not None

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """The inverse of `as_dict`, packed or not. Keys may carry a prefix ("weight.absmax"); the dict is not changed.

        Raises:
            ValueError: keys that do not make a quantization state.
        """
        values = dict(qs_dict)
        packed = [k for k, v in values.items() if "quant_state" in k and isinstance(v, Tensor)]
        if len(packed) > 1 or (not packed and "quant_type" not in {k.split(".")[-1] for k in values}):
            expected = f"{PACKED}{' or ...'.join(FORMATS_4BIT)}"
            raise ValueError(
                f"expected exactly one packed item ending in {expected}, or unpacked items with 'quant_type'; "
                f"got the keys {sorted(values)}"
            )
        for key in packed:
            values.update(_unpack(values.pop(key), key))
        values = {k.split(".")[-1]: v for k, v in values.items()}
        if unknown := values.keys() - set(cls.valid_qs_keys):
            raise ValueError(f"unknown keys in a quantization state: {sorted(unknown)}")
        _check_complete(values)

        def described(prefix: str, **others: Any) -> QuantState:
            return cls(
                absmax=values[prefix + "absmax"].to(device),
                code=values[prefix + "quant_map"].to(device),
                blocksize=values[prefix + "blocksize"],
                dtype=_dtype_from_name(values[prefix + "dtype"]),
                **others,
            )

        nested: dict[str, Any] = {}
        if "nested_absmax" in values:
            offset = torch.tensor(float(values["nested_offset"]), dtype=torch.float32, device=device)
            nested = {"offset": offset, "state2": described("nested_")}
        shape = None if values["shape"] is None else torch.Size(values["shape"])
        return described("", shape=shape, quant_type=values["quant_type"], **nested)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Tensors and plain values by bitsandbytes' names; `packed` puts the plain values into one uint8 tensor."""

        def described(state: QuantState, prefix: str) -> dict[str, Any]:
            dtype = str(state.dtype).removeprefix("torch.")
            values = {"absmax": state.absmax, "blocksize": state.blocksize, "quant_map": state.code, "dtype": dtype}
            return {prefix + name: value for name, value in values.items()}

        shape = None if self.shape is None else tuple(self.shape)
        values = {"quant_type": self.quant_type, **described(self, ""), "shape": shape}
        if self.state2 is not None:
            assert self.state2.code is not None and self.offset is not None
            values |= described(self.state2, "nested_")
            values["nested_quant_map"] = self.state2.code.clone()  # safetensors refuses tensors that share memory
            values["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return values
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        plain = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        return tensors | {PACKED + self.quant_type: _pack(plain)}

    def to(self, device: torch.device | str) -> None:
        """Moves all tensors, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    def __getattr__(self, name: str) -> Any:
        # FSDP resolves the dotted state-dict key "quant_state.bitsandbytes__nf4" attribute by attribute.
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if (key := "quant_state." + name) in packed:
                return packed[key]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __getitem__(self, index: int) -> Any:
        """The older form of a state, a list."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, Tensor) and isinstance(b, Tensor):
                return torch.equal(a, b)
            return type(a) is type(b) and a == b

        return all(same(getattr(self, name), getattr(other, name)) for name in vars(self))
