"""Checkpoints of bitsandbytes, loaded and saved by bnbops on request, without bitsandbytes and without its alias."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import bnbops
from bnbops.functional import int8_vectorwise_quant, quantize_4bit
from bnbops.integrations.transformers import load_bitsandbytes_checkpoints
from bnbops.nn import Linear4bit, Linear8bitLt
from cases.hf import saved, tiny_gpt2, tiny_llama, tiny_mixtral, token_batch

TOKENS = token_batch()
QUANTS = ["nf4", "fp4", "int8"]
MODELS = [tiny_llama, tiny_gpt2]


def config_of(quant: str) -> BitsAndBytesConfig:
    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant, bnb_4bit_use_double_quant=quant == "nf4")


def written(make: Callable, quant: str, folder: Path) -> Path:
    """What Transformers writes with bitsandbytes."""
    model = make()
    saved(model, folder)
    state = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head":
            weight = module.weight.detach()
            weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
            if quant == "int8":
                state[f"{name}.weight"], state[f"{name}.SCB"], _ = int8_vectorwise_quant(weight.half())
                state[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
            else:
                options = {"quant_type": quant, "compress_statistics": quant == "nf4"}
                state[f"{name}.weight"], statistics = quantize_4bit(weight, **options)
                entries = statistics.as_dict(packed=True)
                state |= {f"{name}.weight.{entry}": tensor for entry, tensor in entries.items()}
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of(quant).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def taken_over() -> Iterator[None]:
    load_bitsandbytes_checkpoints()
    yield
    load_bitsandbytes_checkpoints(False)


def load(folder: Path, **kwargs: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("make", MODELS)
def test_loading_and_saving_again(make: Callable, quant: str, tmp_path: Path, taken_over: None) -> None:
    model = load(written(make, quant, tmp_path / "theirs"))
    options = {} if quant == "int8" else {"double_quant": quant == "nf4", "compute_dtype": torch.float32}
    assert torch.equal(logits(model), logits(bnbops.nn.quantize_(make(), quant, progress=False, **options)))
    kind = Linear8bitLt if quant == "int8" else Linear4bit
    assert any(isinstance(module, kind) for module in model.modules())
    model.to(torch.float32)  # which Transformers refuses for bitsandbytes' models

    ours = saved(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    config = json.loads((ours / "config.json").read_text())["quantization_config"]
    assert config == config_of(quant).to_dict()
    assert torch.equal(logits(load(ours)), logits(model))


@pytest.mark.parametrize("quant", QUANTS)
def test_a_config_of_bitsandbytes_quantizes_with_its_rules(quant: str, tmp_path: Path, taken_over: None) -> None:
    for make in MODELS:
        saved(load(saved(make(), tmp_path / "float"), quantization_config=config_of(quant)), tmp_path / "ours")
        expected = load_file(written(make, quant, tmp_path / "theirs") / "model.safetensors")
        state = load_file(tmp_path / "ours" / "model.safetensors")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_experts_stay_floats(tmp_path: Path, taken_over: None) -> None:
    model = load(saved(tiny_mixtral(), tmp_path / "float"), quantization_config=config_of("nf4"))
    names = load_file(saved(model, tmp_path / "ours") / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in names


def test_skipped_modules(tmp_path: Path, taken_over: None) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj", "lm_head"])
    model = load(saved(tiny_llama(), tmp_path), quantization_config=config)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(model.model.layers[0].self_attn.k_proj) is Linear4bit


def test_nothing_happens_unasked(tmp_path: Path) -> None:
    before = dict(AUTO_QUANTIZER_MAPPING)
    load_bitsandbytes_checkpoints()
    load_bitsandbytes_checkpoints()
    assert before != AUTO_QUANTIZER_MAPPING
    load_bitsandbytes_checkpoints(False)
    assert before == AUTO_QUANTIZER_MAPPING
    load_bitsandbytes_checkpoints(False)
    assert before == AUTO_QUANTIZER_MAPPING
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(ImportError, match="bitsandbytes"):
            load(written(tiny_llama, "nf4", tmp_path))


@pytest.mark.parametrize("option", ["llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"])
def test_options_that_are_refused(option: str, tmp_path: Path, taken_over: None) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True, **{option: True})
    with pytest.raises(ValueError, match=f"{option} is not supported"):
        load(saved(tiny_llama(), tmp_path), quantization_config=config)
