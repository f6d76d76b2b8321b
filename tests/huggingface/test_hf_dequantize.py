"""`model.dequantize()` of Transformers, and what users of bitsandbytes may do wrong."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from cases.hf import saved, tiny_gpt2, tiny_llama, token_batch
from cases.hf_reference import CASES, FAMILIES, config, dequantize_, dequantized, quantizable, quantized, rows

pytestmark = pytest.mark.usefixtures("as_bitsandbytes")
load = AutoModelForCausalLM.from_pretrained
each_kind = pytest.mark.parametrize("case", ("nf4", "int8"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tiny_llama(), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("family", "prequantized"), (("llama", False), ("gpt2", True), ("mixtral", False)))
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_dequantize(tmp_path, family, case, prequantized):
    """Plain layers with what the codes stand for, to the bit, in the model's dtype."""
    dtype, options = CASES[case][1], config(case)
    model = load(saved(FAMILIES[family](), tmp_path / "float"), quantization_config=options, dtype=dtype)
    if prequantized:
        model.save_pretrained(tmp_path / "quantized")
        model = load(tmp_path / "quantized")
    original, model = FAMILIES[family](dtype=dtype), model.dequantize()
    assert not quantized(model) and not model.is_quantized and not hasattr(model.config, "quantization_config")
    for name, module in quantizable(original).items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
        assert torch.equal(layer.weight, dequantized(rows(module), options).to(dtype))
        assert module.bias is None or torch.equal(layer.bias, module.bias)
    if dtype == torch.float32:  # in GPT-2 a Linear is where a Conv1D was, which sums in another order
        expected = dequantize_(original, options)(token_batch()).logits
        torch.testing.assert_close(model(token_batch()).logits, expected, rtol=1e-4, atol=1e-4)


@each_kind
def test_dequantize_to_a_dtype(llama, case):
    model = load(llama, quantization_config=config(case)).dequantize(dtype=torch.bfloat16)
    for name, module in quantizable(tiny_llama()).items():
        expected = dequantized(rows(module), config(case)).to(torch.bfloat16)
        assert torch.equal(model.get_submodule(name).weight, expected)


# ---- wrong calls -----------------------------------------------------------------------------------------------


def with_settings(folder: Path, **settings: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@each_kind
def test_float_checkpoint_that_claims_to_be_quantized(tmp_path, case):
    """It loads, and says at the first forward what to do; that does it."""
    options = config(case)
    folder = with_settings(saved(tiny_llama(), tmp_path), quantization_config=options.to_dict())
    model = load(folder)
    with pytest.raises(RuntimeError, match=r"is not quantized.*\.to\("):
        model(token_batch())
    expected = load(saved(tiny_llama(), tmp_path / "float"), quantization_config=options)
    assert torch.equal(model.to("cpu")(token_batch()).logits, expected(token_batch()).logits)


@each_kind
def test_checkpoint_of_another_size(llama, tmp_path, case):
    """Also where a caller would have layers of other sizes left as they are."""
    load(llama, quantization_config=config(case)).save_pretrained(tmp_path)
    for ignore in (False, True):
        with pytest.raises(ValueError, match=r"quantized weight has shape \[64, 128\].* needs \[64, 192\]"):
            load(with_settings(tmp_path, intermediate_size=192), ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize(
    ("case", "lost", "said"),
    (
        ("nf4", "weight.absmax", "absmax"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__nf4"),
        ("nf4", "weight.quant_map", "quant_map"),
        ("nf4", "weight", "weight"),
        ("int8", "SCB", "SCB"),
        ("int8", "weight", "weight"),
    ),
)
def test_checkpoint_with_a_lost_tensor(llama, tmp_path, caplog, case, lost, said):
    load(llama, quantization_config=config(case)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state[f"model.layers.0.self_attn.q_proj.{lost}"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logging.getLogger("transformers").addHandler(caplog.handler)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(tmp_path)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "q_proj" in caplog.text and said in caplog.text


@each_kind
def test_casts_are_refused(llama, case):
    """Transformers refuses them. bfloat16() it does not: it casts what is not quantized, and no codes nor scales."""
    model = load(llama, quantization_config=config(case))
    for cast in (lambda: model.to(torch.float16), lambda: model.half(), lambda: model.float()):
        with pytest.raises(ValueError, match=r"not supported for quantized|cannot cast a bitsandbytes model"):
            cast()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model.bfloat16().state_dict()
    cast = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.bfloat16}
    assert "lm_head.weight" in cast
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in cast)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@each_kind
def test_gpu_options_without_a_gpu(llama, case):
    for device in ("cuda:0", 0):
        with pytest.raises(
            (AssertionError, RuntimeError), match=r"not compiled with CUDA|none is available|No CUDA|driver"
        ):
            load(llama, quantization_config=config(case), device_map={"": device})


@each_kind
@torch.no_grad()
def test_fp32_cpu_offload(llama, tmp_path, case):
    """It leaves in fp32 what is on the CPU or the disk: without a GPU, everything. Some of both needs that option."""
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="llm_int8_enable_fp32_cpu_offload=True"):
        load(llama, quantization_config=config(case), device_map=places, offload_folder=tmp_path)
    options = config(case, llm_int8_enable_fp32_cpu_offload=True)
    model = load(llama, quantization_config=options, device_map=places, offload_folder=tmp_path)
    assert not quantized(model)
    torch.testing.assert_close(model(token_batch()).logits, tiny_llama()(token_batch()).logits)


@pytest.mark.parametrize(
    ("options", "said"),
    (
        ({"bnb_4bit_quant_type": "nf5"}, "quant_type must be 'nf4' or 'fp4' or 'int4', got 'nf5'"),
        ({"bnb_4bit_quant_storage": torch.int32}, "quant_storage must be uint8, int8"),
        ({"bnb_4bit_compute_dtype": torch.int8}, "compute_dtype must be float32"),
    ),
)
def test_settings_that_do_not_exist(llama, options, said):
    with pytest.raises(ValueError, match=said):
        load(llama, quantization_config=config("nf4", **options))


@each_kind
def test_float64(llama, case, caplog):
    """Refused where the weights are quantized, which Transformers reports, or in the first product."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    with pytest.raises(RuntimeError) as refused:
        load(llama, quantization_config=config(case), dtype=torch.float64)(token_batch())
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert re.search(
        r"float32, bfloat16 or float16( tensors)?, got (torch\.)?float64", f"{refused.value} {caplog.text}"
    )


def test_weights_that_8_bits_cannot_hold(tmp_path, caplog):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    logging.getLogger("transformers").addHandler(caplog.handler)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        load(saved(model, tmp_path), quantization_config=config("int8"))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "layers.1.mlp.up_proj" in caplog.text and "float16 cannot hold" in caplog.text


@each_kind
def test_tied_head_that_is_not_skipped(tmp_path, case):
    """Its weight is the embedding's float one: an error, no wrong output."""
    model = load(saved(tiny_gpt2(), tmp_path), quantization_config=config(case, llm_int8_skip_modules=["none"]))
    with pytest.raises(RuntimeError, match="is not quantized"):
        model(token_batch())
