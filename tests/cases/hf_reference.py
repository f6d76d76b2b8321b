"""What Transformers' models have to be once they are quantized, by the functions of `bnbops.functional`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from bnbops.functional import dequantize_4bit, int8_vectorwise_dequant, int8_vectorwise_quant, quantize_4bit
from bnbops.nn import Linear4bit, Linear8bitLt
from cases.hf import tiny_gpt2, tiny_llama, tiny_mixtral

FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}

# BitsAndBytesConfig's arguments, and the model's dtype.
CASES_4BIT = {
    "nf4": ({}, torch.float32),
    "nf4 twice": ({"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}, torch.bfloat16),
    "nf4 as bf16": ({"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_use_double_quant": True}, torch.bfloat16),
    "fp4": ({"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16}, torch.float32),
    "fp4 twice, as fp32": (
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.float32},
        torch.float16,
    ),
}
CASES_8BIT = {
    "int8": ({}, torch.float32),
    "int8 bf16": ({"llm_int8_threshold": 0.0}, torch.bfloat16),
    "int8 fp16": ({}, torch.float16),
}
CASES = CASES_4BIT | CASES_8BIT


def config(case: str, **options: object) -> BitsAndBytesConfig:
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if case in CASES_4BIT else {"load_in_8bit": True}
    return BitsAndBytesConfig(**bits | CASES[case][0] | options)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """What Transformers quantizes of a float model: all but the head."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear | Conv1D) and name != "lm_head"}


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def rows(module: nn.Module) -> Tensor:
    """The float weight as [out, in]."""
    weight = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).contiguous()


def quantize(weight: Tensor, config: BitsAndBytesConfig) -> tuple[Tensor, object]:
    """Codes, and the QuantState or the scales of the rows."""
    if config.load_in_8bit:
        return int8_vectorwise_quant(weight.to(torch.float16))[:2]
    return quantize_4bit(
        weight,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )


def dequantized(weight: Tensor, config: BitsAndBytesConfig) -> Tensor:
    """What the codes stand for: fp32 of 8 bits, in the weight's dtype of 4."""
    undo = int8_vectorwise_dequant if config.load_in_8bit else dequantize_4bit
    return undo(*quantize(weight, config))


@torch.no_grad()
def dequantize_(model: nn.Module, config: BitsAndBytesConfig) -> nn.Module:
    """Each weight that would be quantized becomes what its codes stand for."""
    for module in quantizable(model).values():
        weight = dequantized(rows(module), config)
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    return model


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of each quantized layer, filled in by a forward."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str):
        return lambda module, inputs, output: found.__setitem__(name, (inputs[0].detach(), output.detach()))

    handles = [module.register_forward_hook(record(name)) for name, module in quantized(model).items()]
    yield found
    for handle in handles:
        handle.remove()


def assert_multiplies(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, config: BitsAndBytesConfig) -> None:
    """`y` is `x @ weight.T + bias`, in float64, but for the roundings that a layer does.

    With half an ulp, u, for each rounding: 4 bits round the input, the weight and the bias to the compute dtype, the
    sum of k products to fp32, k times, and the output to the compute dtype, then to that of x. 8 bits round each
    element of the input, but for columns of outliers, by half a step of its row, absmax / 127; the products are
    integers.
    """
    k, compute = weight.shape[1], x.dtype if config.load_in_8bit else config.bnb_4bit_compute_dtype
    x2, w = x.reshape(-1, k), weight.double()
    expected = linear(x2.double(), w, bias if bias is None else bias.double()).view(y.shape)
    products = linear(x2.double().abs(), w.abs(), bias if bias is None else bias.double().abs()).view(y.shape)
    fp32 = torch.finfo(torch.float32).eps / 2
    half_ulp = torch.finfo(compute).eps / 2
    error = (k + 2) * fp32 * products + (half_ulp + torch.finfo(x.dtype).eps / 2) * expected.abs()
    if config.load_in_8bit:
        threshold = config.llm_int8_threshold or torch.inf
        inner = x2.double().abs() * (x2.abs() < threshold).all(0)
        steps = inner.amax(1, keepdim=True) / 127
        rounded = (inner > 0).double() * steps / 2
        error = error + (rounded @ w.abs().T).view(y.shape) + 2 * half_ulp * products
    elif compute != torch.float32:
        error = error + 3 * half_ulp * products
    wrong = (y.double() - expected).abs() - error * 1.01
    assert (wrong <= 0).all(), f"{wrong.max():.3g} beyond the bound at {int((wrong > 0).sum())} elements"
