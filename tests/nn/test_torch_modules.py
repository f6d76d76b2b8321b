"""Quantized layers in torch's own modules, which read the weights of the layers that they hold, and fuse them."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_linear_bn_eval

from bnbops.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, quantize_
from bnbops.nn.parametrize import replace_parameter_4bit

pytestmark = pytest.mark.every_torch

DIM, HIDDEN = 64, 128
MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
LAYERS: dict[str, Callable[..., nn.Linear]] = {
    "nf4": lambda *sizes: LinearNF4(*sizes),
    "fp4, bytes in bfloat16": lambda *sizes: LinearFP4(*sizes, quant_storage=torch.bfloat16),
    "int8": lambda *sizes: Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0),
}
quant_of = pytest.mark.parametrize("quant", LAYERS)


def quantized(linear: nn.Linear, quant: str) -> nn.Linear:
    layer = LAYERS[quant](linear.in_features, linear.out_features)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def floats(model: nn.Module) -> nn.Module:
    """The naive reference: plain layers with the values that the codes stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            plain = nn.Linear(module.in_features, module.out_features)
            plain.load_state_dict({"weight": module.dequantized(torch.float32), "bias": module.bias})
            model.set_submodule(name, plain.train(module.training))
    return model


def assert_near(found: Tensor, expected: Tensor, quant: str) -> None:
    """int8 layers round the activations, too."""
    assert (found - expected).norm() <= (0.02 if quant == "int8" else 1e-5) * expected.norm()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(1))


def _by_attribute(layer: nn.Module, name: str, new: nn.Module) -> None:
    setattr(layer, name, new)


def _by_set_submodule(layer: nn.Module, name: str, new: nn.Module) -> None:
    layer.set_submodule(name, new)


def _by_dict(layer: nn.Module, name: str, new: nn.Module) -> None:
    layer._modules[name] = new


def encoder_layer(quant: str, put: Callable = _by_attribute, **options) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, dropout=0.0, batch_first=True, **options)
    for name in ("linear1", "linear2"):
        put(layer, name, quantized(getattr(layer, name), quant).train(layer.training))
    return layer


@pytest.fixture
def fused_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the fused kernels that ran."""
    calls: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        kernel = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, name=name, kernel=kernel, **k: calls.append(name) or kernel(*a, **k)
        )
    yield calls


# ---- encoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("put", [_by_attribute, _by_set_submodule, _by_dict])
@quant_of
def test_an_encoder_layer(quant, put, context, masked, x) -> None:
    """In evaluation without gradients a plain one is a fused kernel."""
    layer = encoder_layer(quant, put).eval()
    mask = MASK if masked else None
    with context():
        assert_near(layer(x, src_key_padding_mask=mask), floats(layer)(x, src_key_padding_mask=mask), quant)


@quant_of
def test_a_float_layer_stays_fused(quant, x, fused_kernels) -> None:
    """What the reference of these tests is, and what a quantized layer is not."""
    layer = encoder_layer(quant).eval()
    with torch.no_grad():
        floats(layer)(x)
        assert fused_kernels == ["_transformer_encoder_layer_fwd"]
        layer(x)
    assert "_transformer_encoder_layer_fwd" not in fused_kernels[1:]


@pytest.mark.parametrize("options", [{"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
@quant_of
def test_kinds_of_encoder_layers(quant, options, x) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True, **options).eval()
    expected = copy.deepcopy(layer)
    for name in ("linear1", "linear2"):
        plain = getattr(layer, name)
        new = LAYERS[quant](plain.in_features, plain.out_features, plain.bias is not None)
        new.load_state_dict(plain.state_dict())
        setattr(layer, name, new.to("cpu"))
        getattr(expected, name).weight.data = getattr(layer, name).dequantized(torch.float32)
    with torch.no_grad():
        assert_near(layer(x), expected(x), quant)


@quant_of
def test_training(quant, x) -> None:
    layer = encoder_layer(quant)
    results = []
    for model in (layer, floats(layer)):
        inputs = x.clone().requires_grad_()
        (model(inputs, src_key_padding_mask=MASK) * x.flip(0)).sum().backward()
        results.append([inputs.grad, model.self_attn.in_proj_weight.grad, model.linear1.bias.grad])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= (0.05 if quant == "int8" else 1e-4) * expected.norm()


@quant_of
def test_autocast(quant, x) -> None:
    layer = encoder_layer(quant).eval()
    reference = floats(layer)
    reference.activation_relu_or_gelu = 0  # the fused kernel does not know of a CPU's autocast
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), reference(x)
    assert found.dtype == expected.dtype
    assert (found - expected).float().norm() <= 0.03 * expected.float().norm()


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
@quant_of
def test_an_encoder(quant, which, x) -> None:
    """It looks at its first layer alone when it decides to make nested tensors of a padded batch."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True), 2).eval()
    for index in which:
        layer = model.layers[index]
        layer.linear1, layer.linear2 = quantized(layer.linear1, quant), quantized(layer.linear2, quant)
    with torch.no_grad():
        found, expected = (each(x, src_key_padding_mask=MASK)[~MASK] for each in (model, floats(model)))
    assert_near(found, expected, quant)


@quant_of
def test_a_nested_input(quant, x) -> None:
    layer = encoder_layer(quant).eval()
    nested = torch.nested.as_nested_tensor([x[0], x[1, :3]])
    with torch.no_grad():
        found, expected = layer(nested), floats(layer)(nested)
    for part, other in zip(found.unbind(), expected.unbind(), strict=True):
        assert_near(part, other, quant)


@quant_of
def test_compiles(quant, x) -> None:
    torch.compiler.reset()
    layer = encoder_layer(quant).eval()
    with torch.no_grad():
        expected = layer(x, src_key_padding_mask=MASK)
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, src_key_padding_mask=MASK)
    assert torch.equal(found, expected)


def test_a_decoder_layer(x) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(DIM, 2, HIDDEN, batch_first=True).eval()
    for name in ("linear1", "linear2", "self_attn.out_proj", "multihead_attn.out_proj"):
        layer.set_submodule(name, quantized(layer.get_submodule(name), "nf4"))
    with torch.no_grad():
        assert_near(layer(x, x.flip(1)), floats(layer)(x, x.flip(1)), "nf4")


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_sharded_encoder(quant, x) -> None:
    """FSDP puts plain parameters in the place of ours: quantize_ has told the layers before."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True), 2).eval()
    with pytest.warns(UserWarning, match="out_proj"):
        quantize_(model, quant)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=MASK)[~MASK]
        init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            assert_near(model(x, src_key_padding_mask=MASK)[~MASK], expected, quant)
        finally:
            destroy_process_group()


# ---- attention -------------------------------------------------------------------------------------------------


def attention(quant: str) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, 2, batch_first=True)
    nn.init.normal_(module.out_proj.bias)
    module.out_proj = quantized(module.out_proj, quant)
    return module


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@quant_of
def test_the_output_projection_of_attention(quant, training, need_weights, x) -> None:
    """Attention hands its weight and bias to a function, and never calls it: so int8 rounds no activations here."""
    module = attention(quant).train(training)
    results = []
    for each in (module, floats(module)):
        with torch.set_grad_enabled(training):
            inputs = x.clone().requires_grad_(training)
            out, weights = each(inputs, inputs, inputs, key_padding_mask=MASK, need_weights=need_weights)
        results.append([out.detach(), *([weights.detach()] if need_weights else [])])
        if training:
            out.square().sum().backward()
            results[-1] += [inputs.grad, each.in_proj_weight.grad, each.out_proj.bias.grad]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@quant_of
def test_attention_in_half_precision_and_compiled(quant, x) -> None:
    module = attention(quant).eval().to(torch.bfloat16)
    reference = floats(module).to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    torch.compiler.reset()
    with torch.no_grad():
        found, expected = module(x, x, x)[0], reference(x, x, x)[0]
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, x, x)[0], found)
    assert (found - expected).float().norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("training", [False, True])
def test_parameters_of_attention_in_4_bits(training, x) -> None:
    """replace_parameter_4bit dequantizes where a module reads, fused or not."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, 2, batch_first=True).train(training)
    expected = copy.deepcopy(module)
    replace_parameter_4bit(module, "in_proj_weight")
    replace_parameter_4bit(module.out_proj, "weight")
    expected.in_proj_weight.data, expected.out_proj.weight.data = module.in_proj_weight, module.out_proj.weight
    with torch.no_grad():
        torch.testing.assert_close(module(x, x, x)[0], expected(x, x, x)[0])


# ---- functions -------------------------------------------------------------------------------------------------


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: LinearNF4(DIM, 32),
    "bytes in bfloat16": lambda: LinearNF4(DIM, 32, quant_storage=torch.bfloat16),
    "odd": lambda: LinearNF4(DIM - 1, 31, compress_statistics=False),
    "int8": lambda: Linear8bitLt(DIM, 32, has_fp16_weights=False),
    "embedding nf4": lambda: Embedding4bit(32, DIM, quant_type="nf4"),
    "embedding int8": lambda: Embedding8bit(32, DIM),
}
weight_of = pytest.mark.parametrize("name", WEIGHTS)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return WEIGHTS[name]().to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@weight_of
def test_functions_that_compute_with_a_weight(name, dtype) -> None:
    """As heads do that are tied to an embedding: F.linear(x, embedding.weight)."""
    module = made(name)
    values = module.dequantized(torch.float32 if dtype == torch.float64 else dtype).to(dtype)
    x = torch.randn(3, values.shape[1], dtype=dtype).requires_grad_()
    out = F.linear(x, module.weight)
    assert torch.equal(out, F.linear(x, values))
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, F.linear(x, values))))
    rows = F.embedding(torch.tensor([[3, 1]]), module.weight)
    assert torch.equal(rows, module.dequantized()[torch.tensor([[3, 1]])])


@weight_of
def test_codes_are_what_the_rest_sees(name) -> None:
    module = made(name)
    weight = module.weight
    for seen in (weight.data, weight.detach(), weight.view(weight.shape), weight.clone()):
        assert type(seen) is Tensor
        assert seen.dtype == weight.dtype and torch.equal(bytes_of(seen), bytes_of(weight))
    assert torch.cat([weight, weight]).dtype == weight.dtype


def test_int8_codes_times_scales_are_values() -> None:
    """The formula that code for bitsandbytes has in many places."""
    module = made("int8")
    values = module.weight * module.SCB.view(-1, 1) / 127
    torch.testing.assert_close(values, module.dequantized())


def test_packed_codes_times_scales_are_no_values() -> None:
    """Not even where bytes of the dtype of int8 codes hold them."""
    module = LinearNF4(DIM, 32, quant_storage=torch.int8).to("cpu")
    with pytest.raises(RuntimeError, match="holds codes, which mul would take for values"):
        module.weight * torch.ones(32, 1)


def _fused(module: nn.Module) -> None:
    fuse_linear_bn_eval(module.eval(), nn.BatchNorm1d(module.weight.shape[0]).eval())


NONSENSE: dict[str, Callable[[nn.Module], object]] = {
    "init.zeros_": lambda module: nn.init.zeros_(module.weight),
    "init.normal_": lambda module: nn.init.normal_(module.weight),
    "init.constant_": lambda module: nn.init.constant_(module.weight, 1.0),
    "init.kaiming_uniform_": lambda module: nn.init.kaiming_uniform_(module.weight),
    "init.xavier_uniform_": lambda module: nn.init.xavier_uniform_(module.weight),
    "init.eye_": lambda module: nn.init.eye_(module.weight),
    "zero_": lambda module: module.weight.zero_(),
    "mul_": lambda module: module.weight.mul_(2),
    "*=": lambda module: module.weight.__imul__(2),
    "copy_": lambda module: module.weight.copy_(torch.randn(module.weight.shape, dtype=torch.float64)),
    "an index": lambda module: module.weight.__setitem__(0, 0.0),
    "data": lambda module: setattr(module.weight, "data", torch.randn(32, DIM)),
    "a vector": lambda module: nn.utils.vector_to_parameters(torch.zeros(9999), [module.weight]),
    "plus a tensor": lambda module: module.weight + torch.ones(1),
    "a tensor plus": lambda module: torch.ones(1) + module.weight,
    "minus": lambda module: torch.sub(module.weight, 1),
    "times integers": lambda module: module.weight * torch.ones(1, dtype=torch.int8),
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight_norm": lambda module: parametrizations.weight_norm(module),
    "a parametrization": lambda module: nn.utils.parametrize.register_parametrization(module, "weight", _Plus()),
    "requires_grad_": lambda module: module.requires_grad_(True),
    "requires_grad": lambda module: setattr(module.weight, "requires_grad", True),
}


class _Plus(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(-1).view(torch.uint8)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: bytes_of(tensor) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("what", NONSENSE)
@weight_of
def test_nonsense_is_refused(name, what) -> None:
    """Each of these would be a silent change, or misreading, of the weight with some storage, if torch had its way."""
    module = made(name)
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=r"this quantized weight \((Params4bit|Int8Params), \w+ \[\d+, \d+\]\) "):
        NONSENSE[what](module)
    after = snapshot(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not module.weight.requires_grad


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_batch_norm_cannot_be_folded_in(name) -> None:
    with pytest.raises(RuntimeError, match="holds codes, which mul would take for values"):
        _fused(made(name))


@weight_of
def test_float_weights_are_any_tensors(name) -> None:
    """Before quantization nothing is refused."""
    module = WEIGHTS[name]()
    nn.init.ones_(module.weight)
    with torch.no_grad():
        module.weight *= 2
        assert torch.equal(module.weight + 1, torch.full(module.weight.shape, 3.0))
    module.requires_grad_(True)
    module.to("cpu")
    assert (module.dequantized(torch.float32) - 2).abs().max() < 0.01


def test_torch_ao_leaves_quantized_layers(x) -> None:
    model = nn.Sequential(made("nf4"), nn.Linear(32, 8))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(dynamic[0]) is LinearNF4 and type(dynamic[1]) is not nn.Linear
    assert torch.equal(dynamic[0](x), model[0](x))
