"""Mixture-of-experts models of Transformers in 4 bits: fused experts are quantized as they are merged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoModelForCausalLM

from bnbops.functional import dequantize_4bit, quantize_4bit
from bnbops.integrations.transformers import BnbOpsConfig
from cases.hf import saved, tiny_mixtral, token_batch

TOKENS = token_batch()
PLACES = [(layer, name) for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]


def load(folder: Path, *args: object, implementation: str = "eager", **kwargs: object) -> nn.Module:
    config = {"quantization_config": BnbOpsConfig(*args, **kwargs)} if args else {}
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, **config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_mixtral(), tmp_path_factory.mktemp("mixtral"))


def test_the_checkpoint_has_a_tensor_an_expert(folder: Path) -> None:
    """What makes the merge a part of loading."""
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_file(folder / "model.safetensors")


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_experts_are_those_of_functional(folder: Path, quant: str, storage: str, tmp_path: Path) -> None:
    model = load(folder, quant, quant_storage=storage)
    again = load(saved(model, tmp_path))
    state, floats = load_file(tmp_path / "model.safetensors"), tiny_mixtral()
    for layer, name in PLACES:
        weight = getattr(floats.model.layers[layer].mlp.experts, name).detach()
        packed, quantization = quantize_4bit(
            weight, quant_type=quant, compress_statistics=True, quant_storage=getattr(torch, storage)
        )
        for each in (model, again):
            held = getattr(each.model.layers[layer].mlp.experts, name)
            assert torch.equal(held, dequantize_4bit(packed, quantization))
        entries = [key for key in state if f"layers.{layer}." in key and f"experts.{name}" in key]
        assert len(entries) == 6, entries  # codes, scales, their scales, two codebooks, the description
        codes = next(state[key] for key in entries if key.endswith(name))
        assert codes.dtype == packed.dtype
        assert torch.equal(codes.view(torch.uint8), packed.view(torch.uint8))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_all_implementations_compute_with_them(folder: Path, implementation: str) -> None:
    model, expected = load(folder, "nf4", implementation=implementation), load(folder, "nf4")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_experts_can_stay_floats(folder: Path, tmp_path: Path) -> None:
    model = load(folder, "nf4", experts=False)
    assert not is_parametrized(model.model.layers[0].mlp.experts)
    again = load(saved(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names  # as in the original checkpoint


def test_one_kind_of_experts_can_be_skipped(folder: Path, tmp_path: Path) -> None:
    model = load(folder, "nf4", skip=["lm_head", "layers.1.mlp.experts", "down_proj"])
    parametrized = [is_parametrized(model.model.layers[layer].mlp.experts, name) for layer, name in PLACES]
    assert parametrized == [True, False, False, False]
    again = load(saved(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_gradients_flow_through_quantized_experts(folder: Path) -> None:
    model = load(folder, "nf4")
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=TOKENS).loss.backward()
    floats = load(folder, "nf4").dequantize()
    expected = embedded.detach().clone().requires_grad_()
    floats(inputs_embeds=expected, labels=TOKENS).loss.backward()
    torch.testing.assert_close(embedded.grad, expected.grad, atol=1e-6, rtol=1e-4)
