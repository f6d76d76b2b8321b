"""`bnbops.integrations.peft` with models of Transformers: training, adapters on disk, experts, one graph."""

import sys
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    optimizers,
    prepare_model_for_kbit_training,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bnbops
import bnbops.integrations.peft as integration
from bnbops.integrations.transformers import BnbOpsConfig
from cases.hf import randomize, saved, tiny_gpt2, tiny_llama, tiny_mixtral, token_batch

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
EXPERTS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
EXPERTS["target_parameters"] += ["mlp.experts.down_proj"]
TOKENS = token_batch()

pytestmark = pytest.mark.usefixtures("registered_with_peft")


def llama(quant: str = "nf4", **options: object) -> nn.Module:
    return bnbops.nn.quantize_(tiny_llama(), quant, progress=False, **options)


def mixtral() -> nn.Module:
    return bnbops.nn.quantize_(tiny_mixtral(num_hidden_layers=1), progress=False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all but the adapters, by the names of the model without them."""
    state = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): value for name, value in state.items()}


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_training_changes_the_adapters_alone_and_they_load_from_disk(quant: str, tmp_path: Path) -> None:
    model = llama(quant)
    model.is_loaded_in_4bit = True  # lets PEFT turn checkpointing on
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    before = frozen(model)
    model = get_peft_model(model, LoraConfig(**LORA))
    losses = train(model, bnbops.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert equal(frozen(model), before)
    out = logits(model)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(llama(quant), tmp_path)
    assert isinstance(loaded.base_model.model.model.layers[0].mlp.down_proj, integration.LoraLinear)
    assert torch.equal(logits(loaded), out)
    other = get_peft_model(llama(quant), LoraConfig(**LORA))
    other.load_adapter(tmp_path, "trained", low_cpu_mem_usage=True)
    other.set_adapter("trained")
    assert torch.equal(logits(other), out)
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(llama(quant)))
    assert "bitsandbytes" not in sys.modules


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_merge_and_unload_gives_quantized_layers(quant: str) -> None:
    model = randomize(get_peft_model(llama(quant), LoraConfig(**LORA)))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, integration.LoraLinear)}
    expected = {
        name: layer.base_layer.dequantized(torch.float32) + layer.get_delta_weight("default")
        for name, layer in layers.items()
    }
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    model = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(model), merged)
    assert len(expected) == 6
    for name, weight in expected.items():
        layer = model.get_submodule(name.removeprefix("base_model.model."))
        assert type(layer) in (bnbops.nn.Linear4bit, bnbops.nn.Linear8bitLt)
        change = layer.dequantized(torch.float32) - weight
        assert change.norm() < (0.01 if quant == "int8" else 0.11) * weight.norm()
    fresh = llama(quant)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), merged)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_merging_into_floats_loses_nothing(quant: str, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BnbOpsConfig(quant))
    model = randomize(get_peft_model(model, LoraConfig(**LORA)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.dequantized() + layer.get_delta_weight("default")
    model.dequantize()
    out = logits(model)
    model = model.merge_and_unload()
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-6)
    assert torch.allclose(logits(model), out, atol=1e-4)


def test_disabling_adapters_takes_merged_ones_out() -> None:
    model = llama()
    plain = logits(model)
    model = randomize(get_peft_model(model, LoraConfig(**LORA)))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, integration.LoraLinear))


def test_modules_to_save_and_trained_biases() -> None:
    config = LoraConfig(**LORA, bias="lora_only", modules_to_save=["lm_head"])
    model = get_peft_model(bnbops.nn.quantize_(tiny_llama(attention_bias=True), progress=False), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("q_proj.base_layer.bias" in name for name in trained)
    assert any("lm_head.modules_to_save" in name for name in trained)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    bias = layer.base_layer.bias
    losses = train(model, bnbops.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    assert losses[-1] < losses[0]
    value = bias.detach().clone()
    layer.merge()
    layer.unmerge()
    assert layer.base_layer.bias is bias and torch.equal(bias, value) and bias.abs().max() > 0


def test_loraplus_has_two_rates_and_needs_no_bitsandbytes() -> None:
    model = get_peft_model(llama(), LoraConfig(**LORA, modules_to_save=["embed_tokens"]))
    options = {"lr": 1e-2, "loraplus_lr_ratio": 4, "min_8bit_size": 64}
    optimizer = optimizers.create_loraplus_optimizer(model, bnbops.optim.AdamW8bit, **options)
    assert type(optimizer) is bnbops.optim.AdamW8bit
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    optimizer.init_state()
    for name, parameter in model.named_parameters():
        embedding = "embed_tokens.modules_to_save" in name
        rate = 4e-2 if "lora_B" in name else 1e-2 if "lora_A" in name or embedding else None
        assert rates.get(id(parameter)) == rate, name
        if rate is not None:
            dtypes = {value.dtype for value in optimizer.state[parameter].values()}
            assert (torch.uint8 in dtypes) != embedding, name
    losses = train(model, optimizer)
    assert losses[-1] < losses[0] - 0.1
    assert "bitsandbytes" not in sys.modules


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["ia3", "adalora"])
def test_other_methods_on_models_that_say_how_they_were_loaded(quant: str, method: str) -> None:
    """Without bitsandbytes PEFT's own refuse such models."""
    model = llama(quant)
    setattr(model, "is_loaded_in_8bit" if quant == "int8" else "is_loaded_in_4bit", True)
    options = {"target_modules": ["v_proj", "lm_head"], "task_type": "CAUSAL_LM"}  # quantized, and not
    config = {
        "ia3": IA3Config(**options, feedforward_modules=[]),
        "adalora": AdaLoraConfig(**options, init_r=4, target_r=2, tinit=1, tfinal=1, total_step=10),
    }[method]
    model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = train(model, bnbops.optim.AdamW8bit(trained, lr=3e-2))
    assert losses[-1] < losses[0] - 0.05
    out = logits(model)
    model = model.merge_and_unload()
    assert (logits(model) - out).norm() < 0.2 * out.norm()
    assert type(model.model.layers[0].self_attn.v_proj).__module__.startswith("bnbops")
    assert model.is_loaded_in_8bit if quant == "int8" else model.is_loaded_in_4bit


def test_alora_acts_from_its_invocation_on() -> None:
    tokens = TOKENS.clone()
    tokens[:, 8:10] = torch.tensor([7, 9])
    model = randomize(get_peft_model(llama(), LoraConfig(**LORA, alora_invocation_tokens=[7, 9])))
    with torch.no_grad():
        out = model(input_ids=tokens).logits
        with model.disable_adapter():
            changed = (out != model(input_ids=tokens).logits).any(-1)
    assert not changed[:, :8].any() and changed[:, 8:].all()


def test_gpt2_whose_layers_were_transposed(tmp_path: Path) -> None:
    """Quantized they are not; dequantized they are again."""
    folder = saved(tiny_gpt2(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BnbOpsConfig())
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = randomize(get_peft_model(model, config))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer, integration.LoraLinear) and (layer.in_features, layer.out_features) == (64, 192)
    expected = layer.base_layer.dequantized() + layer.get_delta_weight("default")
    out = logits(model)
    layer.merge()
    assert (layer.base_layer.dequantized() - expected).norm() < 0.11 * expected.norm()
    layer.unmerge()
    assert torch.equal(logits(model), out)
    model.dequantize()
    model = model.merge_and_unload()
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert torch.allclose(model.transformer.h[0].attn.c_attn.weight, expected.T, atol=1e-6)
    assert torch.allclose(logits(model), out, atol=1e-4)


def test_dora_of_gpt2_turns_with_the_dequantized_weight(tmp_path: Path) -> None:
    """On square layers, too, where no shape tells."""
    folder = saved(tiny_gpt2(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BnbOpsConfig())
    config = LoraConfig(r=4, target_modules=["c_proj"], use_dora=True, fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = randomize(get_peft_model(model, config))
    out = logits(model)
    model.dequantize()
    assert torch.allclose(logits(model), out, atol=1e-4)
    assert torch.allclose(logits(model.merge_and_unload(safe_merge=True)), out, atol=1e-4)


# ---- experts ---------------------------------------------------------------------------------------------------


def test_experts_follow_target_parameters_as_float_ones_do(tmp_path: Path) -> None:
    """The adapter of a float model fits the quantized one, and adds the same; both ways."""
    experts = tiny_mixtral(num_hidden_layers=1)
    adapted = randomize(get_peft_model(experts, LoraConfig(**EXPERTS)))
    adapted.save_pretrained(tmp_path)
    model = mixtral()
    loaded = PeftModel.from_pretrained(mixtral(), tmp_path)
    dequantized = tiny_mixtral(num_hidden_layers=1)
    weights = dequantized.state_dict()
    for name in ("gate_up_proj", "down_proj"):
        weights[f"model.layers.0.mlp.experts.{name}"] = getattr(model.model.layers[0].mlp.experts, name)
    for name in ("q", "k", "v", "o"):
        layer = model.get_submodule(f"model.layers.0.self_attn.{name}_proj")
        weights[f"model.layers.0.self_attn.{name}_proj.weight"] = layer.dequantized()
    dequantized.load_state_dict(weights)
    expected = logits(PeftModel.from_pretrained(dequantized, tmp_path))
    assert torch.allclose(logits(loaded), expected, atol=1e-4)
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2)


def test_experts_train_merge_and_unmerge() -> None:
    model = mixtral()
    plain, before = logits(model), frozen(model)
    experts = model.model.layers[0].mlp.experts
    model = get_peft_model(model, LoraConfig(**EXPERTS))
    assert torch.allclose(logits(model), plain, atol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = train(model, bnbops.optim.AdamW8bit(trained, lr=1e-2))
    assert losses[-1] < losses[0] - 0.05
    assert len(experts.parametrizations["gate_up_proj"]) == 1  # what a forward adds is gone
    assert equal(frozen(model), before)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    names = {wrapper.parameter_name: wrapper, wrapper.base_layer.parameter_name: wrapper.base_layer}
    expected = {name: getattr(experts, name) + one.get_delta_weight("default") for name, one in names.items()}
    assert set(expected) == {"gate_up_proj", "down_proj"}
    out = logits(model)

    wrapper.merge()
    wrapper.base_layer.merge()
    for name, weight in expected.items():
        packed, state = bnbops.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        assert torch.equal(getattr(experts, name), bnbops.functional.dequantize_4bit(packed, state))
    merged = logits(model)
    assert not torch.equal(merged, out) and (merged - out).norm() < 0.3 * out.norm()
    wrapper.unmerge()
    wrapper.base_layer.unmerge()
    assert equal(frozen(model), before) and torch.equal(logits(model), out)

    model.base_model.model.model.layers[0].self_attn.q_proj.merge()
    model = model.merge_and_unload()
    assert torch.allclose(experts.down_proj, model.model.layers[0].mlp.experts.down_proj)
    assert type(model.model.layers[0].mlp.experts) is type(experts)


def test_a_second_adapter_of_experts() -> None:
    model = randomize(get_peft_model(mixtral(), LoraConfig(**EXPERTS)))
    first = logits(model)
    model.add_adapter("second", LoraConfig(**EXPERTS))
    model.set_adapter("second")
    randomize(model, seed=5)
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_a_packed_weight_is_no_target_parameter() -> None:
    with pytest.raises(ValueError, match="name the module in target_modules instead"):
        get_peft_model(llama(), LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]))


# ---- one graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_step_is_one_graph_and_equals_eager(quant: str) -> None:
    def run(compiled: bool) -> tuple[list[float], list[Tensor]]:
        model = bnbops.nn.quantize_(tiny_llama(num_hidden_layers=1), quant, progress=False)
        config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=quant == "int8")
        torch.manual_seed(0)
        model = randomize(get_peft_model(model, config))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = bnbops.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=256)

        def step(tokens: Tensor) -> Tensor:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        losses = [step(TOKENS).item() for _ in range(3)]
        assert not compiled or step.graph_count == 1
        return losses, trained

    losses, trained = run(compiled=False)
    found, compiled = run(compiled=True)
    assert found == losses and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(compiled, trained, strict=True))
