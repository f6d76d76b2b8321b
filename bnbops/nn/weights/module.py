"""What may be asked of every quantized weight, whatever its kind, and what the modules that hold one share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnbops.dtensors import is_dtensor
from bnbops.lasting import lasting
from bnbops.nn.weights.codes import check_name
from bnbops.nn.weights.numbers import is_finite
from bnbops.nn.weights.parameter import QuantizedParameter, sparing_integers
from bnbops.nn.weights.tied import saved_as
from bnbops.tracing import is_compiling

LOADING_ERRORS = (AttributeError, KeyError, TypeError, ValueError, RuntimeError)  # of entries that do not fit


class QuantizedWeight:
    """A weight that is held as codes and scales: by a module of ours (`QuantizedModule`), or by a parametrization.

    is_quantized: whether it is in 4 or 8 bits (not one that stays a float, or is to be quantized yet).
    weight_shape: that of the float weight.
    tensors(): what is registered of it, the codes first, by the names that the module which registers it uses.
    held(): a parameter that has the codes, and what they mean.

    And for what follows: `_dequantized(dtype)`, `_requantized(floats)`, `_put(parameter)`, which makes it the weight,
    and `_has_format_of(parameter)`: whether its codes and scales are laid out as those that are held.
    """

    is_quantized: bool
    weight_shape: tuple[int, ...]

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its shape.

        Args:
            dtype: by default that of the weight before it was quantized; fp32 for 8 bits, which do not keep it.

        Raises:
            RuntimeError: the weight is sharded, and not gathered at the moment.
        """
        self._check_gathered()
        return self._dequantized(dtype)

    def _check_gathered(self) -> None:
        if is_dtensor(next(iter(self.tensors().values()))):
            raise RuntimeError(
                f"the weight of this {type(self).__name__} is sharded: call unshard() on the module that fully_shard "
                "was given, which gathers weight and scales, and reshard() afterwards; to merge adapters, load the "
                "model into one process"
            )

    @torch.no_grad()
    def requantized(self, weight: Tensor) -> QuantizedParameter:
        """A float weight as it would be held here: of the same format and on the same device. Nothing is changed.

        Raises:
            ValueError: a weight with values that are NaN or infinite (8 bits: or beyond 65504).
        """
        if not is_finite(weight):
            raise ValueError("the weight has NaN or infinite values, so it cannot be quantized")
        return self._requantized(weight)

    def hold(self, weight: QuantizedParameter) -> None:
        """Takes another weight of the same kind and shape, on the device of the former."""
        self._put(weight.to(next(iter(self.tensors().values())).device))

    @torch.no_grad()
    def _replace(self, new: QuantizedParameter, assign: bool) -> None:
        """In place where the tensors fit, or at least the parameter, which may be tied; never so for `assign`."""
        if not assign:
            fits, others = self._has_format_of(new), list(new._scale_tensors().values())
            codes, *scales = self.tensors().values()
            if fits and len(scales) == len(others) and not codes.is_meta:
                codes.copy_(new.data.reshape(-1).view(codes.dtype).view(codes.shape))
                for scale, other in zip(scales, others, strict=True):
                    scale.copy_(other)
                return
            with lasting(codes):
                new = deepcopy(new)  # its tensors are the caller's
            if isinstance(codes, QuantizedParameter) and torch._has_compatible_shallow_copy_type(codes, new):
                codes._become(new)
                new = codes
        self._put(new)


class QuantizedModule(QuantizedWeight, nn.Module):
    """Mixed into a module class before the one that makes its float `weight`.

    The weight and its scales are plain tensors to whatever walks the parameters of a model, and all that `forward`
    reads. State dicts have bitsandbytes' entries; those of sharded modules the tensors by the names that are
    registered. Any module loads either, or a float weight, which is quantized if the module is.

    What a kind of weights defines:

    _scale_names: what a quantized module registers beside "weight".
    _accepted(parameter): what becomes `weight` if this parameter is assigned. Raises ValueError if it does not fit.
    _adopt(weight): registers the scales that a new weight brings with it, if it is of this kind.
    _is_whole(): whether all of the data are at hand, as bitsandbytes' entries need them (neither sharded nor meta).
    _entries(key, keep_vars): the entries of the weight, which is called `key`.
    _entries_again(key, first, state_dict): the same of one that another module has saved there before, as `first`.
    _take(state_dict, key, assign, missing_keys): removes from a state dict what is to become the weight, and returns
        that, or None, where there is no weight, or torch is to load it by the names that are registered; and what is
        missing of a weight's entries, or None, where torch is to say it. Raises ValueError.
    _loaded_by_torch(before): called if `_take` has returned None, after torch's loading; the weight was `before`.
    """

    _scale_names: ClassVar[tuple[str, ...]]
    _has_properties: ClassVar[bool]  # the class, in the place of what is registered, as those of parametrizations have
    _shape: tuple[int, ...]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._has_properties = any(hasattr(cls, name) for name in ("weight", *getattr(cls, "_scale_names", ())))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self._shape

    def tensors(self) -> dict[str, Tensor]:
        names = ("weight", *self._scale_names)
        return {name: tensor for name, tensor in zip(names, self._held(), strict=True) if tensor is not None}

    def _held(self) -> list[Tensor | None]:
        """`weight`, and what `_scale_names` name, each read once: data_parallel gathers it at each read. From where
        torch keeps them, if they are there: its `__getattr__`, name by name, takes as long as a small product."""
        names = ("weight", *self._scale_names)
        if not (self._has_properties or is_compiling()):
            registered = {**self._parameters, **self._buffers}
            if all(map(registered.__contains__, names)):
                return [registered[name] for name in names]
        return [getattr(self, name) for name in names]

    def held(self) -> QuantizedParameter:
        return self.weight

    def _put(self, weight: QuantizedParameter) -> None:
        self.weight = weight

    def reset_parameters(self) -> None:
        """Draws a float weight anew.

        Raises:
            RuntimeError: the weight is quantized.
        """
        if self.is_quantized:
            raise RuntimeError(
                f"the weight of this {type(self).__name__} is quantized, so it cannot be drawn anew: load a state "
                "dict, assign a weight, or make a new layer"
            )
        super().reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, but what becomes `weight` brings its scales with it.

        Raises:
            ValueError: a weight of another shape, or with scales that do not fit it.
        """
        if name != "weight":
            check_name(name, param)
            super().register_parameter(name, param)
        else:
            param = self._accepted(param)
            super().register_parameter(name, param)
            self._adopt(param)

    def _over_nested(self, x: Tensor) -> Tensor:
        """What `forward`, which takes every position by itself, makes of a nested tensor: one in the same layout."""
        if x.layout == torch.jagged:
            return torch.nested.nested_tensor_from_jagged(self.forward(x.values()), x.offsets(), x.lengths())
        return torch.nested.as_nested_tensor([self.forward(part) for part in x.unbind()])

    def _check_size(self, shape: Sequence[int], what: str) -> None:
        if tuple(shape) != self._shape:
            raise ValueError(
                f"the {what} has shape {list(shape)}, but this {type(self).__name__} needs {list(self._shape)}: make a "
                "new layer for it, or resize before quantization"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weight, fn = self._parameters.get("weight"), sparing_integers(fn)
        if not isinstance(weight, QuantizedParameter):
            return super()._apply(fn, recurse)
        rest = nn.Module()  # without the weight: torch would make a plain Parameter of it
        vars(rest).update(_buffers=self._buffers, _modules=self._modules)
        vars(rest)["_parameters"] = {name: param for name, param in self._parameters.items() if name != "weight"}
        rest._apply(fn, recurse)
        self._parameters.update(rest._parameters)
        self._parameters["weight"] = weight._converted(fn)
        return self

    # ---- state dicts -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._is_whole():
            return
        key = prefix + "weight"
        for name in self._scale_names:
            destination.pop(prefix + name, None)
        if not self.is_quantized:
            return
        if (first := saved_as(self.weight, destination, key)) == key:
            destination.update(self._entries(key, keep_vars))
        else:
            destination.update(self._entries_again(key, first, destination))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *reports: list[str]
    ) -> None:
        missing_keys, _, error_msgs = reports
        key, assign = prefix + "weight", local_metadata.get("assign_to_params_buffers", False)
        state_dict, before = dict(state_dict), self.weight
        try:
            new, absent = self._take(state_dict, key, assign, missing_keys)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if new is not None and not assign:
            self._materialize(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        if absent is not None:
            own = {key, *(prefix + name for name in self._scale_names)}
            missing_keys[:] = [name for name in missing_keys if name not in own]
            missing_keys += absent
        if new is None:
            self._loaded_by_torch(before)
            return
        try:
            self._replace(new, assign)
        except LOADING_ERRORS as error:
            error_msgs.append(f"{key}: {error}")

    def _check_own_names(self, key: str, weight: Tensor, quantized: bool, whole: bool) -> None:
        """Refuses a weight that cannot be loaded by its own name, since torch would cast it.

        quantized: whether it is in codes, with their scales by the names that are registered.
        whole: whether it comes with bitsandbytes' entries.
        """
        if quantized and not self.is_quantized:
            raise ValueError(
                f"{key} is quantized, but this layer is not: quantize before fully_shard (bnbops.nn.quantize_ also "
                "does it on the meta device)"
            )
        if self.is_quantized and (whole or weight.dtype != self.weight.dtype):
            raise ValueError(of_whole_layer(key, weight, self.weight))

    def _device_for(self, assign: bool) -> torch.device | None:
        """Of what is loaded; None: the device that it is on. `assign` takes the tensors themselves."""
        return None if assign or self.weight.is_meta else self.weight.device

    def _materialize(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Where the weight gets data, the other parameters on the meta device do, too."""
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter is not None and parameter.is_meta and isinstance(value, Tensor):
                empty = torch.empty_like(parameter, device=value.device)
                self._parameters[name] = nn.Parameter(empty, parameter.requires_grad)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is one of ours, and its weight is quantized."""
    return isinstance(module, QuantizedModule) and module.is_quantized


def of_whole_layer(key: str, weight: Tensor, held: Tensor) -> str:
    """The error that `weight` is in a format that a sharded layer cannot take."""
    return (
        f"{key}: expected a {held.dtype} tensor, and its scales, by the names that sharded layers give them, got "
        f"{weight.dtype} or the entries of a whole layer: load those into a model that is quantized and not sharded, "
        "and use bnbops.nn.plain_state_dict of it"
    )
