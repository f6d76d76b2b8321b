"""Accelerate on quantized models: loading, preparing, offloading."""

import copy
import importlib
import sys

import accelerate
import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model, offload_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

import bnbops
from bnbops.nn import Linear4bit, Linear8bitLt, plain_state_dict
from cases.hf import saved, tiny_llama, token_batch
from cases.hf_reference import config, quantized

pytestmark = pytest.mark.usefixtures("as_bitsandbytes")
each_kind = pytest.mark.parametrize("case", ("nf4", "int8"))
each_format = pytest.mark.parametrize("case", ("nf4", "nf4 twice", "int8"))
CPU = torch.device("cpu")  # where Accelerate looks for the string "cpu", it means modules for which no GPU has room


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A float model's folder, with its weights in a file by torch.save, too."""
    folder = saved(tiny_llama(), tmp_path_factory.mktemp("llama"))
    torch.save(tiny_llama().state_dict(), folder / "weights.bin")
    return folder


def loaded(folder, case, **options):
    """By Transformers, in fp32."""
    options = {"bnb_4bit_compute_dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config(case, **options), dtype=torch.float32
    )


def settings(case, **options):
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "fp32"}
    bits = {"load_in_8bit": True} if case == "int8" else four | {"bnb_4bit_use_double_quant": case == "nf4 twice"}
    return BnbQuantizationConfig(**bits, torch_dtype=torch.float32, **options)


def empty():
    with init_empty_weights():
        return type(tiny_llama())(tiny_llama().config).eval()


def assert_same(model, expected):
    """Quantized layers, every tensor, and logits."""
    assert quantized(model).keys() == quantized(expected).keys()
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
    with torch.no_grad():
        assert torch.equal(model(token_batch()).logits, expected(token_batch()).logits)


@each_format
@pytest.mark.parametrize("left", ({}, {"skip_modules": ["lm_head", "q_proj"]}, {"keep_in_fp32_modules": ["up_proj"]}))
def test_load_and_quantize_model(llama, case, left):
    """As Transformers loads it. Some modules may be left as they are."""
    options = settings(case, **copy.deepcopy(left))
    model = load_and_quantize_model(empty(), options, str(llama / "weights.bin"), device_map={"": CPU})
    names = [name for modules in left.values() for name in modules]
    assert_same(model.eval(), loaded(llama, case, llm_int8_skip_modules=["lm_head", *names]))
    assert len(quantized(model)) == {0: 14, 1: 12, 2: 12}[len(names)]


@each_kind
def test_load_and_quantize_model_of_a_loaded_one(llama, case, monkeypatch):
    """It moves the model to the GPU, and needs one: here it is told that the CPU is that."""
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="GPU or Intel XPU is needed"):
            load_and_quantize_model(tiny_llama(), settings(case))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CPU)
    assert_same(load_and_quantize_model(tiny_llama(), settings(case)).eval(), loaded(llama, case))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@each_kind
def test_load_and_quantize_model_wants_a_gpu(llama, case):
    """Without a device_map; and 4 bits refuse one that names the CPU."""
    with pytest.raises(RuntimeError, match="No GPU found"):
        load_and_quantize_model(empty(), settings(case), str(llama / "weights.bin"))
    with pytest.raises((ValueError, RuntimeError), match=r"dispatched on the CPU|none is available|No CUDA|driver"):
        load_and_quantize_model(empty(), settings(case), str(llama / "weights.bin"), device_map={"": "cpu"})


@each_kind
def test_prepare(llama, case):
    """Accelerator trains what is not quantized as a plain loop does, to the bit, and leaves the rest alone."""
    models = []
    for accelerated in (False, True):
        model = loaded(llama, case).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        accelerator = Accelerator(cpu=True) if accelerated else None
        if accelerated:
            model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(2):
            loss = model(token_batch(), labels=token_batch()).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        models.append(accelerator.unwrap_model(model) if accelerated else model)
    before, (plain, prepared) = loaded(llama, case), models
    assert_same(prepared, plain)
    name = next(iter(quantized(before)))
    assert torch.equal(prepared.get_submodule(name).weight, before.get_submodule(name).weight)
    assert not torch.equal(prepared.lm_head.weight, before.lm_head.weight)


def test_layers_under_init_empty_weights():
    """They are made without memory, and take a float or a quantized state dict."""
    with init_empty_weights():
        layers = [Linear4bit(64, 32, quant_type="nf4"), Linear8bitLt(64, 32, has_fp16_weights=False)]
    for layer in layers:
        assert all(parameter.is_meta for parameter in layer.parameters())
        expected = copy.deepcopy(layer).to_empty(device="cpu")
        plain = nn.Linear(64, 32)
        expected.load_state_dict(plain.state_dict())
        expected.to("cpu")
        x = torch.randn(3, 64)
        for state in (plain.state_dict(), expected.state_dict()):
            fresh = copy.deepcopy(layer)
            fresh.load_state_dict(state, assign=True)
            assert torch.equal(fresh.to("cpu")(x), expected(x))


# ---- offloading ------------------------------------------------------------------------------------------------


def assert_offloaded(model, expected, name="model.layers.1.mlp.up_proj"):
    """Called twice, it gives what `expected` does, and holds no weights afterwards."""
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(token_batch()).logits, expected(token_batch()).logits)
        assert all(parameter.is_meta for parameter in model.get_submodule(name).parameters())


@each_format
@pytest.mark.parametrize("buffers", (False, True))
def test_cpu_offload(llama, case, buffers):
    model, expected = cpu_offload(loaded(llama, case), CPU, offload_buffers=buffers), loaded(llama, case)
    assert_offloaded(model, expected)
    remove_hook_from_module(model, recurse=True)
    assert_same(model, expected)


@each_format
def test_disk_offload(llama, case, tmp_path):
    model, expected = disk_offload(loaded(llama, case), str(tmp_path), CPU), loaded(llama, case)
    assert_offloaded(model, expected)


@each_format
def test_dispatch_some_layers_to_disk(llama, case, tmp_path):
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, CPU) | {"model.layers.1": "disk"}
    model = dispatch_model(loaded(llama, case), places, main_device=CPU, offload_dir=str(tmp_path))
    assert_offloaded(model, loaded(llama, case))
    assert not model.model.layers[0].mlp.up_proj.weight.is_meta


def test_offloaded_names_that_are_not_there(llama):
    """A state dict without a layer's entries: the name that is missing, as without quantized layers."""
    for case in ("nf4", "int8"):
        model, gone = loaded(llama, case), "model.layers.1.mlp.up_proj."
        state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(gone)}
        with pytest.raises(KeyError, match=f"{gone}weight"):
            cpu_offload(model, CPU, state_dict=state)(token_batch())


def test_offloading_is_completed_whenever_it_is_imported(monkeypatch):
    name = "accelerate.utils.offload"
    before = importlib.import_module(name)
    monkeypatch.setattr(accelerate.utils, "offload", before)  # restored afterwards
    monkeypatch.delitem(sys.modules, name)
    after = importlib.import_module(name)
    maps = [module.PrefixedDataset({"layer.SCB": torch.ones(2)}, "layer.") for module in (before, after)]
    assert before is not after and all(named["weight_scale"].dtype == torch.int32 for named in maps)
    bnbops.uninstall_as_bitsandbytes()
    with pytest.raises(KeyError, match=r"layer\.weight_scale"):
        _ = maps[1]["weight_scale"]
    assert "weight_scale" not in maps[0]


@each_format
def test_offload_of_plain_tensors(llama, case, tmp_path):
    """Without the alias, too: the state dict by the names that layers register has all that Accelerate looks for."""
    expected = loaded(llama, case)
    models = [copy.deepcopy(expected) for _ in range(2)]
    offload_state_dict(tmp_path, plain_state_dict(expected))
    bnbops.uninstall_as_bitsandbytes()
    assert_offloaded(cpu_offload(models[0], CPU, state_dict=plain_state_dict(expected)), expected)
    assert_offloaded(disk_offload(models[1], str(tmp_path), CPU), expected)


@each_kind
@pytest.mark.parametrize("hooks", (False, True))
def test_dispatch_to_one_device(llama, case, hooks):
    assert_same(dispatch_model(loaded(llama, case), {"": "cpu"}, force_hooks=hooks), loaded(llama, case))
