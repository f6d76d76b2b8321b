"""`from_pretrained` of Transformers quantizes with bnbops, installed as bitsandbytes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bnbops.nn import Linear4bit, Linear8bitLt
from cases.hf import saved, tiny_llama, token_batch
from cases.hf_reference import (
    CASES,
    FAMILIES,
    assert_multiplies,
    config,
    dequantize_,
    dequantized,
    quantizable,
    quantize,
    quantized,
    recorded,
    rows,
)

pytestmark = pytest.mark.usefixtures("as_bitsandbytes")
load = AutoModelForCausalLM.from_pretrained
each_family = pytest.mark.parametrize("family", FAMILIES)
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: saved(model(), tmp_path_factory.mktemp(family)) for family, model in FAMILIES.items()}


@each_family
@each_case
def test_tensors(folders, family, case):
    """Each layer has the codes and scales of its float weight, transposed in GPT-2; nothing else has changed."""
    dtype, options = CASES[case][1], config(case)
    model, original = load(folders[family], quantization_config=options, dtype=dtype), FAMILIES[family](dtype=dtype)
    layers, kind = quantized(model), Linear8bitLt if options.load_in_8bit else Linear4bit
    assert layers.keys() == quantizable(original).keys() and len(layers) >= 8
    for name, module in quantizable(original).items():
        layer, (codes, scales) = layers[name], quantize(rows(module), options)
        assert type(layer) is kind and (layer.out_features, layer.in_features) == tuple(rows(module).shape)
        assert torch.equal(layer.weight.view(torch.uint8).flatten(), codes.view(torch.uint8).flatten())
        assert not layer.weight.requires_grad and layer.weight.dtype == codes.dtype
        if options.load_in_8bit:
            assert torch.equal(layer.SCB, scales) and layer.threshold == options.llm_int8_threshold
        else:
            assert layer.quant_state == scales and layer.compute_dtype == options.bnb_4bit_compute_dtype
        assert (layer.bias is None) == (module.bias is None)

    left, expected = dict(model.named_parameters()), dict(original.named_parameters())
    left = {name: tensor for name, tensor in left.items() if ".".join(name.split(".")[:-1]) not in layers}
    left |= {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    assert left.keys() == expected.keys() - {f"{name}.weight" for name in layers}
    assert all(tensor.dtype == dtype and torch.equal(tensor, expected[name]) for name, tensor in left.items())


@each_family
@each_case
@torch.no_grad()
def test_layers_compute_with_what_the_codes_stand_for(folders, family, case):
    """Within the roundings of each layer; and so does the model: its logits are near those of the float model whose
    weights are the dequantized ones."""
    dtype, options = CASES[case][1], config(case)
    model, original = load(folders[family], quantization_config=options, dtype=dtype), FAMILIES[family](dtype=dtype)
    with recorded(model) as found:
        logits = model(token_batch()).logits
    assert logits.dtype == dtype and found.keys() == quantizable(original).keys()
    for name, module in quantizable(original).items():
        assert_multiplies(*found[name], dequantized(rows(module).float(), options), module.bias, options)

    if case == "nf4":  # fp32 throughout, and inputs are not rounded: no expert is chosen differently
        expected = dequantize_(original, options)(token_batch()).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@each_family
@torch.no_grad()
def test_generate(folders, family):
    """Greedy, with and without a cache, and sampled: the tokens of the dequantized model."""
    options, prompt = config("nf4"), token_batch(columns=5)
    model, expected = load(folders[family], quantization_config=options), dequantize_(FAMILIES[family](), options)
    tokens = {}
    for sample, cache in ((False, True), (False, False), (True, True)):
        for which in (model, expected):
            torch.manual_seed(3)
            length = {"max_new_tokens": 8, "min_new_tokens": 8}
            tokens[which, sample, cache] = which.generate(prompt, do_sample=sample, use_cache=cache, **length)
        assert tokens[model, sample, cache].shape == (2, 13)
        assert torch.equal(tokens[model, sample, cache], tokens[expected, sample, cache])
    assert torch.equal(tokens[model, False, True], tokens[model, False, False])
    assert not torch.equal(tokens[model, False, True], tokens[model, True, True])


@pytest.mark.parametrize("case", ("nf4", "int8"))
def test_skip_modules(folders, case):
    """A list takes the place of the default one, which has the head alone."""
    skip = ["q_proj", "model.layers.1"]
    model = load(folders["llama"], quantization_config=config(case, llm_int8_skip_modules=skip))
    original = tiny_llama()
    names = {name for name in quantizable(original) if "q_proj" not in name and ".layers.1." not in name}
    assert quantized(model).keys() == names | {"lm_head"}
    weight = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(weight, original.model.layers[1].mlp.up_proj.weight)


@torch.no_grad()
def test_outliers_are_not_rounded(tmp_path):
    """A feature of magnitudes beyond the threshold: layers that know it are accurate, those that do not are less so."""
    original = tiny_llama()
    for layer in original.model.layers:
        layer.input_layernorm.weight[3] = 60.0
    folder, error = saved(original, tmp_path), {}
    for threshold in (0.0, 6.0):
        options = config("int8", llm_int8_threshold=threshold)
        model = load(folder, quantization_config=options)
        with recorded(model) as found:
            model(token_batch())
        name = "model.layers.0.self_attn.q_proj"
        x, y = found[name]
        weight = dequantized(rows(original.get_submodule(name)), options)
        assert (x[..., 3].abs() > 6).any() and (x[..., :3].abs() < 6).all()
        assert_multiplies(x, y, weight, None, options)
        error[threshold] = (y - x @ weight.T).norm().item()
    assert error[6.0] < error[0.0] / 5


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@torch.no_grad()
def test_has_fp16_weight(folders, family):
    """The weights stay float, and each forward quantizes them: the outputs of weights that were quantized before."""
    options = config("int8", llm_int8_has_fp16_weight=True)
    model, original = load(folders[family], quantization_config=options), FAMILIES[family]()
    for name, module in quantizable(original).items():
        assert torch.equal(quantized(model)[name].weight, rows(module))
    expected = load(folders[family], quantization_config=config("int8"))(token_batch()).logits
    torch.testing.assert_close(model(token_batch()).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ("nf4", "int8"))
@pytest.mark.parametrize("device_map", (None, "auto", "cpu", {"": "cpu"}))
@torch.no_grad()
def test_device_maps_without_a_gpu(folders, case, device_map, request):
    if torch.cuda.is_available():
        request.applymarker(pytest.mark.xfail(reason="these maps choose the GPU"))
    model = load(folders["gpt2"], quantization_config=config(case), device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    expected = load(folders["gpt2"], quantization_config=config(case))
    assert torch.equal(model(token_batch()).logits, expected(token_batch()).logits)


@pytest.mark.parametrize(("family", "case"), (("llama", "nf4"), ("gpt2", "nf4"), ("mixtral", "nf4"), ("llama", "int8")))
def test_gradients_pass_through(folders, family, case):
    """The frozen layers hand the gradient of the dequantized model to what is trained before them."""
    options = config(case)
    model = load(folders[family], quantization_config=options)
    expected = dequantize_(FAMILIES[family](), options)
    for which in (model, expected):
        which(token_batch(), labels=token_batch()).loss.backward()
    assert all(layer.weight.grad is None for layer in quantized(model).values())
    grads = [which.get_input_embeddings().weight.grad for which in (model, expected)]
    close = 1e-4 if case == "nf4" else 0.1  # 8 bits round the activations, too
    assert (grads[0] - grads[1]).norm() < close * grads[1].norm()
