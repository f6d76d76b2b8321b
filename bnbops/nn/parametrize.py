"""Any parameter in 4 bits, of a module that knows nothing of it: dequantized where the module reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbops.dtensors import is_dtensor
from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting
from bnbops.nn import forwards
from bnbops.nn.four_bit.entries import entries, take_statistics, weight_of
from bnbops.nn.four_bit.format import Format, scales_of, set_scales, tensors_of
from bnbops.nn.four_bit.parameter import Params4bit
from bnbops.nn.weights.module import LOADING_ERRORS, QuantizedWeight, of_whole_layer
from bnbops.nn.weights.parameter import QuantizedParameter
from bnbops.tracing import is_compiling

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Dequantizes a packed parameter, whose scales it holds (see `bnbops.nn.four_bit.format`).

    While the module that has the parameter is in `forward`, all reads of a thread get the same tensor, unless weights
    are loaded meanwhile; compiled code does not need that. No gradient flows to the codes.
    """

    def __init__(self, quant_state: QuantState, quant_storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.hold(quant_state, quant_storage)

    def hold(self, quant_state: QuantState, quant_storage: torch.dtype) -> None:
        """Describes other codes from now on."""
        self.quant_storage, self.format = quant_storage, Format.of(quant_state)
        set_scales(self, "", tensors_of(quant_state))

    @property
    def quant_state(self) -> QuantState:
        """Scales and description of the parameter, in the memory of the registered tensors."""
        return self.format.state(scales_of(self, ""))

    def forward(self, quantized_param: Tensor) -> Tensor:
        """The parameter in its shape and dtype."""
        scales = scales_of(self, "")
        compute = partial(self.format.dequantize, quantized_param, scales)
        return compute() if is_compiling() else forwards.once(self, (quantized_param, *scales.values()), compute)


@lasting()
def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantizes a parameter to 4 bits; `module.<param_name>` dequantizes it from then on.

    For parameters that no `Linear4bit` fits, such as the experts of a mixture, `[experts, out, in]`. The state dict has
    bitsandbytes' keys, and loading takes them, or a float parameter, which is quantized.

    Args:
        module: the module that has the parameter itself, not through a submodule.
        param_name: its name.
        compress_statistics, quant_type, blocksize: as for `Linear4bit`; 64 elements share a scale by default.

    Raises:
        AttributeError: the module has no attribute of that name.
        TypeError: it is not a parameter, or was replaced already.
        ValueError: a dtype or setting that quantization does not support.
    """
    parameter = _parameter(module, param_name)
    weight = Params4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    parametrize_4bit(module, param_name, weight._quantize_on(parameter.device))


@lasting()
def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device | str
) -> None:
    """As `replace_parameter_4bit`, for a parameter that holds packed codes.

    Args:
        module: the module that has the parameter.
        param_name: its name.
        qs_dict: "absmax", "quant_map", "quant_state.bitsandbytes__nf4" and so on, with or without a prefix.
        device: to put the parameter and its scales on.

    Raises:
        AttributeError, TypeError: as there.
        ValueError: entries that do not describe the parameter.
    """
    packed = _parameter(module, param_name).data
    parametrize_4bit(module, param_name, Params4bit.from_prequantized(packed, qs_dict, device=device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'; it is a {type(module).__name__}")
    if parametrize.is_parametrized(module, name):
        raise TypeError(f"'{name}' of this {type(module).__name__} is parametrized already")
    if not isinstance(parameter := getattr(module, name), nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter; it is a {type(parameter).__name__}")
    if isinstance(parameter, QuantizedParameter):
        raise TypeError(f"'{name}' of this {type(module).__name__} is quantized, or will be by .to(device)")
    return parameter


def _bytes(weight: Params4bit) -> nn.Parameter:
    """The packed codes as uint8, which no cast of the module touches."""
    codes = weight.data.view(-1).view(torch.uint8)
    return nn.Parameter(Format.of(weight.quant_state).in_rows(codes), requires_grad=False)


@lasting()
def parametrize_4bit(module: nn.Module, name: str, weight: Params4bit) -> None:
    """Puts a quantized weight in the place of a float parameter; `module.<name>` dequantizes it from then on."""
    setattr(module, name, _bytes(weight))
    parametrization = Bnb4bitParametrization(weight.quant_state, weight.dtype)
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    module.register_state_dict_post_hook(partial(_save_hook, name=name))
    module.register_load_state_dict_pre_hook(partial(_load_hook, name=name))
    # Activation checkpointing leaves a forward that it repeats by an exception, so stop reading then, too.
    module.register_forward_pre_hook(partial(_start_hook, name=name))
    module.register_forward_hook(partial(_stop_hook, name=name), always_call=True)


@dataclass(frozen=True)
class ParametrizedWeight(QuantizedWeight):
    """A parameter that is dequantized where it is read; made for each use, of a ParametrizationList and its first."""

    holder: nn.Module
    parametrization: Bnb4bitParametrization
    is_quantized = True

    @classmethod
    def of(cls, holder: nn.Module) -> ParametrizedWeight | None:
        """That of a ParametrizationList; None for other modules."""
        if not isinstance(holder, parametrize.ParametrizationList) or not isinstance(holder[0], Bnb4bitParametrization):
            return None
        return cls(holder, holder[0])

    @classmethod
    def find(cls, module: nn.Module, name: str) -> ParametrizedWeight | None:
        """That of a module's parameter; None for other parameters."""
        return cls.of(module.parametrizations[name]) if parametrize.is_parametrized(module, name) else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.parametrization.format.shape

    def tensors(self) -> dict[str, Tensor]:
        scales = scales_of(self.parametrization, "")
        return {"original": self.holder.original} | {f"0.{name}": scale for name, scale in scales.items()}

    def held(self) -> Params4bit:
        packed = self.holder.original.detach().view(-1).view(self.parametrization.quant_storage)
        return Params4bit(packed, quant_state=self.parametrization.quant_state, quant_storage=packed.dtype)

    def _put(self, weight: Params4bit) -> None:
        self.holder.original = _bytes(weight)
        self.parametrization.hold(weight.quant_state, weight.dtype)

    def _has_format_of(self, new: Params4bit) -> bool:
        own = self.parametrization
        return Format.of(new.quant_state) == own.format and new.dtype == own.quant_storage

    def _dequantized(self, dtype: torch.dtype | None) -> Tensor:
        return self.parametrization.format.dequantize(self.holder.original, scales_of(self.parametrization, ""), dtype)

    def _requantized(self, weight: Tensor) -> Params4bit:
        new = self.quantized(weight)
        new.quant_state.dtype = self.parametrization.format.dtype
        return new

    def quantized(self, data: Tensor) -> Params4bit:
        """Floats in the format of this weight, but for their dtype."""
        own = self.parametrization
        return Params4bit.like(own.quant_state, own.quant_storage, data, data.device)


# ---- hooks, inert once the parametrization has been removed ----------------------------------------------------


def _start_hook(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
    if not is_compiling() and (found := ParametrizedWeight.find(module, name)) is not None:
        forwards.begin(found.parametrization)


def _stop_hook(module: nn.Module, args: tuple[Any, ...], output: Any, *, name: str) -> None:
    if not is_compiling() and (found := ParametrizedWeight.find(module, name)) is not None:
        forwards.end(found.parametrization)


def _save_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *, name: str) -> None:
    """bitsandbytes' keys; without all of the data at hand (sharded, meta) the tensors by their own names."""
    if (found := ParametrizedWeight.find(module, name)) is None:
        return
    inner = f"{prefix}parametrizations.{name}."
    original = state_dict.get(inner + "original")
    if original is None or type(original) not in (Tensor, nn.Parameter) or original.is_meta:
        return
    for each in found.tensors():
        state_dict.pop(inner + each, None)
    packed = original.detach().view(-1).view(found.parametrization.quant_storage)
    state_dict.update(entries(prefix + name, packed, found.parametrization.quant_state))


def _load_hook(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any, name: str
) -> None:
    """Takes bitsandbytes' keys or a float parameter, then shows torch the tensors by their own names."""
    found, inner = ParametrizedWeight.find(module, name), f"{prefix}parametrizations.{name}."
    if found is None or inner + "original" in state_dict:
        return
    _, missing_keys, _, error_msgs = others
    key, original = prefix + name, found.holder.original
    statistics, data = take_statistics(state_dict, key), state_dict.pop(key, None)
    if data is None:
        missing_keys.append(key)
    elif is_dtensor(original):
        error_msgs.append(of_whole_layer(key, data, original))
        return
    else:
        try:
            device = None if original.is_meta else original.device
            new = weight_of(data, statistics, found.weight_shape, device)
            new = found.quantized(data.detach().to(device)) if new is None else new
            found._replace(new, local_metadata.get("assign_to_params_buffers", False))
        except LOADING_ERRORS as error:
            error_msgs.append(f"{key}: {error}")
    state_dict.update({inner + each: tensor.data for each, tensor in found.tensors().items()})
