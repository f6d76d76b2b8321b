"""The quantization method "bnbops" of Transformers: loading, saving, dequantizing."""

import copy
import filecmp
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

import bnbops
from bnbops.functional import dequantize_4bit, quantize_4bit
from bnbops.integrations.transformers import BnbOpsConfig
from bnbops.nn import Embedding4bit, Linear4bit, Linear8bitLt
from cases.hf import saved, tiny_gpt2, tiny_llama, tiny_mixtral, token_batch
from cases.quantize_model import FORMATS

MODELS = [tiny_llama, tiny_gpt2, tiny_mixtral]
TOKENS = token_batch()


def load(folder: Path, *args: object, dtype: torch.dtype = torch.float32, **kwargs: object) -> nn.Module:
    config = {"quantization_config": BnbOpsConfig(*args, **kwargs)} if args else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **config)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def rounded(model: nn.Module, **options: object) -> nn.Module:
    """The float model with all weights rounded to 4 bits, but those of norms, embeddings, routers and the head."""

    def rounded_weight(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(dequantize_4bit(*quantize_4bit(weight.detach().contiguous(), **options)))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight = rounded_weight(module.weight)
        elif isinstance(module, Conv1D):
            module.weight = nn.Parameter(rounded_weight(module.weight.T).T.contiguous())
        elif name.endswith("experts"):
            module.gate_up_proj = rounded_weight(module.gate_up_proj)
            module.down_proj = rounded_weight(module.down_proj)
    return model


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
@pytest.mark.parametrize("make", MODELS)
def test_a_float_checkpoint_is_quantized_while_it_loads(make: Callable, quant: str, tmp_path: Path) -> None:
    model = load(saved(make(), tmp_path), quant, blocksize=32)
    expected = rounded(make(), quant_type=quant, blocksize=32, compress_statistics=True)
    torch.testing.assert_close(logits(model), logits(expected), atol=2e-5, rtol=1e-5)
    assert (logits(make()) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_what_quantize_does(make: Callable, quant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From a checkpoint of another dtype, too."""
    model = load(saved(make(), tmp_path), quant, dtype=dtype)
    expected = bnbops.nn.quantize_(load(tmp_path, dtype=dtype), quant, progress=False)
    assert torch.equal(logits(model), logits(expected))
    assert type(model.get_output_embeddings()) is nn.Linear
    kinds = {type(module) for module in model.modules()}
    assert (Linear8bitLt if quant == "int8" else Linear4bit) in kinds
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_codes_and_scales_are_those_of_functional(tmp_path: Path) -> None:
    saved(load(saved(tiny_gpt2(), tmp_path / "float"), "nf4", double_quant=False), tmp_path / "nf4")
    state = load_file(tmp_path / "nf4" / "model.safetensors")
    key = "transformer.h.1.mlp.c_fc.weight"
    weight = tiny_gpt2().transformer.h[1].mlp.c_fc.weight.detach()
    packed, expected = quantize_4bit(weight.T.contiguous(), quant_type="nf4")
    assert torch.equal(state[key], packed)
    for name, value in expected.as_dict(packed=True).items():
        assert torch.equal(state[f"{key}.{name}"], value)


def test_skip_and_embeddings(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    model = load(folder, "nf4", skip=["layers.0.*.q_proj", "down_proj"], embeddings=True)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert type(model.model.embed_tokens) is Embedding4bit
    assert type(model.lm_head) is Linear4bit  # skip says otherwise than by default


def test_what_transformers_keeps_in_fp32_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tiny_llama(), tmp_path)
    monkeypatch.setattr(type(tiny_llama()), "_keep_in_fp32_modules", ["o_proj"])
    model = load(folder, "nf4", dtype=torch.float16)
    layer = model.model.layers[0].self_attn
    assert type(layer.o_proj) is nn.Linear
    assert layer.o_proj.weight.dtype == torch.float32
    assert type(layer.q_proj) is Linear4bit


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_tied_head_shares_its_embeddings_quantized_weight(quant: str, tmp_path: Path) -> None:
    folder = saved(tiny_gpt2(), tmp_path / "float")
    model = load(folder, quant, embeddings=True, skip=[])
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.lm_head.weight.is_floating_point()
    for _ in range(2):
        saved(model, tmp_path / "quantized")
        names = load_file(tmp_path / "quantized" / "model.safetensors").keys()
        assert not any(name.startswith("lm_head") for name in names)
        again = load(tmp_path / "quantized")
        assert again.lm_head.weight is again.transformer.wte.weight
        assert torch.equal(logits(again), logits(model))
        model = load(saved(model, tmp_path / "other"))


def test_a_tied_embedding_of_a_head_that_is_skipped_is_left(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"transformer\.wte: shares its weight with lm_head"):
        model = load(saved(tiny_gpt2(), tmp_path), "nf4", embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("quantized", [False, True])
def test_a_new_head_stays_a_float_one(quantized: bool, tmp_path: Path) -> None:
    folder, config = saved(tiny_llama(), tmp_path / "float"), {"quantization_config": BnbOpsConfig("nf4")}
    if quantized:  # its skip matches nothing in the new model
        folder, config = saved(load(folder, "nf4", skip=["lm_head"]), tmp_path / "nf4"), {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **config)
    said = any("not quantized, since the checkpoint lacks them: score.weight" in str(each.message) for each in caught)
    assert said is not quantized
    assert type(model.score) is nn.Linear
    assert model.score.weight.isfinite().all()
    assert model.score.weight.requires_grad
    assert type(model.model.layers[0].mlp.up_proj) is Linear4bit
    bare = AutoModel.from_pretrained(folder, **config)
    hidden = model.model(TOKENS).last_hidden_state
    assert torch.equal(bare(TOKENS).last_hidden_state, hidden)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: object, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    config = BnbOpsConfig("nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device_map)
    assert torch.equal(logits(model), logits(load(folder, "nf4")))


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.filterwarnings("ignore:these weights stay:UserWarning")  # experts in int8
def test_saving_and_loading_again(make: Callable, quant: str, tmp_path: Path) -> None:
    model = load(saved(make(), tmp_path / "float"), quant)
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "shards", max_shard_size="50kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    load(tmp_path / "shards").save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "one" / name, tmp_path / "two" / name, shallow=False), name


def test_floats_of_a_quantized_checkpoint_are_cast_and_codes_are_not(tmp_path: Path) -> None:
    folder = saved(load(saved(tiny_llama(), tmp_path / "float"), "nf4", quant_storage="bfloat16"), tmp_path / "nf4")
    model = load(folder, dtype=torch.float16)
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name} == {torch.float16}
    before, after = load(folder).model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert before.weight.dtype == after.weight.dtype == torch.bfloat16
    assert torch.equal(before.weight.view(torch.uint8), after.weight.view(torch.uint8))
    assert before.quant_state == after.quant_state


def test_parameters_count_as_floats_do(tmp_path: Path) -> None:
    for make in MODELS:
        model = load(saved(make(), tmp_path / make.__name__), "nf4", embeddings=True, skip=[])
        for excluded in (False, True):
            assert model.num_parameters(exclude_embeddings=excluded) == make().num_parameters(
                exclude_embeddings=excluded
            )
        assert model.num_parameters(only_trainable=True) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        assert copy.deepcopy(model).num_parameters() == model.num_parameters()


# ---- afterwards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_dequantize(make: Callable, tmp_path: Path) -> None:
    model = load(saved(make(), tmp_path / "float"), "nf4")
    expected = logits(rounded(make(), quant_type="nf4", compress_statistics=True))
    assert model.dequantize() is model
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), expected)
    assert not hasattr(again.config, "quantization_config")
    assert not getattr(again, "is_quantized", False)
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("float", "again")]
    assert names[0] == names[1]


def test_dequantize_keeps_ties_and_takes_a_dtype(tmp_path: Path) -> None:
    folder = saved(tiny_gpt2(), tmp_path)
    for quant in ("nf4", "int8"):
        model = load(folder, quant, embeddings=True, skip=[])
        table = model.transformer.wte(torch.arange(96))
        model.dequantize(torch.bfloat16)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.lm_head.weight, table.to(torch.bfloat16))
        assert type(model.transformer.h[0].attn.c_attn) is Conv1D


def test_generate_with_a_compiled_forward(tmp_path: Path) -> None:
    model = load(saved(tiny_llama(num_hidden_layers=1), tmp_path), "nf4")
    assert model.hf_quantizer.is_compileable
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(TOKENS, **options)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(TOKENS, **options), expected)


def test_training_wants_adapters(tmp_path: Path) -> None:
    model = load(saved(tiny_llama(), tmp_path), "nf4")
    assert model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="attach trainable adapters on top of the quantized model"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


def test_what_other_libraries_look_at(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    for quant, bits in (("nf4", 4), ("int8", 8)):
        model = load(folder, quant)
        assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (bits == 4, bits == 8)
        assert model.quantization_method == "bnbops"
        assert json.loads(model.config.to_json_string())["quantization_config"]["quant"] == quant
        model.to(torch.bfloat16)  # casts what is not quantized
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
