"""What modules with a 4-bit weight share: how it gets there, casts, and its entries in state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting
from bnbops.nn.four_bit.entries import STATISTICS, entries, keys_of, take_statistics, weight_of
from bnbops.nn.four_bit.format import (
    NAMES,
    Format,
    check_settings,
    check_state,
    packed_bytes,
    scales_of,
    set_scales,
    tensors_of,
)
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.weights.module import LOADING_ERRORS, QuantizedModule
from bnbops.nn.weights.tied import entries_before, hold, others
from bnbops.tracing import traceable_weight

_PREFIX = "weight_"


class Module4bit(QuantizedModule):
    """A module with a 4-bit `weight`.

    Quantized, a module has it in plain tensors (`bnbops.nn.four_bit.format`): `weight`, packed, a Params4bit unless
    something has replaced it (FSDP does), and its scales, `weight_absmax` and, doubly quantized,
    `weight_nested_absmax`, `weight_nested_offset` and `weight_nested_code`. `weight.quant_state` and `quant_state`
    show the same tensors.
    """

    _scale_names = tuple(_PREFIX + name for name in NAMES)
    _format: Format | None = None  # None: the weight is not quantized

    def _make_4bit(
        self, blocksize: int, compress_statistics: bool, quant_type: str, quant_storage: torch.dtype
    ) -> None:
        """Puts a Params4bit in the place of the float weight."""
        self._shape = tuple(self.weight.shape)
        check_settings(self._shape, blocksize, quant_type, quant_storage)
        self.quant_storage = quant_storage
        set_scales(self, _PREFIX, {})
        settings = (blocksize, compress_statistics, quant_type, quant_storage)
        self.weight = Params4bit(self.weight.data, False, None, *settings)

    @property
    def quant_state(self) -> QuantState | None:
        """Scales and description of the weight, or None before quantization. Assigning one replaces the scales.

        Raises:
            RuntimeError: the weight is sharded, and not gathered at the moment.
        """
        if self._format is None:
            return None
        self._check_gathered()
        return self._format.state(scales_of(self, _PREFIX))

    @quant_state.setter
    def quant_state(self, state: QuantState) -> None:
        check_state(self.weight.data, state)
        self._check_size(state.shape, "quantized weight")
        self._set_scales(state)
        self._link()

    @property
    def is_quantized(self) -> bool:
        return self._format is not None

    def _dequantized(self, dtype: torch.dtype | None) -> Tensor:
        weight = self._arguments()["weight"]
        return self._format.dequantize(weight, scales_of(self, _PREFIX), dtype)

    def _requantized(self, weight: Tensor) -> Params4bit:
        new = Params4bit.like(self.quant_state, self.quant_storage, weight, self.weight.device)
        new.quant_state.dtype = self._format.dtype
        return new

    def _arguments(self) -> dict[str, Any]:
        """What an operator takes to know the weight, by name."""
        weight, format, scales = self._quantized_weight()
        return {"weight": weight, **format.arguments(scales)}

    def _quantized_weight(self) -> tuple[Tensor, Format, dict[str, Tensor]]:
        """The codes, what they mean, and the scales, which `NAMES` name; RuntimeError if no operator can take them."""
        if self._format is None:
            raise RuntimeError(
                f"the weight of this {type(self).__name__} is not quantized yet: load its float weights, then call "
                f'.to(device) on it (for example .to("cpu")), and shard it, if at all, only then'
            )
        weight, *scales = self._held()
        weight = traceable_weight(weight)
        if weight.dtype != self.quant_storage:
            raise RuntimeError(
                f"the packed weight of this {type(self).__name__} has been cast from {self.quant_storage} to "
                f"{weight.dtype}: choose quant_storage=torch.uint8, which neither casts of a sharded model nor "
                "FSDP's mixed precision touch, or their dtype"
            )
        named = {name: tensor for name, tensor in zip(NAMES, scales, strict=True) if tensor is not None}
        return weight, self._format, named

    def extra_repr(self) -> str:
        """As in torch, with the format."""
        of_layer, format = super().extra_repr(), self._format
        if format is None:
            return f"{of_layer}, {getattr(self.weight, 'quant_type', '4 bits')}, not quantized yet"
        nested = ", double quantization" if self.weight_nested_absmax is not None else ""
        return f"{of_layer}, {format.quant_type}, blocksize={format.blocksize}{nested}"

    # ---- how the weight gets here ------------------------------------------------------------------------------

    def _accepted(self, param: nn.Parameter | None) -> nn.Parameter | None:
        """A plain float parameter becomes a Params4bit, to be quantized; plain codes become one that is."""
        held = self._parameters.get("weight")
        if isinstance(param, Params4bit) and param.quant_state is not None:
            self._check_size(param.quant_state.shape, "quantized weight")
        if type(param) is not nn.Parameter or not isinstance(held, Params4bit):
            return param
        if param.is_floating_point() and tuple(param.shape) == self._shape:
            new = held._float(param.data, param.requires_grad)
        elif param.nbytes != packed_bytes(self._shape):
            self._check_size(param.shape, f"weight ({param.dtype})")
            return param
        elif held.bnb_quantized:
            new = held._with(param.data)
        else:
            return param
        vars(new).update(vars(param))  # Transformers marks what it has loaded, and draws the others anew
        return new

    def _adopt(self, weight: nn.Parameter | None) -> None:
        """A tied weight's scales are those of the module that has them."""
        if not isinstance(weight, Params4bit):
            return
        owner = weight.module
        tied = isinstance(owner, Module4bit) and owner is not self and owner._parameters.get("weight") is weight
        if not tied:
            weight.module = self
        if tied and owner._format is not None:
            self._share_scales(owner)
        elif not weight.bnb_quantized:
            self._set_scales(None)
        elif weight.quant_state is not None:
            self._set_scales(weight.quant_state)
        self._link()

    def _weight_was_quantized(self, weight: Params4bit) -> None:
        """The weight says so, also before something writes it to `_parameters` (accelerate does)."""
        fits = tuple(weight.quant_state.shape) == self._shape
        if self._parameters.get("weight") is weight or (fits and self._format is None):
            self.register_parameter("weight", weight)

    def _set_scales(self, state: QuantState | None) -> None:
        """Registers new scales, here and in the modules that share the weight."""
        set_scales(self, _PREFIX, {} if state is None else tensors_of(state))
        self._format = None if state is None else Format.of(state)
        weight = self._parameters.get("weight")
        for other in others(weight, self) if isinstance(weight, Params4bit) else ():
            other._share_scales(self)
            other._link()

    def _share_scales(self, owner: Module4bit) -> None:
        self._format = owner._format
        set_scales(self, _PREFIX, scales_of(owner, _PREFIX))

    def _link(self) -> None:
        """Lets a Params4bit show what the module holds."""
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit):
            return
        if weight.module is None:
            weight.module = self
        hold(weight, self)
        if self._format is not None and weight.bnb_quantized:
            weight.data = self._format.in_rows(weight.data)
            self.quant_storage = weight.dtype
            with lasting():
                weight.quant_state = self.quant_state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._adopt_of_other()
        self._link()
        return self

    def _adopt_of_other(self) -> None:
        """Of a tied weight that the other module has quantized, or loaded."""
        weight = self._parameters.get("weight")
        if isinstance(weight, Params4bit) and weight.bnb_quantized and self._format is None:
            self._adopt(weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()  # copies and unpickled modules

    # ---- state dicts -------------------------------------------------------------------------------------------

    def _is_whole(self) -> bool:
        return isinstance(self.weight, Params4bit) and not self.weight.is_meta

    def _entries(self, key: str, keep_vars: bool) -> dict[str, Tensor]:
        return entries(key, self.weight, self.weight.quant_state)

    def _entries_again(self, key: str, first: str, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """The same tensors, so that savers which leave out duplicates leave out all of them."""
        names = [key, *keys_of(key, self.weight.quant_state)]
        return {name: state_dict[first + name.removeprefix(key)] for name in names}

    def _take(
        self, state_dict: dict[str, Any], key: str, assign: bool, missing_keys: list[str]
    ) -> tuple[Params4bit | None, list[str] | None]:
        held = self.weight
        statistics = take_statistics(state_dict, key) if isinstance(held, Params4bit) else {}
        if statistics:  # they count: torch's set_model_state_dict adds what the module has, by its own names
            for name in NAMES:
                state_dict.pop(f"{key}_{name}", None)
        own = key + "_absmax" in state_dict
        if own or not isinstance(held, Params4bit):
            if isinstance(weight := state_dict.get(key), Tensor):
                whole = any(f"{key}.{name}" in state_dict for name in STATISTICS)
                self._check_own_names(key, weight, own, whole)
            return None, None
        if self._format is None and not statistics and not assign:
            return None, None
        absent = [] if self._format is None else keys_of("", self.quant_state)
        absent = entries_before(held, missing_keys, absent)
        if key not in state_dict:
            # Of a tied weight the statistics that are there are only those that a saver has not left out.
            found = () if others(held, self) else [f".{name}" for name in statistics]
            return None, [key, *(key + name for name in absent if name not in found)]
        data, device = state_dict.pop(key), self._device_for(assign)
        try:
            if (new := weight_of(data, statistics, self._shape, device)) is None:
                new = held._float(data)
                new = new if self._format is None else new.to(device or data.device)
        except LOADING_ERRORS as error:
            raise ValueError(f"{key}: {error}") from None
        return new, []

    def _loaded_by_torch(self, before: nn.Parameter) -> None:
        self._link()

    def _has_format_of(self, new: Params4bit) -> bool:
        self._adopt_of_other()
        return Format.of(new.quant_state) == self._format and self.weight.dtype == new.dtype
