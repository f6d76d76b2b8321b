"""Which layer an adapter gets, and the places in PEFT that ask."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from functools import update_wrapper
from typing import Any

import peft
from peft.import_utils import is_bnb_available
from peft.optimizers import loraplus
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.ia3 import IA3Model
from peft.tuners.lora import LoraModel, dora, layer, variants
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from bnbops.integrations.peft.layers import AdaLoraLinear, IA3Linear, LoraEmbedding, LoraLinear, ParamWrapper
from bnbops.nn.parametrize import ParametrizedWeight
from bnbops.nn.weights.module import QuantizedModule, is_quantized


def _layer_class(base: nn.Module, parameter_name: str | None, linear: type, embedding: type | None) -> type | None:
    """The class for a base layer; None: PEFT knows it.

    Raises:
        ValueError: nothing fits.
    """
    quantized = isinstance(base, QuantizedModule)
    if parameter_name is not None:
        if quantized and parameter_name == "weight":
            raise ValueError(
                f"target_parameters names the weight of a {type(base).__name__}, which is packed: name the module in "
                "target_modules instead"
            )
        return ParamWrapper if ParametrizedWeight.find(base, parameter_name) else None
    if not quantized:
        return None
    found = linear if isinstance(base, nn.Linear) else embedding
    if found is None:
        raise ValueError(f"{linear.__doc__.split(' of ')[0]} cannot adapt a {type(base).__name__}, only linear layers")
    return found


def _creating(original: Callable[..., nn.Module], linear: type, embedding: type | None) -> staticmethod[..., nn.Module]:
    """`_create_new_module` of one of PEFT's models, which knows bnbops' layers first."""

    def create(config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        custom = isinstance(base, tuple(getattr(config, "_custom_modules", None) or ()))
        layer = None if custom else _layer_class(base, kwargs.get("parameter_name"), linear, embedding)
        if layer is None:
            return original(config, adapter_name, target, *args, **kwargs)
        return layer(target, adapter_name, config=config, **kwargs)

    return staticmethod(create)


def _unflagged(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that asks for bitsandbytes, or refuses to merge, if the model has one of Transformers' flags."""

    def call(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
        attributes, names = vars(self.model), ("is_loaded_in_4bit", "is_loaded_in_8bit")
        flags = {} if is_bnb_available() else {name: attributes.pop(name) for name in names if name in attributes}
        try:
            return original(self, *args, **kwargs)
        finally:
            attributes.update(flags)

    return call


def _injecting(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`_inject_parameters`, which follows `target_parameters`: for parametrized ones it knows full names only, nests
    them in another order than float ones, so that their adapters do not fit each other, and has no second adapter."""

    def inject(
        self: BaseTuner, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        targets, found = set(peft_config.target_parameters), []
        for path, name in _parameters_4bit(model):
            key = f"{path}.{name}"
            if not any(key == target or key.endswith(f".{target}") for target in targets):
                continue
            parent, target, attribute = _get_submodules(model, path)
            wrapper = target
            while isinstance(wrapper, ParamWrapper) and wrapper.parameter_name != name:
                wrapper = wrapper.base_layer
            if isinstance(wrapper, ParamWrapper):
                target = wrapper
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, target, attribute, parent, current_key=key, parameter_name=name
                )
            found.append(key)
        others = copy(peft_config)
        others.target_parameters = [target for target in targets if target not in found]
        return found + original(self, others, model, adapter_name, low_cpu_mem_usage)

    return inject


def _parameters_4bit(model: nn.Module) -> list[tuple[str, str]]:
    """Module and name of each parameter that is parametrized in 4 bits, wrappers of it left out of the path."""
    return [
        (path.replace(".base_layer", ""), name)
        for path, module in model.named_modules()
        for name in getattr(module, "parametrizations", ())
        if ParametrizedWeight.find(module, name)
    ]


def _making_loraplus(original: Callable[..., Any]) -> Callable[..., Any]:
    """`create_loraplus_optimizer`, which gives embeddings 32-bit state through bitsandbytes' manager."""

    def create_loraplus_optimizer(model: nn.Module, optimizer_cls: type, **kwargs: Any) -> Any:
        if not optimizer_cls.__module__.startswith("bnbops."):
            return original(model, optimizer_cls, **kwargs)
        from bnbops.integrations.transformers import keep_embeddings_in_32_bits  # here: it needs a later Transformers

        keep_embeddings_in_32_bits(model)
        # a function: PEFT imports bitsandbytes for classes of certain names
        return original(model, lambda groups, **options: optimizer_cls(groups, **options), **kwargs)

    return create_loraplus_optimizer


def _dequantizing(original: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    """`dequantize_module_weight`, with which DoRA reads a weight."""
    return lambda module: module.dequantized() if is_quantized(module) else original(module)


_PATCHES: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (LoraModel, "_create_new_module", lambda f: _creating(f, LoraLinear, LoraEmbedding)),
    (AdaLoraModel, "_create_new_module", lambda f: _creating(f, AdaLoraLinear, None)),
    (IA3Model, "_create_new_module", lambda f: _creating(f, IA3Linear, None)),
    (AdaLoraModel, "_create_and_replace", _unflagged),
    (IA3Model, "_create_and_replace", _unflagged),
    (IA3Model, "_unload_and_optionally_merge", _unflagged),
    (BaseTuner, "_inject_parameters", _injecting),
    *((module, "dequantize_module_weight", _dequantizing) for module in (dora, layer, variants)),
    *((module, "create_loraplus_optimizer", _making_loraplus) for module in (loraplus, peft.optimizers)),
]
_originals: list[tuple[Any, str, Any]] = []
_turning = threading.Lock()


def register() -> None:
    """Lets PEFT adapt bnbops' layers, in this process. Importing `bnbops.integrations.peft` does it; twice is once."""
    with _turning:
        for owner, name, make in () if _originals else _PATCHES:
            original, made = getattr(owner, name), make(getattr(owner, name))
            update_wrapper(getattr(made, "__func__", made), original)
            _originals.append((owner, name, vars(owner)[name]))
            setattr(owner, name, made)


def unregister() -> None:
    """Makes PEFT what it was. Models that have adapters keep them, and their layers work, except DoRA's."""
    with _turning:
        while _originals:
            setattr(*_originals.pop())
