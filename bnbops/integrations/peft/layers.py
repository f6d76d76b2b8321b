"""PEFT's layers around quantized ones: PEFT's own, but for what touches the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners import adalora, ia3, lora
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from bnbops.nn.kinds import quantized_weight
from bnbops.nn.weights.module import QuantizedWeight
from bnbops.tracing import is_compiling


class MergesQuantized:
    """Merges and unmerges adapters of a quantized base layer. Mixed into a PEFT layer before its class.

    PEFT merges into a float copy of the weight, in fp32, which is then quantized with the settings of the base layer.
    All merged adapters go into the weight as it was before any of them, in one go, so each rounding happens once. That
    weight is kept, in its quantized format, and put back by `unmerge`.
    """

    _name = "weight"  # of the parameter in the base layer
    _float_base: SimpleNamespace | None = None  # stands for the base layer while PEFT merges
    _original: Any = None  # the weight, and the bias, from before merging

    def get_base_layer(self) -> Any:
        return super().get_base_layer() if self._float_base is None else self._float_base

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is transposed: not while it is quantized, but that of a dequantized `Conv1D` is."""
        return isinstance(self.get_base_layer(), Conv1D)

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, configured: bool) -> None:
        """PEFT sets what the configuration says of the float model."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT, and nothing has changed after an error.

        Raises:
            ValueError: the merged weight has NaN or infinite values; with `safe_merge` the message names the adapter.
            RuntimeError: other adapters were merged before the base layer was quantized; or its weight is sharded.
        """
        if self._weight() is None:
            super().merge(safe_merge, adapter_names)  # PEFT's copy; or the base layer was dequantized
            return
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        merged, held, original = list(self.merged_adapters), self._held(), self._before_merging()
        try:
            self._put(original)
            self.merged_adapters = []
            with self._as_float() as base:
                super().merge(safe_merge, [*merged, *names])
            added = not set(names).isdisjoint(self.merged_adapters)
            self._put(self._requantized(base) if added else held)
        except BaseException:
            self._put(held)
            self.merged_adapters = merged
            raise
        if added:
            self._original = original
        else:  # this layer has none of them
            self.merged_adapters = merged

    def unmerge(self) -> None:
        """Puts the weight back that was there before merging, bit by bit.

        Raises:
            RuntimeError: adapters were merged before the base layer was quantized, so there is no such weight.
        """
        if self._weight() is None or not self.merged:
            super().unmerge()
            return
        self._put(self._before_merging())
        self._original, self.merged_adapters = None, []

    def _before_merging(self) -> Any:
        if self.merged and self._original is None:
            raise RuntimeError(
                f"{', '.join(self.merged_adapters)}: merged before the base layer was quantized, so its weight without "
                "adapters is not known; load the model again"
            )
        return self._original if self.merged else self._held()

    @contextmanager
    def _as_float(self) -> Iterator[SimpleNamespace]:
        weight, bias = nn.Parameter(self._weight().dequantized(torch.float32)), self._bias()
        bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self._float_base = SimpleNamespace(**{self._name: weight, "bias": bias})
        try:
            yield self._float_base
        finally:
            self._float_base = None

    # ---- the weight of the base layer, and its bias ----------------------------------------------------------------

    def _weight(self) -> QuantizedWeight | None:
        """None while it is a float one."""
        return None if self._float_base is not None else quantized_weight(self.get_base_layer(), self._name)

    def _bias(self) -> nn.Parameter | None:
        """What is merged with the weight, besides."""
        return getattr(self.get_base_layer(), "bias", None)

    def _held(self) -> Any:
        return self._weight().held(), None if self._bias() is None else self._bias().data

    def _put(self, held: Any) -> None:
        weight, bias = held
        self._weight().hold(weight)
        if bias is not None:
            self._bias().data = bias.to(self._bias().device)

    def _requantized(self, floats: SimpleNamespace) -> Any:
        bias = None if floats.bias is None else floats.bias.data.to(self._bias().dtype)
        return self._weight().requantized(getattr(floats, self._name).data), bias


class _Lora(MergesQuantized):
    """What LoRA layers of all kinds share."""

    _variants: tuple[tuple[str, ...], ...] = ((),)  # that neither change the weight nor read it by its name

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {names: variant for names, variant in super().lora_variants.items() if names in self._variants}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: lora.LoraConfig, **kwargs: Any) -> None:
        """As in PEFT.

        Raises:
            ValueError: an initialization that puts part of the weight into the adapter.
        """
        init = config.init_lora_weights
        if init not in (True, False, "gaussian", "eva", "orthogonal"):
            raise ValueError(
                f"init_lora_weights={init!r} splits the weight of the base layer, which is quantized: initialize the "
                "adapter on the float model, then quantize that"
            )
        reads = init == "orthogonal" and self._weight() is not None  # the adapter gets the dtype of the weight
        with self._as_float() if reads else nullcontext():
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)


class LoraLinear(_Lora, lora.Linear):
    """LoRA, rsLoRA, DoRA or aLoRA of a `Linear4bit` or a `Linear8bitLt`."""

    _variants = ((), ("use_dora",), ("alora_invocation_tokens",))

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return super().lora_variants | {("use_dora",): _Dora}


class _Dora(variants.DoraLinearVariant):
    """PEFT notes how the weight lies when an adapter is made; that of a `Conv1D` turns when it is dequantized."""


def _turning(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: LoraLinear, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        dora = module.lora_magnitude_vector[active_adapter]
        if dora.fan_in_fan_out != module.fan_in_fan_out:
            dora.fan_in_fan_out = module.fan_in_fan_out
            dora._cache_clear()
        return method(module, active_adapter, *args, **kwargs)

    return call


for _name in ("forward", "merge_safe", "merge_unsafe"):
    setattr(_Dora, _name, staticmethod(_turning(getattr(variants.DoraLinearVariant, _name))))


class LoraEmbedding(_Lora, lora.Embedding):
    """LoRA of an `Embedding4bit` or `Embedding8bit`."""


class ParamWrapper(_Lora, lora_layer.ParamWrapper):
    """LoRA of a parameter that is parametrized in 4 bits, such as the experts of a mixture (`target_parameters`). PEFT
    knows the class by its name."""

    def get_param(self) -> Tensor:
        """As in PEFT, but while the parameter is quantized of its shape, dtype and device only: to read it would
        dequantize it."""
        if (weight := self._weight()) is None:
            return super().get_param()
        format = weight.parametrization.format
        return torch.empty((), dtype=format.dtype, device=weight.holder.original.device).expand(format.shape)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """As in PEFT, whose own neither removes what it adds to a parametrization, nor is content with one read."""
        names = [name for name in active_adapters if name in self.lora_A]
        if not names or self._weight() is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        holder = self._weight().holder
        before = len(holder)
        holder.extend([self._delta(name) for name in names])
        try:
            # what is compiled reads once anyway, and must not leave tensors in torch's cache
            with nullcontext() if is_compiling() else parametrize.cached():
                yield
        finally:
            for i in range(before, len(holder)):
                delattr(holder, str(i))  # `del holder[i]` renews the dict of modules: recompiles

    def _delta(self, name: str) -> nn.Module:
        if self.num_experts > 1:
            return lora_layer._LoraFactorsProxy(*self.get_delta_factors(name))
        return lora_layer._LoraParameterProxy(self.get_delta_weight(name))

    @property
    def _name(self) -> str:
        return self.parameter_name

    def _bias(self) -> None:
        """The parameter alone is merged."""


class AdaLoraLinear(MergesQuantized, adalora.SVDLinear):
    """AdaLoRA of a `Linear4bit` or a `Linear8bitLt`."""


class IA3Linear(MergesQuantized, ia3.Linear):
    """(IA)^3 of a `Linear4bit` or a `Linear8bitLt`."""
