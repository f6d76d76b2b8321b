"""What modules with a 4-bit weight share: quantization, casts and state dicts of the tensors that hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnbops.default_device import traceable_weight
from bnbops.dtensors import is_dtensor
from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.four_bit.scales import (
    BUFFER,
    NAMES,
    PARAMETERS,
    Format,
    as_arguments,
    check_entry,
    check_settings,
    check_state,
    entries_of,
    in_rows,
    packed_bytes,
    register_scales,
    save,
    scales_of,
    set_scales,
    state_of,
    take_statistics,
    tensors_of,
)
from bnbops.nn.weights.codes import check_name, check_size, no_reset
from bnbops.nn.weights.parameter import sparing_integers
from bnbops.nn.weights.plain_state import of_quantized_layer, of_whole_layer
from bnbops.nn.weights.tied import entries_before, hold, others, saved_as

_PREFIX = "weight_"


class Weight4bit(nn.Module):
    """Mixed into a module class before the one that makes its float `weight`.

    Quantized, a module has its weight in plain tensors (`bnbops.nn.four_bit.scales`): `weight`, packed, a Params4bit
    unless something has replaced it (FSDP does), and its scales, `weight_absmax` and, doubly quantized,
    `weight_nested_absmax`, `weight_nested_offset` and `weight_nested_code`. They are all that `forward` reads.
    `weight.quant_state` and `quant_state` show the same tensors.
    """

    _format: Format | None = None  # None: the weight is not quantized

    def _make_4bit(
        self, blocksize: int, compress_statistics: bool, quant_type: str, quant_storage: torch.dtype
    ) -> None:
        """Puts a Params4bit in the place of the float weight."""
        self._shape = tuple(self.weight.shape)
        check_settings(self._shape, blocksize, quant_type, quant_storage)
        self.quant_storage = quant_storage
        register_scales(self, _PREFIX)
        self.weight = Params4bit(
            self.weight.data,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    @property
    def quant_state(self) -> QuantState | None:
        """Scales and description of the weight, or None before quantization. Assigning one replaces the scales.

        Raises:
            RuntimeError: the weight is sharded, and not gathered at the moment.
        """
        if self._format is None:
            return None
        if is_dtensor(self.weight_absmax):
            raise RuntimeError(
                f"the weight of this {type(self).__name__} is sharded: call unshard() on the module that fully_shard "
                "was given, which gathers weight and scales, and reshard() afterwards"
            )
        return state_of(scales_of(self, _PREFIX), self._format)

    @quant_state.setter
    def quant_state(self, state: QuantState) -> None:
        check_state(self.weight.data, state)
        self._check_shape(state)
        self._set_scales(state)
        self._link()

    def reset_parameters(self) -> None:
        """Draws a float weight anew.

        Raises:
            RuntimeError: the weight is quantized.
        """
        if self._format is not None:
            raise RuntimeError(no_reset(self))
        super().reset_parameters()

    def _arguments(self) -> tuple[Tensor, Tensor, int, str, dict[str, Any]]:
        """The weight, absmax, blocksize, quant_type and the nested arguments of an operator."""
        if self._format is None:
            raise RuntimeError(
                f"the weight of this {type(self).__name__} is not quantized yet: load its float weights, then call "
                f'.to(device) on it (for example .to("cpu")), and shard it, if at all, only then'
            )
        weight = traceable_weight(self.weight)  # read once: data_parallel gathers it at each read
        if weight.dtype != self.quant_storage:
            raise RuntimeError(
                f"the packed weight of this {type(self).__name__} has been cast from {self.quant_storage} to "
                f"{weight.dtype}: choose quant_storage=torch.uint8, which neither casts of a sharded model nor "
                "FSDP's mixed precision touch, or their dtype"
            )
        absmax, nested = as_arguments(scales_of(self, _PREFIX), self._format)
        return weight, absmax, self._format.blocksize, self._format.quant_type, nested

    def _describe_4bit(self) -> str:
        weight, format = self.weight, self._format
        if format is None:
            return f"{getattr(weight, 'quant_type', '4 bits')}, not quantized yet"
        nested = ", double quantization" if self.weight_nested_absmax is not None else ""
        return f"{format.quant_type}, blocksize={format.blocksize}{nested}"

    # ---- how the weight gets here ------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, but a quantized Params4bit that becomes `weight` brings its scales with it, and a plain float
        parameter becomes a Params4bit, to be quantized.

        Raises:
            ValueError: a weight of another shape.
        """
        if name != "weight":
            check_name(name, param)
            super().register_parameter(name, param)
            return
        param = self._as_params_4bit(param)
        adopts = isinstance(param, Params4bit)
        if adopts and param.quant_state is not None:
            self._check_shape(param.quant_state)
        super().register_parameter(name, param)
        if adopts:
            self._adopt(param)

    def _as_params_4bit(self, param: nn.Parameter | None) -> nn.Parameter | None:
        held = self._parameters.get("weight")
        if type(param) is not nn.Parameter or not isinstance(held, Params4bit):
            return param
        if param.is_floating_point() and tuple(param.shape) == self._shape:
            new = held._float(param.data, param.requires_grad)
        elif param.nbytes != packed_bytes(self._shape):
            check_size(self, param.shape, f"weight ({param.dtype})")
            return param
        elif held.bnb_quantized:
            new = held._with(param.data)
        else:
            return param
        vars(new).update(vars(param))  # Transformers marks what it has loaded, and draws the others anew
        return new

    def _adopt(self, weight: Params4bit) -> None:
        """Takes the scales that the weight brings along; a tied weight's from the module that has them."""
        owner = weight.module
        tied = isinstance(owner, Weight4bit) and owner is not self and owner._parameters.get("weight") is weight
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

    def _check_shape(self, state: QuantState) -> None:
        check_size(self, state.shape, "quantized weight")

    def _set_scales(self, state: QuantState | None) -> None:
        """Registers new scales, here and in the modules that share the weight."""
        set_scales(self, _PREFIX, {} if state is None else tensors_of(state))
        self._format = None if state is None else Format.of(state)
        weight = self._parameters.get("weight")
        for other in others(weight, self) if isinstance(weight, Params4bit) else ():
            other._share_scales(self)
            other._link()

    def _share_scales(self, owner: Weight4bit) -> None:
        """Registers what another module has."""
        self._format = owner._format
        for name in PARAMETERS:
            self._parameters[_PREFIX + name] = owner._parameters[_PREFIX + name]
        self._buffers[_PREFIX + BUFFER] = owner._buffers[_PREFIX + BUFFER]

    def _link(self) -> None:
        """Lets a Params4bit show what the module holds."""
        weight = self._parameters.get("weight")
        if not isinstance(weight, Params4bit):
            return
        if weight.module is None:
            weight.module = self
        hold(weight, self)
        if self._format is not None and weight.bnb_quantized:
            weight.data = in_rows(weight.data, self._format)
            self.quant_storage = weight.dtype
            with lasting():
                weight.quant_state = self.quant_state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weight, fn = self._parameters.get("weight"), sparing_integers(fn)
        if not isinstance(weight, Params4bit):
            return super()._apply(fn, recurse)
        rest = nn.Module()  # without the weight: torch would make a plain Parameter of it
        vars(rest).update(_buffers=self._buffers, _modules=self._modules)
        vars(rest)["_parameters"] = {name: param for name, param in self._parameters.items() if name != "weight"}
        rest._apply(fn, recurse)
        self._parameters.update(rest._parameters)
        self._parameters["weight"] = weight = weight._converted(fn)
        if weight.bnb_quantized and self._format is None:
            self._adopt(weight)  # tied: the other module has quantized it
        self._link()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()  # copies and unpickled modules

    # ---- state dicts -------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """bitsandbytes' keys; without all of the data at hand (sharded, meta) the tensors by their own names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters["weight"]
        if self._format is None or not isinstance(weight, Params4bit) or weight.is_meta:
            return
        for name in NAMES:
            destination.pop(prefix + _PREFIX + name, None)
        state, key = weight.quant_state, prefix + "weight"
        first = saved_as(weight, destination, key)
        if first == key:
            save(destination, key, weight, state)
            return
        # Tied: the same tensors under both names, so that savers which leave out duplicates leave out all of them.
        for name in ("", *(f".{entry}" for entry in entries_of(state))):
            destination[key + name] = destination[first + name]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes bitsandbytes' keys, a float weight, or the tensors by their own names."""
        key, rest = prefix + "weight", (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        own_names = {prefix + _PREFIX + name for name in NAMES}
        statistics = take_statistics(state_dict, key) if isinstance(self.weight, Params4bit) else {}
        if statistics:  # they count: torch's set_model_state_dict adds what the module has, by its own names
            state_dict = {name: value for name, value in state_dict.items() if name not in own_names}
        by_own_names = prefix + _PREFIX + "absmax" in state_dict or not isinstance(self.weight, Params4bit)
        stays_float = self._format is None and not statistics and not assign
        if by_own_names and (misfit := self._misfit(state_dict, key)) is not None:
            error_msgs.append(misfit)
            return
        if by_own_names or stays_float:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            self._link()
            return
        weight = state_dict.pop(key, None)
        entries = [] if self._format is None else entries_of(self.quant_state)
        entries = entries_before(self.weight, missing_keys, entries)
        if statistics and not assign:
            self._materialize(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # the others; misses the ones of the weight
        missing_keys[:] = [name for name in missing_keys if name != key and name not in own_names]
        if weight is None:
            # Of a tied weight the statistics that are there are only those that a saver has not left out.
            found = () if others(self.weight, self) else statistics
            missing_keys += [key, *(f"{key}.{name}" for name in entries if name not in found)]
            return
        try:
            self._load_weight(weight, statistics, assign)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{key}: {error}")

    def _misfit(self, state_dict: dict[str, Any], key: str) -> str | None:
        """Why the weight cannot be loaded by its own name: torch would cast it to other codes."""
        weight, held = state_dict.get(key), self.weight
        if not isinstance(weight, Tensor):
            return None
        if self._format is None:
            return of_quantized_layer(key) if key + "_absmax" in state_dict else None
        if weight.dtype != held.dtype or take_statistics(dict(state_dict), key):
            return of_whole_layer(key, weight, held)
        return None

    def _materialize(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Where the weight gets data, the other parameters on the meta device do, too."""
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter is not None and parameter.is_meta and value is not None:
                empty = torch.empty_like(parameter, device=value.device)
                self._parameters[name] = nn.Parameter(empty, parameter.requires_grad)

    def _load_weight(self, data: Tensor, statistics: dict[str, Tensor], assign: bool) -> None:
        """Packed codes with what describes them, or floats, which a quantized module quantizes. `assign` takes the
        tensors themselves, on their device."""
        check_entry(data, statistics, self._shape)
        weight = self.weight
        device = data.device if assign or weight.is_meta else weight.device
        if statistics:
            new = Params4bit.from_prequantized(data, statistics, device=device)
            self._check_shape(new.quant_state)
            self._replace_weight(new, assign)
            return
        new = weight._float(data)
        if self._format is None:
            self.weight = new
        else:
            self._replace_weight(new.to(device), assign)

    @torch.no_grad()
    def _replace_weight(self, new: Params4bit, assign: bool) -> None:
        """In place where the tensors fit, or at least the parameter, which may be tied; never so for `assign`."""
        weight = self.weight
        if assign:
            self.weight = new
            return
        if weight.bnb_quantized and self._format is None:
            self._adopt(weight)  # tied: the other module has loaded it
        tensors, held = tensors_of(new.quant_state), scales_of(self, _PREFIX)
        fits = Format.of(new.quant_state) == self._format and tensors.keys() == held.keys()
        if fits and weight.dtype == new.dtype and not weight.is_meta:
            weight.copy_(in_rows(new.data, self._format))
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
            return
        with lasting(weight):
            new = copy.deepcopy(new)  # its tensors are the caller's
        if torch._has_compatible_shallow_copy_type(weight, new):
            weight._become(new)
            weight.module = self
            new = weight
        self.weight = new
