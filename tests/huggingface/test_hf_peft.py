"""`bnbops.integrations.peft`: each adapter's forward, merge and unmerge against plain float arithmetic."""

import sys
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import bnbops
import bnbops.integrations.peft as integration
from bnbops.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt
from cases.hf import randomize

IN, OUT = 64, 96
FORMATS = {
    "nf4": dict(quant_type="nf4"),
    "fp4, plain scales": dict(quant_type="fp4", compress_statistics=False, blocksize=32),
    "nf4 in bf16": dict(quant_type="nf4", quant_storage=torch.bfloat16),
    "nf4, flat": dict(quant_type="nf4", blocksize=128),
    "int8": None,
}

pytestmark = pytest.mark.usefixtures("registered_with_peft")


class Model(nn.Module):
    """What PEFT needs of a model: a name for its layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear(format: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    options = FORMATS[format]
    if options is None:
        layer = Linear8bitLt(IN, OUT, bias, has_fp16_weights=False)
    else:
        layer = Linear4bit(IN, OUT, bias, **options)
    return layer.to(dtype).to("cpu")


def is_int8(layer: nn.Module) -> bool:
    return isinstance(layer, Linear8bitLt | Embedding8bit)


def floats(layer: nn.Module) -> Tensor:
    """The weight in fp32, by the functions that users have."""
    if is_int8(layer):
        return bnbops.functional.int8_vectorwise_dequant(layer.weight.data, layer.SCB)
    state = layer.quant_state
    state.dtype = torch.float32
    return bnbops.functional.dequantize_4bit(layer.weight.data, state)


def codes(layer: nn.Module, weight: Tensor) -> Tensor:
    """The bytes of a float weight, quantized with the settings of the layer."""
    if is_int8(layer):
        return bnbops.functional.int8_vectorwise_quant(weight.half())[0].view(torch.uint8)
    state = layer.quant_state
    options = dict(blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type)
    return bnbops.functional.quantize_4bit(weight, **options)[0]


def held(layer: nn.Module) -> Tensor:
    return layer.weight.data.contiguous().view(torch.uint8)


def state_bytes(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, whose tensors compare by their bytes."""
    return {name: value.clone().contiguous().view(-1).view(torch.uint8) for name, value in module.state_dict().items()}


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def adapt(layer: nn.Module, config: LoraConfig | None = None, **options: object) -> tuple[PeftModel, nn.Module]:
    """A model of one adapted layer, and that layer, with adapters that do something."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], **options) if config is None else config
    model = get_peft_model(Model(layer), config)
    return randomize(model, size=0.1), model.base_model.model.layer


def delta(layer: nn.Module, name: str = "default", scaling: float = 6 / 4) -> Tensor:
    return (layer.lora_B[name].weight @ layer.lora_A[name].weight) * scaling


INPUT = torch.randn(5, 3, IN, generator=torch.Generator().manual_seed(2))


# ---- LoRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_forward_adds_the_adapter_and_only_that_gets_gradients(format: str) -> None:
    base = linear(format)
    before, plain = state_bytes(base), base(INPUT)
    model, layer = adapt(base)
    assert isinstance(layer, integration.LoraLinear)
    assert "bitsandbytes" not in sys.modules
    x = INPUT.clone().requires_grad_()
    out = model(x)
    assert close(out, plain.double() + INPUT.double() @ delta(layer).double().T)
    out.square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    grad, rows = 2 * out.detach(), INPUT.flatten(0, 1)
    to_a = (grad @ layer.lora_B["default"].weight).flatten(0, 1)
    assert close(layer.lora_A["default"].weight.grad, 1.5 * to_a.T @ rows)
    assert close(x.grad, grad @ (floats(base) + delta(layer)))
    assert_same(state_bytes(base), before)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_requantizes_and_unmerge_restores_the_bytes(format: str, safe: bool) -> None:
    base = linear(format)
    model, layer = adapt(base)
    before, original, out = state_bytes(model), base.weight, model(INPUT)
    expected = floats(base) + delta(layer)
    settings = deepcopy({k: v for k, v in vars(base).items() if k[0] != "_"}), base.extra_repr()
    codes_expected = codes(base, expected)

    layer.merge(safe_merge=safe)
    assert torch.equal(held(base).view(-1), codes_expected.view(-1))
    step = floats(base).abs().max() / (250 if is_int8(base) else 5)  # the widest gap of codes, halved
    assert ((floats(base) - expected).abs() <= step).all()
    assert torch.equal(model(INPUT), base(INPUT))
    assert (model(INPUT) - out).norm() < (0.02 if is_int8(base) else 0.2) * out.norm()
    assert ({k: v for k, v in vars(base).items() if k[0] != "_"}, base.extra_repr()) == settings
    if not is_int8(base):
        assert base.weight.quant_state.dtype == original.quant_state.dtype == torch.float32

    layer.unmerge()
    assert base.weight is original
    assert_same(state_bytes(model), before)
    assert torch.equal(model(INPUT), out)


def test_adapters_merge_in_any_order_into_the_same_bytes() -> None:
    """PEFT requantizes after each adapter; here the weight from before all of them is quantized once."""
    model, layer = adapt(linear("nf4"))
    model.add_adapter("second", LoraConfig(r=2, use_rslora=True, target_modules=["layer"]))
    model.set_adapter("second")
    randomize(model, seed=3, size=0.1)
    base = layer.get_base_layer()
    before = state_bytes(model)
    expected = floats(base) + delta(layer) + delta(layer, "second", 8 / 2**0.5)
    merged = codes(base, expected).view(-1)
    for order in (["default", "second"], ["second", "default"]):
        layer.merge(adapter_names=order)
        assert torch.equal(held(base).view(-1), merged)
        layer.unmerge()
    layer.merge(adapter_names=["second"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        layer.merge(adapter_names=["default"])
    assert torch.equal(held(base).view(-1), merged) and layer.merged_adapters == ["second", "default"]
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["default"])
    layer.unmerge()
    assert_same(state_bytes(model), before)


def test_adapters_of_each_row_of_a_batch() -> None:
    model, layer = adapt(linear("nf4"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["layer"]))
    model.set_adapter("second")
    randomize(model, seed=3, size=0.1).eval()
    plain = layer.base_layer(INPUT[:3])
    with torch.no_grad():
        out = model(INPUT[:3], adapter_names=["second", "__base__", "default"])
    deltas = [delta(layer, "second", 8 / 2), torch.zeros(OUT, IN), delta(layer)]
    assert close(out, plain + torch.stack([x @ d.T for x, d in zip(INPUT[:3], deltas, strict=True)]))
    layer.merge()
    with pytest.raises(ValueError, match="merged"), torch.no_grad():
        model(INPUT[:3], adapter_names=["second", "__base__", "default"])


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_lora_bias_is_merged_and_taken_out(format: str) -> None:
    model, layer = adapt(linear(format), lora_bias=True)
    base = layer.base_layer
    bias, plain = base.bias.clone(), base(INPUT)
    own = layer.lora_B["default"].bias * 1.5
    assert close(model(INPUT), plain.double() + (INPUT @ delta(layer).T + own).double())
    layer.merge()
    assert close(base.bias, bias + own) and not torch.equal(base.bias, bias)
    layer.unmerge()
    assert torch.equal(base.bias, bias)


def test_an_adapter_with_a_bias_for_a_layer_without_one_cannot_be_merged() -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        model, layer = adapt(linear("nf4", bias=False), lora_bias=True)
    before = state_bytes(model)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        layer.merge()
    assert_same(state_bytes(model), before)
    assert not layer.merged


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_broken_adapter_is_not_merged(format: str) -> None:
    model, layer = adapt(linear(format))
    model.add_adapter("broken", LoraConfig(r=2, target_modules=["layer"]))
    with torch.no_grad():
        layer.lora_A["broken"].weight.fill_(1)
        layer.lora_B["broken"].weight.fill_(float("nan"))
    layer.merge()
    before = state_bytes(model)
    with pytest.raises(ValueError, match="adapter broken seems to be broken"), pytest.warns(UserWarning):
        layer.merge(safe_merge=True, adapter_names=["broken"])
    with pytest.raises(ValueError, match="NaN or infinite"), pytest.warns(UserWarning):
        layer.merge(adapter_names=["broken"])
    assert_same(state_bytes(model), before)
    assert layer.merged_adapters == ["default"]


def test_what_was_merged_before_quantization_cannot_be_unmerged() -> None:
    torch.manual_seed(0)
    model, layer = adapt(Linear4bit(IN, OUT, quant_type="nf4"))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["layer"]))
    expected = layer.base_layer.weight.data + delta(layer)
    layer.merge()
    assert close(layer.base_layer.weight, expected)
    model.to("cpu")
    assert layer.base_layer.weight.bnb_quantized
    with pytest.raises(RuntimeError, match="merged before the base layer was quantized"):
        layer.unmerge()
    with pytest.raises(RuntimeError, match="merged before"), pytest.warns(UserWarning):
        layer.merge(adapter_names=["second"])


def test_adapters_that_a_layer_does_not_have_merge_nothing() -> None:
    model, layer = adapt(linear("nf4"))
    before = state_bytes(model)
    layer.merge(adapter_names=["elsewhere"])
    assert_same(state_bytes(model), before)
    assert not layer.merged
    layer.merge()
    merged = state_bytes(model)
    with pytest.warns(UserWarning):
        layer.merge(adapter_names=["elsewhere"])
    assert_same(state_bytes(model), merged)
    layer.unmerge()
    assert_same(state_bytes(model), before)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora(format: str, dropout: float) -> None:
    model, layer = adapt(linear(format), use_dora=True, lora_dropout=dropout)
    base = layer.base_layer
    before = state_bytes(model)
    weight = floats(base) + delta(layer)
    magnitude = layer.lora_magnitude_vector["default"].weight
    factor = (magnitude / weight.norm(dim=1)).unsqueeze(1)
    model.eval()
    out = model(INPUT)
    plain = base(INPUT) - base.bias
    assert close(out, factor.T * (plain + INPUT @ delta(layer).T) + base.bias)
    model.train()
    model(INPUT).square().sum().backward()
    assert magnitude.grad.abs().min() > 0
    layer.merge()
    assert torch.equal(held(base).view(-1), codes(base, factor * weight).view(-1))
    layer.unmerge()
    assert_same(state_bytes(model), before)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_initializations_that_need_the_float_weight_say_so(init: str) -> None:
    with pytest.raises(ValueError, match="initialize the adapter on the float model"):
        adapt(linear("nf4"), init_lora_weights=init)


def test_orthogonal_initialization() -> None:
    _, layer = adapt(linear("nf4"), init_lora_weights="orthogonal")
    assert layer.lora_A["default"].weight.dtype == torch.float32


def test_adapters_of_float_weights_that_are_quantized_in_each_forward_are_pefts_own_merge() -> None:
    torch.manual_seed(0)
    base = Linear8bitLt(IN, OUT)
    _model, layer = adapt(base)
    expected = base.weight.detach() + delta(layer)
    layer.merge()
    assert close(base.weight, expected)
    layer.unmerge()
    assert close(base.weight, expected - delta(layer))


def test_conv1d_options_do_not_reach_a_layer_that_was_one() -> None:
    """GPT-2's Conv1D has its weight transposed, and configurations for it say so; its quantized layer has not."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], fan_in_fan_out=True)
    _model, layer = adapt(linear("nf4"), config)
    expected = codes(layer.base_layer, floats(layer.base_layer) + delta(layer))
    layer.merge()
    assert torch.equal(held(layer.base_layer).view(-1), expected.view(-1))
    assert config.fan_in_fan_out


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_shared_weight_is_merged_for_the_adapted_layer_alone(format: str) -> None:
    base, other = linear(format, bias=False), linear(format, bias=False)
    other.weight = base.weight
    plain = other(INPUT)
    model, layer = adapt(base)
    before, out = state_bytes(model), model(INPUT)
    layer.merge()
    assert torch.equal(other(INPUT), plain) and not torch.equal(base(INPUT), plain)
    layer.unmerge()
    assert base.weight is other.weight
    assert_same(state_bytes(model), before)
    assert torch.equal(model(INPUT), out) and torch.equal(other(INPUT), plain)


def test_copies_of_merged_models_unmerge() -> None:
    model, layer = adapt(linear("nf4"))
    out = model(INPUT)
    layer.merge()
    merged, copy = model(INPUT), deepcopy(model)
    copy.base_model.model.layer.unmerge()
    assert torch.equal(copy(INPUT), out) and torch.equal(model(INPUT), merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_and_merging_in_fp32(dtype: torch.dtype) -> None:
    model, layer = adapt(linear("nf4", dtype=dtype))
    base = layer.base_layer
    assert base.weight.quant_state.dtype == dtype
    out = model(INPUT.to(dtype))
    assert out.dtype == dtype
    expected = codes(base, floats(base) + delta(layer)).view(-1)
    layer.merge()
    assert torch.equal(held(base).view(-1), expected)
    assert model(INPUT.to(dtype)).dtype == base.weight.quant_state.dtype == dtype


# ---- other layers and methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Embedding4bit, Embedding8bit])
def test_embeddings(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    base = kind(OUT, IN).to("cpu")
    ids = torch.arange(12).view(3, 4)
    plain = base(ids)
    model, layer = adapt(base)
    assert isinstance(layer, integration.LoraEmbedding)
    before = state_bytes(model)
    change = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T * 1.5
    assert close(model(ids), plain + change[ids])
    expected = codes(base, floats(base) + change).view(-1)
    layer.merge()
    assert torch.equal(held(base).view(-1), expected)
    layer.unmerge()
    assert_same(state_bytes(model), before)
    with pytest.raises(ValueError, match="use_dora"):
        adapt(kind(OUT, IN).to("cpu"), use_dora=True)
    with pytest.raises(ValueError, match=r"IA\)\^3 cannot adapt a Embedding"):
        adapt(kind(OUT, IN).to("cpu"), IA3Config(target_modules=["layer"], feedforward_modules=[]))


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3(format: str, feedforward: bool) -> None:
    base = linear(format)
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    model, layer = adapt(base, config)
    assert isinstance(layer, integration.IA3Linear)
    before, vector = state_bytes(model), layer.ia3_l["default"]
    expected = base(INPUT * vector[0]) if feedforward else base(INPUT) * vector[:, 0]
    assert close(model(INPUT), expected)
    merged = codes(base, floats(base) * vector).view(-1)
    layer.merge()
    assert torch.equal(held(base).view(-1), merged)
    layer.unmerge()
    assert_same(state_bytes(model), before)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_adalora(format: str) -> None:
    base = linear(format)
    model, layer = adapt(base, AdaLoraConfig(init_r=4, total_step=10, target_modules=["layer"]))
    assert isinstance(layer, integration.AdaLoraLinear)
    before = state_bytes(model)
    a, b, e = (getattr(layer, f"lora_{name}")["default"] for name in "ABE")
    change = b @ (a * e) * layer.scaling["default"] / (4 + 1e-5)
    assert close(model(INPUT), base(INPUT) + INPUT @ change.T)
    expected = codes(base, floats(base) + layer.get_delta_weight("default")).view(-1)
    layer.merge()
    assert torch.equal(held(base).view(-1), expected)
    layer.unmerge()
    assert_same(state_bytes(model), before)


# ---- registration ----------------------------------------------------------------------------------------------


def test_unregister_makes_peft_what_it_was() -> None:
    from peft import optimizers
    from peft.tuners.ia3 import IA3Model
    from peft.tuners.lora import LoraModel, dora
    from peft.tuners.tuners_utils import BaseTuner

    def functions() -> list[Callable]:
        return [
            *(LoraModel._create_new_module, IA3Model._create_new_module, BaseTuner._inject_parameters),
            *(dora.dequantize_module_weight, optimizers.create_loraplus_optimizer),
        ]

    registered = functions()
    integration.register()  # twice is once
    assert functions() == registered
    integration.unregister()
    assert all("bnbops" not in f.__code__.co_filename for f in functions())
    integration.unregister()
    integration.register()
    assert all("bnbops" in f.__code__.co_filename for f in functions())


def test_float_layers_and_custom_modules_are_pefts_affair() -> None:
    from peft.tuners import lora

    class Custom(lora.Linear):
        pass

    _, layer = adapt(nn.Linear(IN, OUT))
    assert type(layer) is lora.Linear
    config = LoraConfig(r=4, target_modules=["layer"])
    config._register_custom_module({Linear4bit: Custom})
    _, layer = adapt(linear("nf4"), config)
    assert type(layer) is Custom
