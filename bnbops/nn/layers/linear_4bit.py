"""Linear layers with a frozen weight of 4 bits."""

from __future__ import annotations

import logging
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bnbops.eager import call
from bnbops.facts import FLOATS
from bnbops.functional.four_bit import of_type
from bnbops.nn.four_bit.module import Module4bit
from bnbops.nn.weights.codes import codes_as_they_are
from bnbops.tracing import is_compiling


class Linear4bit(Module4bit, nn.Linear):
    """`torch.nn.Linear` whose weight `.to(device)` quantizes to 4 bits.

    A drop-in for a trained layer: load its float state dict, then move the layer (`.to("cpu")` counts). The packed
    weight is frozen; gradients flow to the input and to the bias.

    The state dict has bitsandbytes' keys and bytes, and loads, strictly, into a fresh or a quantized layer. Float
    weights that a quantized layer loads are quantized.

    If `input_features` is a multiple of `blocksize`, the tensors are laid out by rows, so that a slice of them along
    dimension 0 is a slice of the weight. Otherwise they are flat, and only what gathers all of them before use (FSDP2)
    can shard them.

    Args:
        input_features: size of the input's last dimension.
        output_features: size of the output's.
        bias: whether there is one; it stays a float parameter.
        compute_dtype: the input is cast to it, and the output back to the input's dtype; None: the input's own dtype,
            or autocast's, in which case the output has it, too.
        compress_statistics: quantize the scales, too (QLoRA's double quantization).
        quant_type: "nf4" or another format (docs/linear_4bit.md).
        quant_storage: dtype whose bytes hold the codes: uint8, int8, bf16, fp16 or fp32.
        device: of the float parameters; nothing is quantized yet.
        blocksize: elements that share a scale, a power of two up to 4096, at least 32 for NF4.
        dtype: of the float parameters.

    Shape: `[..., input_features]` fp32, bf16 or fp16 to `[..., output_features]` in the same dtype.

    Raises:
        ValueError: a compute_dtype, quant_type, quant_storage or blocksize that does not exist.
        RuntimeError: in `forward`, before quantization, or from the operator `linear_4bit`.

    Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        *,
        blocksize: int = 64,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device, dtype)
        if compute_dtype not in (None, *FLOATS):
            raise ValueError(f"compute_dtype must be float32, bfloat16, float16 or None, got {compute_dtype}")
        self._make_4bit(blocksize, compress_statistics, quant_type, quant_storage)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, the weight dequantized on the fly. Changes nothing of the module."""
        with codes_as_they_are():
            weight, format, scales = self._quantized_weight()
            if x.is_nested:
                return self._over_nested(x)
            if x.dtype == torch.float16 and self.compute_dtype is None:
                _warn_of_float16(self, x)
            values = x if self.compute_dtype is None else x.to(self.compute_dtype)
            if (bias := self.bias) is not None and bias.dtype != values.dtype:
                bias = bias.to(values.dtype)
            described = (scales["absmax"], bias, *format.described)
            out = call(torch.ops.bnbops.linear_4bit.default, values, weight, *described, **format.nested(scales))
            return out if self.compute_dtype is None else out.to(x.dtype)


_warned: WeakSet[Linear4bit] = WeakSet()  # not an attribute: `forward` changes nothing of a module


def _warn_of_float16(layer: Linear4bit, x: Tensor) -> None:
    """On a CPU, in a layer's first forward. bitsandbytes warns there, too: of inference if there is one row."""
    if x.device.type != "cpu" or is_compiling() or layer in _warned:
        return
    _warned.add(layer)
    what = "inference" if x.numel() == x.shape[-1] else "inference or training"
    logging.getLogger(Linear4bit.__module__).warning(
        "Input type into Linear4bit is torch.float16, and no compute_dtype is given: on a CPU, products of more than a "
        f"few rows are as slow as in torch.float32. compute_dtype=torch.bfloat16 makes for faster {what}."
    )


class LinearFP4(Linear4bit):
    """`Linear4bit` with `quant_type="fp4"`."""

    __init__ = of_type(Linear4bit.__init__, "fp4")


class LinearNF4(Linear4bit):
    """`Linear4bit` with `quant_type="nf4"`."""

    __init__ = of_type(Linear4bit.__init__, "nf4")
