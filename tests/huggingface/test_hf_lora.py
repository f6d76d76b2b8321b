"""PEFT as it is, with bnbops installed as bitsandbytes: QLoRA trains, merges and unmerges as plain arithmetic says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bnbops
import bnbops.integrations.peft as integration
from cases.hf import randomize, saved, tiny_llama, token_batch

pytestmark = [pytest.mark.every_torch, pytest.mark.usefixtures("as_bitsandbytes")]

FORMATS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LORA = {"r": 4, "lora_alpha": 8, **TARGETS}
METHODS = {
    "lora": lambda: LoraConfig(**LORA),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "ia3": lambda: IA3Config(**TARGETS, feedforward_modules=["down_proj"]),
    "adalora": lambda: AdaLoraConfig(**TARGETS, init_r=4, target_r=4, total_step=10),
}
TOKENS = token_batch()
each_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def load(folder: Path) -> Callable[[str], nn.Module]:
    def load(format: str) -> nn.Module:
        options = BitsAndBytesConfig(**FORMATS[format])
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)

    return load


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all but the adapters, by the names of the model without them."""
    prefix, state = "base_model.model.", model.state_dict()
    state = {name.removeprefix(prefix).replace(".base_layer", ""): value for name, value in state.items()}
    return {n: v.clone() for n, v in state.items() if not any(own in n for own in ("lora_", "ia3_l", "ranknum"))}


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def floats(layer: nn.Module) -> Tensor:
    if isinstance(layer, bnbops.nn.Linear8bitLt):
        return bnbops.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
    return bnbops.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def rounded(layer: nn.Module, weight: Tensor) -> Tensor:
    """A float weight after it has been quantized with the settings of the layer."""
    if isinstance(layer, bnbops.nn.Linear8bitLt):
        return bnbops.functional.int8_vectorwise_dequant(*bnbops.functional.int8_vectorwise_quant(weight.half())[:2])
    options = {"quant_type": "nf4", "compress_statistics": True}
    return bnbops.functional.dequantize_4bit(*bnbops.functional.quantize_4bit(weight, **options))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


@each_format
@pytest.mark.parametrize("method", METHODS)
def test_training_changes_the_adapters_alone(load: Callable, format: str, method: str) -> None:
    model = prepare_model_for_kbit_training(load(format), gradient_checkpointing_kwargs={"use_reentrant": False})
    before = frozen(model)
    model = get_peft_model(model, METHODS[method]())
    assert {type(layer).__name__.removeprefix("SVD") for layer in layers(model).values()} == {
        "Linear4bit" if format == "4 bits" else "Linear8bitLt"
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = train(model, bnbops.optim.AdamW8bit(trained, lr=1e-2 if method != "ia3" else 1e-1))
    assert losses[-1] < losses[0] - 0.02
    assert equal(frozen(model), before)


@each_format
def test_loraplus(load: Callable, format: str) -> None:
    model = get_peft_model(load(format), LoraConfig(**LORA))
    before = frozen(model)
    optimizer = create_loraplus_optimizer(model, bnbops.optim.AdamW8bit, lr=1e-2, loraplus_lr_ratio=4)
    assert type(optimizer) is bnbops.optim.AdamW8bit
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-6, 4e-2, 4e-2]
    losses = train(model, optimizer)
    assert losses[-1] < losses[0] - 0.1
    assert equal(frozen(model), before)


@each_format
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_and_unmerging_after_evaluation(load: Callable, format: str, method: str) -> None:
    """Where bitsandbytes has repacked its weights, on a CPU, they are silently wrong."""
    model = randomize(get_peft_model(load(format), METHODS[method]()))
    out = logits(model)
    expected, unmerged = {}, {}
    for name, layer in layers(model).items():
        base, delta = layer.base_layer, layer.get_delta_weight("default")
        weight, factor = floats(base) + delta, 1
        if method == "dora":
            factor = (layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1)).unsqueeze(1)
        expected[name] = rounded(base, factor * weight)
        unmerged[name] = rounded(base, expected[name] / factor - delta)
    model.merge_adapter()
    merged = logits(model)
    assert (merged - out).norm() < (0.05 if format == "8 bits" else 0.35) * out.norm()
    for name, layer in layers(model).items():
        assert torch.allclose(floats(layer.base_layer), expected[name], rtol=1e-5, atol=1e-6), name
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        assert torch.allclose(floats(layer.base_layer), unmerged[name], rtol=1e-5, atol=1e-6), name


@each_format
def test_merge_and_unload(load: Callable, format: str) -> None:
    model = randomize(get_peft_model(load(format), LoraConfig(**LORA)))
    logits(model)
    expected = {
        n: rounded(m.base_layer, floats(m.base_layer) + m.get_delta_weight("default")) for n, m in layers(model).items()
    }
    model = model.merge_and_unload(safe_merge=True)
    for name, weight in expected.items():
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        assert type(layer) in (bnbops.nn.Linear4bit, bnbops.nn.Linear8bitLt)
        assert torch.allclose(floats(layer), weight, rtol=1e-5, atol=1e-6)
    logits(model)


@each_format
@pytest.mark.parametrize("method", METHODS)
def test_adapters_on_disk(load: Callable, format: str, method: str, tmp_path: Path) -> None:
    model = randomize(get_peft_model(load(format), METHODS[method]()))
    out = logits(model)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == model.active_peft_config.peft_type
    assert torch.equal(logits(PeftModel.from_pretrained(load(format), tmp_path)), out)


def test_with_both_the_layers_are_those_of_the_integration(load: Callable) -> None:
    integration.register()
    try:
        model = randomize(get_peft_model(load("4 bits"), METHODS["dora"]()))
    finally:
        integration.unregister()
    assert {type(layer) for layer in layers(model).values()} == {integration.LoraLinear}
    before, out = frozen(model), logits(model)
    model.merge_adapter()
    assert not equal(frozen(model), before)
    model.unmerge_adapter()
    assert equal(frozen(model), before)
    model.merge_and_unload()
    assert not torch.equal(logits(model.base_model.model), out)
