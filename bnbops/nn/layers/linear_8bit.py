"""Linear layers with int8 weights (LLM.int8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnbops.facts import FLOATS
from bnbops.functional.int8 import MatmulLtState, linear
from bnbops.nn.int8.module import Int8Module
from bnbops.nn.weights.codes import codes_as_they_are
from bnbops.tracing import is_compiling

cast_biases_for_good = False  # while bnbops is installed as bitsandbytes, whose layers do it


class Linear8bitLt(Int8Module, nn.Linear):
    """`torch.nn.Linear` with an int8 weight, multiplied with activations that are quantized on the fly.

    Each row of the weight and each row of the input is scaled to int8; the products are summed exactly and scaled back.
    Columns of the input that hold a magnitude of at least `threshold` are left out and multiplied in floating point
    (Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 3). In training mode on a CPU the input is not rounded to
    int8, as in bitsandbytes: its product with the dequantized weight is one in floating point.

    With `has_fp16_weights=False` the weight is quantized by the first `.to(device)` ("cpu" counts) and frozen; the
    gradient of the input goes through it. With `has_fp16_weights=True` the weight stays a float one that can be
    trained, and each forward quantizes it; its gradient is that of the product with the input as it was before
    quantization.

    Args:
        input_features: size of the last dimension of the input.
        output_features: size of the last dimension of the output.
        bias: whether to add a bias, a float one, cast to the input's dtype for the call.
        has_fp16_weights: whether the weight stays a float one.
        threshold: magnitude from which on a column of the input is an outlier; 0 for none. 6 is common.
        index: kept, and not used.
        device: of the float weight.

    Shape: fp32, bf16 or fp16 `[..., input_features]` to `[..., output_features]` in the input's dtype, or
    autocast's.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.index = index
        self.threshold = threshold
        self._hold(has_fp16_weights)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T + bias`.

        Raises:
            RuntimeError: the weight is not quantized, or x does not fit it.
        """
        with codes_as_they_are():
            floats = self.has_fp16_weights and self.weight.is_floating_point()
            weight, scales = (self.weight, None) if floats else self._quantized_weight()
            if x.is_nested:
                return self._over_nested(x)
            return linear(x, weight, scales, _bias_for(self, x), self.threshold, self.training)

    @property
    def state(self) -> MatmulLtState:
        """bitsandbytes' view of this layer. It shows the layer's tensors and options, also later, and holds none."""
        return _LayerState(self)

    @state.setter
    def state(self, state: MatmulLtState) -> None:
        self.threshold, self.has_fp16_weights = state.threshold, state.has_fp16_weights
        if self.SCB is None and state.SCB is not None:
            self.state.SCB = state.SCB

    def init_8bit_state(self) -> None:
        """bitsandbytes moves the weight's scales into `state` here. `state` shows them anyway; this makes scales that
        were set on a weight in `_parameters` the layer's own."""
        self._adopt_scales()

    def extra_repr(self) -> str:
        """As in torch, with the options."""
        return f"{super().extra_repr()}, has_fp16_weights={self.has_fp16_weights}, threshold={self.threshold}"


def _bias_for(module: nn.Linear, x: Tensor) -> Tensor | None:
    """The module's bias in the dtype of its input."""
    bias = module.bias
    if bias is None or bias.dtype == x.dtype:
        return bias
    if cast_biases_for_good and isinstance(bias, nn.Parameter) and not is_compiling() and _fits(module, x):
        bias.data = bias.data.to(x.dtype)
        return bias
    return bias.to(x.dtype)


def _fits(module: nn.Linear, x: Tensor) -> bool:
    """Whether the product will not refuse x: a failed call must not have cast anything."""
    return x.dtype in FLOATS and x.dim() > 0 and x.shape[-1] == module.in_features and x.device == module.weight.device


def _of_layer(name: str) -> Any:
    def write(state: _LayerState, value: Any) -> None:
        setattr(state._layer, name, value)

    return property(lambda state: getattr(state._layer, name), write)


class _LayerState(MatmulLtState):
    """`Linear8bitLt.state`: made for each access, so that it can hold the layer without keeping it alive."""

    def __init__(self, layer: Linear8bitLt) -> None:
        self._layer = layer

    def reset_grads(self) -> None:
        """Nothing to do: the layer's weight is no cache."""

    @property
    def CB(self) -> Tensor | None:
        weight = self._layer.weight
        return weight.data if weight.dtype == torch.int8 else None

    @CB.setter
    def CB(self, codes: Tensor | None) -> None:
        if codes is not None:
            self._layer.weight.data = codes

    @property
    def SCB(self) -> Tensor | None:
        return self._layer.SCB

    @SCB.setter
    def SCB(self, scales: Tensor | None) -> None:
        if scales is not None:
            self._layer.weight.SCB = scales
            self._layer.init_8bit_state()

    threshold, has_fp16_weights, is_training = map(_of_layer, ("threshold", "has_fp16_weights", "training"))
