"""Params4bit: a weight that becomes 4 bits wide when it is moved to a device."""

from __future__ import annotations

import weakref
from copy import copy, deepcopy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bnbops.functional.four_bit import quantize_4bit, weight_arguments
from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting
from bnbops.nn.four_bit.format import Format, check_state, packed_bytes, tensors_of
from bnbops.nn.weights.memory import give_back
from bnbops.nn.weights.parameter import QuantizedParameter

# What the constructor takes beside the data, and what `__dict__` holds.
SETTINGS = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
_ATTRIBUTES = ("quant_state", *SETTINGS, "module", "bnb_quantized")


def _of_state(path: str) -> property:
    """A read-only attribute of the quantization state: FSDP resolves dotted keys of a state dict by getattr."""

    def get(self: Params4bit) -> Any:
        try:
            return attrgetter(path)(self.quant_state)
        except AttributeError:
            raise AttributeError(f"a '{type(self).__name__}' without {path}: not (doubly) quantized") from None

    return property(get)


def _is_packed(data: Tensor, state: QuantState) -> bool:
    """Whether the data are the codes that `state` describes (not floats to quantize anew)."""
    found, needed = data.nbytes, packed_bytes(state.shape)
    if found != needed and not data.is_floating_point():
        raise ValueError(
            f"the data have {found} bytes, but the quant_state is of a tensor of shape {list(state.shape)}, which has "
            f"{needed} bytes when packed"
        )
    return found == needed


def _moved(state: QuantState, device: torch.device) -> QuantState:
    """A copy on another device; without data to move (meta), the state itself."""
    if state.absmax.is_meta:
        return state
    state = copy(state)
    state.state2 = copy(state.state2)
    state.to(device)
    return state


def _rebuild(
    cls: type,
    data: Tensor,
    requires_grad: bool,
    attributes: dict[str, Any],
    scales: tuple[dict[str, Tensor], Format] | None = None,
) -> Params4bit:
    """An unpickled parameter; `scales` are None if it has none, and in pickles of the time before attributes lost their
    `quant_state`."""
    if scales is not None:
        tensors, format = scales
        attributes |= {"quant_state": format.state(tensors)}
    return cls(data, requires_grad, **attributes)


class Params4bit(QuantizedParameter):
    """A weight that `.to(device)`, `.cuda()` or `.cpu()` quantizes to 4 bits, in place; the meta device does not.

    Before, it is a float parameter like any other. Afterwards its data are packed codes, `quant_state` tells their
    meaning, and casts (`.to(dtype)`, `.half()`) leave them alone, whatever the storage dtype.

    `Params4bit(data, **other.__dict__)` has the settings of another one. Whether it is quantized follows from the data:
    packed codes that `quant_state` describes are, floats are not, and then the state is dropped.

    Args:
        data: a float weight, fp32, bf16 or fp16 when it comes to quantizing, or packed codes with their `quant_state`.
        requires_grad: of a float weight; quantizing turns it off.
        quant_state: of packed codes.
        blocksize, compress_statistics, quant_type, quant_storage: as for `Linear4bit`.
        module: the module whose weight this is; it learns of the quantization. Referenced weakly.
        bnb_quantized: the data are packed codes though no `quant_state` is given.

    Other keyword arguments are ignored.

    Raises:
        ValueError: data that are neither floats nor the codes that `quant_state` describes.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        if quant_state is not None:
            bnb_quantized = _is_packed(data, quant_state)
        data = data.data if isinstance(data, Params4bit) else data
        self = super().__new__(cls, data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state if bnb_quantized else None
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    @lasting()
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int | None = None,
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """A quantized weight from the entries of a state dict.

        Args:
            data: packed codes.
            quantized_stats: "absmax", "quant_map", "quant_state.bitsandbytes__nf4" and so on, with or without a prefix.
            requires_grad: of the parameter.
            device: to put it on; the data's own by default.
            module: the module whose weight it becomes, unless that has a quantized one.

        Raises:
            ValueError: entries that do not describe the data.
        """
        data = data.detach().to(data.device if device is None else device).contiguous()
        state = QuantState.from_dict(quantized_stats, device=data.device)
        check_state(data, state)
        settings = (state.blocksize, state.nested, state.quant_type, data.dtype)
        self = cls(data, requires_grad, state, *settings, module)
        self._tell_module()
        return self

    @classmethod
    def like(cls, state: QuantState, quant_storage: torch.dtype, data: Tensor, device: torch.device) -> Params4bit:
        """Floats in the format of a weight that there is already, but for its dtype."""
        settings = (state.blocksize, state.nested, state.quant_type, quant_storage)
        return cls(data, False, None, *settings)._quantize_on(device)

    absmax, code, offset, state2 = map(_of_state, ("absmax", "code", "offset", "state2"))
    nested_absmax, nested_quant_map = _of_state("state2.absmax"), _of_state("state2.code")
    nested_blocksize, nested_dtype = _of_state("state2.blocksize"), _of_state("state2.dtype")
    quant_map, nested_offset = code, offset

    _values_by = "bnbops.functional.dequantize_4bit(weight.data, weight.quant_state)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in (torch.chunk, torch.split):
            return result
        whole = args[0] if args else kwargs["input" if func is torch.chunk else "tensor"]
        if whole.bnb_quantized:
            return result
        return tuple(whole._float(part, whole.requires_grad, module=None) for part in result)

    @property
    def _holds_codes(self) -> bool:
        return self.bnb_quantized

    def _values(self, dtype: torch.dtype | None) -> Tensor:
        if (state := self.quant_state) is None:
            raise RuntimeError("this Params4bit holds codes, but has no quant_state that tells their meaning")
        dtype = state.dtype if dtype is None else dtype
        exact = torch.float32 if dtype == torch.float64 else dtype
        return torch.ops.bnbops.dequantize_4bit(self.data, dtype=exact, **weight_arguments(state)).to(dtype)

    @property
    def module(self) -> nn.Module | None:
        """The module whose weight this is."""
        reference = self.__dict__.get("module")
        return None if reference is None else reference()

    @module.setter
    def module(self, module: nn.Module | weakref.ref[nn.Module] | None) -> None:
        # What is no module is of another one's `__dict__`.
        self.__dict__["module"] = weakref.ref(module) if isinstance(module, nn.Module) else module

    @property
    def _quantizes(self) -> bool:
        return not self.bnb_quantized

    def _quantize_on(self, device: torch.device) -> Params4bit:
        if self.is_cpu:
            give_back(self.nbytes)  # of the weights before this one
        with lasting(self):
            settings = {name: getattr(self, name) for name in SETTINGS}
            packed, state = quantize_4bit(self.data.to(device).contiguous(), **settings)
            self._become(type(self)(packed, **self._attributes(quant_state=state)))
        self._tell_module()
        return self

    def _scale_tensors(self) -> dict[str, Tensor]:
        return {} if self.quant_state is None else tensors_of(self.quant_state)

    def _tell_module(self) -> None:
        """The module whose weight this is, or shall be, registers the scales."""
        if (adopt := getattr(self.module, "_weight_was_quantized", None)) is not None:
            adopt(self)

    def _with(self, data: Tensor, copy: bool = False) -> Params4bit:
        state = None if self.quant_state is None else _moved(self.quant_state, data.device)
        state = deepcopy(state) if copy else state
        return type(self)(data, self.requires_grad, **self._attributes(quant_state=state))

    def _float(self, data: Tensor, requires_grad: bool = False, **others: Any) -> Params4bit:
        """A float parameter with this one's settings, but for `others`."""
        return type(self)(data, requires_grad, **self._attributes(quant_state=None, bnb_quantized=False, **others))

    def module_load(self, other: Tensor, assign: bool = False) -> Params4bit:
        """What torch swaps this parameter with when it loads `other` (`set_swap_module_params_on_conversion`)."""
        return self._with(other.detach() if assign else torch.empty_like(self.data).copy_(other))

    def __copy__(self) -> Params4bit:
        return type(self)(self.data, self.requires_grad, **self._attributes())

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        """A copy is no module's weight until it is registered in one."""
        attributes = self._attributes(quant_state=deepcopy(self.quant_state, memo), module=None)
        return type(self)(self.data.clone(), self.requires_grad, **attributes)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The tensors that a module registers, no views of another dtype and no copies: torch.save refuses memory of two
        # dtypes, and what other processes are to share must live until they have opened it.
        state = self.quant_state
        scales = None if state is None else (tensors_of(state), Format.of(state))
        attributes = self._attributes(quant_state=None, module=None)
        return _rebuild, (type(self), self.data, self.requires_grad, attributes, scales)

    def _attributes(self, **others: Any) -> dict[str, Any]:
        """What the constructor takes beside the data, `others` in the place of this parameter's own."""
        return {name: self.__dict__[name] for name in _ATTRIBUTES} | others


torch.serialization.add_safe_globals([Params4bit, Format, _rebuild])  # they run no code of a file
