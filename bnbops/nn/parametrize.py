"""Any parameter in 4 bits, of a module that knows nothing of it: dequantized where the module reads it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnbops.dtensors import is_dtensor
from bnbops.functional.four_bit import quantize_4bit
from bnbops.functional.quant_state import QuantState
from bnbops.lasting import lasting
from bnbops.nn import forwards
from bnbops.nn.four_bit.scales import (
    NAMES,
    Format,
    as_arguments,
    check_entry,
    check_state,
    in_rows,
    register_scales,
    save,
    scales_of,
    set_scales,
    state_of,
    take_statistics,
    tensors_of,
)
from bnbops.nn.weights.parameter import QuantizedParameter
from bnbops.nn.weights.plain_state import of_whole_layer

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Dequantizes a packed parameter, whose scales it holds (see `bnbops.nn.four_bit.scales`).

    While the module that has the parameter is in `forward`, all reads of a thread get the same tensor, unless weights
    are loaded meanwhile; compiled code does not need that. No gradient flows to the codes.
    """

    def __init__(self, quant_state: QuantState, quant_storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        register_scales(self, "")
        self.quant_storage = quant_storage
        self.hold(quant_state)

    def hold(self, state: QuantState) -> None:
        set_scales(self, "", tensors_of(state))
        self.format = Format.of(state)

    @property
    def quant_state(self) -> QuantState:
        """Scales and description of the parameter, in the memory of the registered tensors."""
        return state_of(scales_of(self, ""), self.format)

    def forward(self, quantized_param: Tensor) -> Tensor:
        """The parameter in its shape and dtype."""
        if torch.compiler.is_compiling():
            return self.dequantize(quantized_param)
        held = (quantized_param, *scales_of(self, "").values())
        return forwards.once(self, held, partial(self.dequantize, quantized_param))

    def dequantize(self, packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter in its shape, and in `dtype` or its own."""
        absmax, nested = as_arguments(scales_of(self, ""), self.format)
        shape, own_dtype, blocksize, quant_type, _ = self.format
        return torch.ops.bnbops.dequantize_4bit(
            packed, absmax, blocksize, quant_type, shape, dtype or own_dtype, **nested
        )

    def quantize(self, data: Tensor) -> tuple[Tensor, QuantState]:
        """Floats as this parametrization would hold them."""
        nested = self.nested_absmax is not None
        return quantize_4bit(
            data, None, None, self.format.blocksize, nested, self.format.quant_type, self.quant_storage
        )

    def packed(self, original: Tensor) -> Tensor:
        """The codes that are held as bytes, in their storage dtype."""
        return original.detach().view(-1).view(self.quant_storage)


@lasting()
def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantizes a parameter to 4 bits; `module.<param_name>` dequantizes it from then on.

    For parameters that no `Linear4bit` fits, such as the experts of a mixture, `[experts, out, in]`. The state dict has
    bitsandbytes' keys, and loading takes them, or a float parameter, which is quantized.

    Args:
        module: the module that has the parameter itself, not through a submodule.
        param_name: its name.
        compress_statistics: quantize the scales, too.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share a scale, a power of two from 32 to 4096; 64 by default.

    Raises:
        AttributeError: the module has no attribute of that name.
        TypeError: it is not a parameter, or was replaced already.
        ValueError: a dtype or setting that quantization does not support.
    """
    parameter = _parameter(module, param_name)
    packed, state = quantize_4bit(
        parameter.data.contiguous(),
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    _replace(module, param_name, packed, state)


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
        AttributeError: the module has no attribute of that name.
        TypeError: it is not a parameter, or was replaced already.
        ValueError: entries that do not describe the parameter.
    """
    packed = _parameter(module, param_name).data.to(device).contiguous()
    state = QuantState.from_dict(qs_dict, device=device)
    check_state(packed, state)
    _replace(module, param_name, packed, state)


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


def _bytes(packed: Tensor, format: Format) -> nn.Parameter:
    """The packed codes as uint8, which no cast of the module touches."""
    return nn.Parameter(in_rows(packed.view(-1).view(torch.uint8), format), requires_grad=False)


def _replace(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    setattr(module, name, _bytes(packed, Format.of(state)))
    parametrization = Bnb4bitParametrization(state, packed.dtype)
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    module.register_state_dict_post_hook(partial(_save_hook, name=name))
    module.register_load_state_dict_pre_hook(partial(_load_hook, name=name))
    # Activation checkpointing leaves a forward that it repeats by an exception, so stop reading then, too.
    module.register_forward_pre_hook(partial(_start_hook, name=name))
    module.register_forward_hook(partial(_stop_hook, name=name), always_call=True)


# ---- hooks, inert once the parametrization has been removed ----------------------------------------------------


def _find(module: nn.Module, name: str) -> tuple[int, Bnb4bitParametrization] | None:
    """The parametrization and its place in the parameter's list."""
    if not parametrize.is_parametrized(module, name):
        return None
    found = enumerate(module.parametrizations[name])
    return next(((i, p) for i, p in found if isinstance(p, Bnb4bitParametrization)), None)


def _start_hook(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
    if not torch.compiler.is_compiling() and (found := _find(module, name)) is not None:
        forwards.begin(found[1])


def _stop_hook(module: nn.Module, args: tuple[Any, ...], output: Any, *, name: str) -> None:
    if not torch.compiler.is_compiling() and (found := _find(module, name)) is not None:
        forwards.end(found[1])


def _own_names(prefix: str, name: str, index: int) -> dict[str, str]:
    """The state dict's keys of the tensors that are registered, by what they are."""
    inner = f"{prefix}parametrizations.{name}."
    return {"original": inner + "original"} | {role: f"{inner}{index}.{role}" for role in NAMES}


def _save_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *, name: str) -> None:
    """bitsandbytes' keys; without all of the data at hand (sharded, meta) the tensors by their own names."""
    if (found := _find(module, name)) is None:
        return
    index, parametrization = found
    names = _own_names(prefix, name, index)
    original = state_dict.get(names["original"])
    if original is None or type(original) not in (Tensor, nn.Parameter) or original.is_meta:
        return
    for key in names.values():
        state_dict.pop(key, None)
    save(state_dict, prefix + name, parametrization.packed(original), parametrization.quant_state)


def _load_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    name: str,
) -> None:
    """Takes bitsandbytes' keys or a float parameter, then shows torch the tensors by their own names."""
    found = _find(module, name)
    if found is None or f"{prefix}parametrizations.{name}.original" in state_dict:
        return
    index, parametrization = found
    key, original = prefix + name, module.parametrizations[name]
    statistics, data = take_statistics(state_dict, key), state_dict.pop(key, None)
    if data is None:
        missing_keys.append(key)
    elif is_dtensor(original.original):
        error_msgs.append(of_whole_layer(key, data, original.original))
        return
    else:
        try:
            packed, state = _loaded(data, statistics, parametrization, original.original)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(f"{key}: {error}")
        else:
            replace(original, parametrization, packed, state, local_metadata.get("assign_to_params_buffers", False))
    tensors = {"original": original.original} | scales_of(parametrization, "")
    for role, own_name in _own_names(prefix, name, index).items():
        if role in tensors:
            state_dict[own_name] = tensors[role].data


def _loaded(
    data: Tensor, statistics: dict[str, Tensor], parametrization: Bnb4bitParametrization, original: nn.Parameter
) -> tuple[Tensor, QuantState]:
    format = parametrization.format
    check_entry(data, statistics, format.shape)
    device = data.device if original.is_meta else original.device
    data = data.detach().to(device).contiguous()
    if statistics:
        state = QuantState.from_dict(statistics, device=device)
        check_state(data, state)
        if tuple(state.shape) != format.shape:
            raise ValueError(f"the quantized parameter has shape {list(state.shape)}, not {list(format.shape)}")
        return data, state
    return parametrization.quantize(data)


@torch.no_grad()
def replace(
    holder: nn.Module, parametrization: Bnb4bitParametrization, packed: Tensor, state: QuantState, assign: bool
) -> None:
    """Makes `holder`, a ParametrizationList, hold other codes and their scales: in place where the tensors fit, or with
    `assign` the given tensors themselves."""
    format, new, held = Format.of(state), tensors_of(state), scales_of(parametrization, "")
    parametrization.quant_storage = packed.dtype
    if format == parametrization.format and new.keys() == held.keys() and not assign and not holder.original.is_meta:
        holder.original.copy_(_bytes(packed, format))
        for role, tensor in new.items():
            held[role].copy_(tensor)
        return
    if not assign:
        packed, new = packed.clone(), {role: tensor.clone() for role, tensor in new.items()}
    holder.original = _bytes(packed, format)
    set_scales(parametrization, "", new)
    parametrization.format = format
