"""Linear layers with 4- and 8-bit weights of bnbops and others, for linear.py: what each computes, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnbops.nn

THRESHOLD = 6.0  # of Linear8bitLt
DENSE = "dense"

# How far a result may be from float64 arithmetic with the same quantized values (see `linear.distance`). In one of
# 4096 columns a single wrong element, or a column of the weight left out, is more than 0.015. The scales that
# bitsandbytes repacks are rounded to bf16, as all its fused arithmetic is.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.01}


@dataclass(frozen=True)
class Contender:
    """A layer to time; the fp32 weight `[N, K]` that it stands for, and how it rounds its input."""

    name: str
    layer: Callable[[Tensor], Tensor]
    weight: Tensor
    weight_bytes: int
    tolerance: float
    rounded_input: Callable[[Tensor], Tensor] = torch.Tensor.double
    torchs_product: bool = False

    @property
    def fixed_bits(self) -> bool:
        """Whether its bits may not depend on the number of threads, as those of torch's products do."""
        return self.name.startswith("bnbops") and not self.torchs_product

    def expected(self, x: Tensor) -> Tensor:
        return self.rounded_input(x) @ self.weight.double().t()


def dense(weight: Tensor) -> Contender:
    tolerance = TOLERANCES[weight.dtype]
    return Contender(DENSE, lambda x: F.linear(x, weight), weight.float(), size(weight), tolerance)


def size(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def decoded(packed: Tensor, state: Any) -> Tensor:
    """A weight in 4 bits as fp32, in plain torch. `state` is a QuantState of bnbops or of bitsandbytes."""
    packed = packed.view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    scales = state.absmax
    if state.nested:
        second = state.state2
        coarse = second.absmax.repeat_interleave(second.blocksize)[: scales.numel()]
        scales = second.code[scales.flatten().long()] * coarse + state.offset
    return (state.code[codes.long()].view(-1, state.blocksize) * scales.view(-1, 1)).view(state.shape)


def linear_4bit(library: ModuleType, weight: Tensor, nested: bool) -> nn.Module:
    """A Linear4bit of bnbops.nn or bitsandbytes.nn, quantized."""
    layer = library.Linear4bit(*reversed(weight.shape), False, weight.dtype, nested, "nf4", device="meta")
    layer.weight = library.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=nested, quant_type="nf4", module=layer
    )
    return layer.to(weight.device)


def contender_4bit(name: str, library: ModuleType, weight: Tensor, nested: bool, tolerance: float) -> Contender:
    layer = linear_4bit(library, weight, nested)
    state = layer.weight.quant_state
    held = size(layer.weight.data, state.absmax, state.state2.absmax if nested else None)
    return Contender(name, layer, decoded(layer.weight.data, state), held, tolerance)


def contenders_4bit(weight: Tensor, nested: bool, peers: dict[str, ModuleType], training: bool) -> Iterator[Contender]:
    """bnbops, dense, then the others, those of inference or those that have a gradient."""
    tolerance = TOLERANCES[weight.dtype]
    yield contender_4bit("bnbops Linear4bit", bnbops.nn, weight, nested, tolerance)
    yield dense(weight)
    if bitsandbytes := peers.get("bitsandbytes"):
        if not training and weight.device.type == "cpu":
            yield from repacked(bitsandbytes, weight, nested)
        # In training mode the layer keeps its bytes as they are on disk, and dequantizes them for each product.
        yield contender_4bit("bitsandbytes Linear4bit, plain", bitsandbytes.nn, weight, nested, tolerance)
    if "torchao" in peers:
        makers = [("NF4Tensor", torchao_nf4)] + ([] if training else [("Int4OpaqueTensor", torchao_int4)])
        yield from torchao_contenders(makers, weight)


def repacked(bitsandbytes: ModuleType, weight: Tensor, nested: bool) -> Iterator[Contender]:
    """bitsandbytes' layer in eval mode; its first product reorders the weight, where the CPU has AVX512-BF16."""
    name = "bitsandbytes Linear4bit, repacked"
    contender = contender_4bit(name, bitsandbytes.nn, weight, nested, TOLERANCES[torch.bfloat16])
    layer = contender.layer.eval()
    with torch.no_grad():
        layer(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        held = size(layer.weight.data, state.absmax)
        yield Contender(name, layer, contender.weight, held, contender.tolerance)
    else:
        print(f"{name} left out: this CPU has no AVX512-BF16, so it does not repack", flush=True)


def contenders_8bit(weight: Tensor, peers: dict[str, ModuleType]) -> Iterator[Contender]:
    """bnbops, dense, then the others; the layers also in training mode, in which a CPU does not quantize the input."""
    layer, codes, scales = linear_8bit(bnbops.nn, weight)
    held, values = size(codes, scales), codes * (scales / 127)[:, None]
    tolerance = TOLERANCES[weight.dtype]
    yield Contender("bnbops Linear8bitLt", layer.eval(), values, held, tolerance, llm_int8)
    yield dense(weight)
    if weight.device.type == "cpu":
        layer, _, _ = linear_8bit(bnbops.nn, weight)
        yield Contender("bnbops Linear8bitLt, training mode", layer, values, held, tolerance, torchs_product=True)
    if bitsandbytes := peers.get("bitsandbytes"):
        layer, codes, scales = linear_8bit(bitsandbytes.nn, weight)
        values, tolerance = codes * (scales / 127)[:, None], TOLERANCES[torch.bfloat16]  # it computes in fp16
        yield Contender("bitsandbytes Linear8bitLt", layer.eval(), values, held, tolerance, llm_int8)
        layer, _, _ = linear_8bit(bitsandbytes.nn, weight)
        yield Contender("bitsandbytes Linear8bitLt, training mode", layer, values, held, tolerance)
    if "torchao" in peers:
        yield from torchao_contenders([("Int8Tensor, weight only", torchao_int8)], weight)


def linear_8bit(library: ModuleType, weight: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """A Linear8bitLt of bnbops.nn or bitsandbytes.nn, quantized; its codes and scales."""
    layer = library.Linear8bitLt(*reversed(weight.shape), False, has_fp16_weights=False, threshold=THRESHOLD)
    layer.weight = library.Int8Params(weight.to("cpu", copy=True), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(weight.device)
    saved = layer.state_dict()
    return layer, saved["weight"], saved["SCB"]


def llm_int8(x: Tensor) -> Tensor:
    """What LLM.int8 multiplies with, in float64: columns with an outlier as they are, the others rounded to int8."""
    x = x.double()
    outliers = x.abs() >= THRESHOLD
    steps = x.masked_fill(outliers, 0).abs().amax(dim=1, keepdim=True) / 127
    return torch.where(outliers.any(dim=0), x, (x / steps).round() * steps)


Maker = Callable[[Tensor], tuple[Callable[[Tensor], Tensor], list[Tensor]]]  # the layer, and the tensors it holds


def torchao_contenders(makers: list[tuple[str, Maker]], weight: Tensor) -> Iterator[Contender]:
    """torchao's layers as far as they run here. They stand for the matrix that is their product with the identity,
    which has to be the weight, but for its quantization."""
    for kind, make in makers:
        name = f"torchao {kind}"
        try:
            layer, held = make(weight)
            with torch.no_grad():
                values = (
                    layer(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).t().float().contiguous()
                )
        except Exception as error:
            print(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        off = ((values - weight.float()).norm() / weight.float().norm()).item()
        if not off < 0.15:
            print(f"{name} left out: its weight is {off:.2g} off", flush=True)
            continue
        yield Contender(name, layer, values, size(*held), TOLERANCES[torch.bfloat16])


def torchao_nf4(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    packed = to_nf4(weight, 64, 256)
    return lambda x: linear_nf4(x, packed), [
        packed.quantized_data,
        packed.quantized_scalers,
        packed.quantization_factor,
    ]


def torchao_int4(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    packed = Int4OpaqueTensor.from_hp(weight, [1, 64])
    return lambda x: F.linear(x, packed), [packed.qdata, packed.scale_and_zero]


def torchao_int8(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype, device=weight.device)
    layer.weight.data = weight.clone()
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    return layer, [layer.weight.qdata, layer.weight.scale]
