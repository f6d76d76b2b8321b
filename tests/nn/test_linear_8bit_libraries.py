"""What Transformers, PEFT and accelerate do with bitsandbytes' 8-bit layers, done with Linear8bitLt."""

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.func import functional_call

from bnbops import MatmulLtState, matmul
from bnbops.functional import int8_vectorwise_dequant
from bnbops.nn import Embedding8bit, Int8Params, Linear8bitLt
from cases.linear_8bit import assert_quantized, inputs, layer


def test_state():
    """`module.state` is bitsandbytes' view of the layer, also of what the layer becomes."""
    module = layer()
    state = module.state
    assert isinstance(state, MatmulLtState) and (state.threshold, state.has_fp16_weights) == (3.0, False)
    assert state.CB.data_ptr() == module.weight.data_ptr() and torch.equal(state.SCB, module.SCB)
    module.init_8bit_state()
    state.reset_grads()
    assert torch.equal(module.state.SCB, module.weight.SCB) and torch.equal(module.state.CB, module.weight.CB)
    state.threshold = 0.0
    assert torch.equal(module(inputs(5)), layer(threshold=0.0)(inputs(5)))
    assert module.eval().state.is_training is False
    expected = matmul(inputs(5), module.weight, state=module.state, bias=module.bias)
    assert torch.equal(module(inputs(5)), expected)
    module.weight = Int8Params(torch.randn(24, 40), requires_grad=False).to("cpu")
    assert torch.equal(state.SCB, module.weight.SCB)

    other = Linear8bitLt(40, 24)
    other.weight = Int8Params(module.weight.data, requires_grad=False)
    other.state = MatmulLtState(SCB=module.SCB, threshold=2.0, has_fp16_weights=False)
    assert_quantized(other)
    assert torch.equal(other.SCB, module.SCB) and other.threshold == 2.0 and not other.has_fp16_weights


def test_as_peft_merges():
    """peft.tuners.lora.bnb: dequantize, add, and put a new weight into the layer."""
    module, delta = layer(), 0.1 * torch.randn(24, 40)
    weight, state = module.weight, module.state
    if state.SCB is None:
        state.SCB = weight.SCB
    merged = int8_vectorwise_dequant(weight.data, state.SCB) + delta
    module.weight = Int8Params(
        merged.to("cpu"), requires_grad=False, has_fp16_weights=module.weight.has_fp16_weights
    ).to(module.weight.device)
    state.reset_grads()
    assert_quantized(module)
    expected = layer()
    expected.load_state_dict({"weight": merged, "bias": module.bias})
    assert torch.equal(module(inputs(5)), expected(inputs(5)))


def test_as_transformers_and_accelerate_load():
    """They build a new parameter from the old one's attributes and put it into `_parameters`, past the module."""
    fresh = Linear8bitLt(40, 24, has_fp16_weights=False, device="meta")
    for source, device in ((fresh, "meta"), (layer(threshold=0.0), "cpu")):
        expected = Linear8bitLt(40, 24, has_fp16_weights=False)
        new, bias = expected.weight.detach().clone(), expected.bias
        expected.to("cpu")
        module, old = source, source.weight
        assert old.device.type == device
        arguments = vars(old)
        arguments.pop("SCB", None)
        value = Int8Params(new, requires_grad=False, **arguments).to("cpu")
        module._parameters["weight"], module._parameters["bias"] = value, bias
        assert torch.equal(module(inputs(5)), expected(inputs(5)))
        assert all(map(torch.equal, module.state_dict().values(), expected.state_dict().values()))

        scales = 2 * expected.SCB  # a quantized checkpoint: first the codes, then their scales
        module._parameters["weight"] = Int8Params(expected.weight.data, requires_grad=False).to("cpu")
        with pytest.raises(RuntimeError, match="has no scales"):
            module(inputs(5))
        module.weight.SCB = scales
        module._parameters["bias"] = nn.Parameter(2 * bias.detach())
        assert torch.equal(module(inputs(5)), 2 * expected(inputs(5)))
        assert torch.equal(module.state_dict()["SCB"], scales) and torch.equal(copy.deepcopy(module).SCB, scales)
        module.init_8bit_state()
        assert_quantized(module)
        assert torch.equal(module.half().SCB, scales)


def test_under_accelerates_empty_weights(monkeypatch):
    """init_empty_weights wraps register_parameter and rebuilds each parameter from its attributes, on meta."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            attributes = {**vars(module._parameters[name]), "requires_grad": param.requires_grad}
            module._parameters[name] = type(param)(module._parameters[name].to("meta"), **attributes)

    for has_fp16_weights in (True, False):
        monkeypatch.setattr(nn.Module, "register_parameter", register_empty)
        module = Linear8bitLt(40, 24, has_fp16_weights=has_fp16_weights)
        monkeypatch.undo()
        assert all(p.is_meta for p in module.parameters())
        module.load_state_dict(layer(has_fp16_weights).state_dict(), assign=True)
        assert torch.equal(module.to("cpu")(inputs(5)), layer(has_fp16_weights, 0.0)(inputs(5)))


def test_weights_that_are_assigned():
    """Another float weight, an Int8Params or a plain parameter, is quantized when the module is moved next."""
    data = torch.randn(24, 40)
    for weight in (Int8Params(data.clone(), False), nn.Parameter(data.clone())):
        module = layer()
        module.weight = weight
        assert module.SCB is None and list(module.state_dict()) == ["weight", "bias"]
        with pytest.raises(RuntimeError, match="is not quantized"):
            module(inputs(5))
        module.to("cpu")
        assert_quantized(module)
        assert torch.equal(module.SCB, data.half().abs().amax(1).float())


def test_weights_of_another_shape():
    """A checkpoint of another size: refused, and the layer is as it was."""
    module, other = layer(), Linear8bitLt(40, 32, has_fp16_weights=False).to("cpu")
    before = module(inputs(5))
    with pytest.raises(
        ValueError, match=r"quantized weight has shape \[32, 40\], but this Linear8bitLt needs \[24, 40\]"
    ):
        module.weight = other.weight
    assert torch.equal(module(inputs(5)), before)


def test_float_weights_made_anew_stay_float():
    """Transformers makes the weight of a layer to be trained from the attributes of the one that it replaces."""
    module, value = Linear8bitLt(40, 24, has_fp16_weights=True, threshold=3.0), torch.randn(24, 40)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        expected.weight.copy_(value)
    module.weight = Int8Params(value, requires_grad=False, **vars(module.weight)).to("cpu")
    assert torch.equal(module.weight, value) and list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(module(inputs(5)), expected(inputs(5)))


def test_tied_weights():
    """One parameter in two modules: one set of scales, also in a copy."""
    for quantize_first in ([], ["embedding"], ["embedding", "head"]):
        model = nn.ModuleDict({"embedding": Embedding8bit(24, 40), "head": Linear8bitLt(40, 24, False, False)})
        for name in quantize_first:
            model[name].to("cpu")
        model.head.weight = model.embedding.weight
        model = copy.deepcopy(model.to("cpu"))
        assert model.head.weight is model.embedding.weight
        assert model.head.weight_scale is model.embedding.weight_scale
        assert_quantized(model.head)
        table = int8_vectorwise_dequant(model.head.weight.data, model.head.SCB)
        assert torch.equal(model.embedding(torch.arange(24)), table)
        assert torch.equal(model.head(inputs(5)), matmul(inputs(5), model.embedding.weight))


def test_safetensors_of_a_model(tmp_path):
    model, fresh = nn.Sequential(layer()), nn.Sequential(Linear8bitLt(40, 24, has_fp16_weights=False, threshold=3.0))
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(fresh(inputs(5)), model(inputs(5)))


def test_loading_into_one_module():
    """Older Transformers load module by module, all from one dict."""
    module, source = Linear8bitLt(40, 24, has_fp16_weights=False, threshold=3.0), layer().state_dict()
    state, errors = {f"a.{key}": tensor for key, tensor in source.items()}, []
    module._load_from_state_dict(state, "a.", {}, True, errors, errors, errors)
    assert not errors and list(state) == ["a.weight", "a.bias", "a.SCB", "a.weight_format"]
    assert torch.equal(module(inputs(5)), layer()(inputs(5)))


def test_scales_that_are_replaced():
    """By whoever walks the parameters and puts others there, as loaders do: the module's own are those that count."""
    module = layer()
    doubled = nn.Parameter((2 * module.SCB).view(torch.int32), requires_grad=False)
    module._parameters["weight_scale"] = doubled
    expected = functional_call(module, {"bias": 0 * module.bias}, inputs(5))
    assert torch.equal(expected, 2 * functional_call(layer(), {"bias": 0 * module.bias}, inputs(5)))
    for other in (copy.deepcopy(module), module.half().float(), copy.deepcopy(module)):
        assert torch.equal(other.SCB, doubled.view(torch.float32))
    assert_quantized(other)
