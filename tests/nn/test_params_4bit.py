"""bnbops.nn.Params4bit: quantization, conversions, copies, and what PEFT, Transformers and accelerate do with it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import bnbops
import bnbops.functional as F
from bnbops.nn import Linear4bit, Params4bit
from cases.layers_4bit import FLOATS, IN, OUT, STORAGES, differing, inputs, linear

storages = pytest.mark.parametrize("storage", STORAGES, ids=str)


def weight(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (OUT, IN)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- quantization ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to("cpu", torch.float16)])
@pytest.mark.parametrize("nested", [False, True])
def test_a_device_quantizes_in_place(move, nested):
    """The codes and scales of `quantize_4bit`; a dtype is ignored, as in bitsandbytes."""
    data = weight(torch.bfloat16)
    param = Params4bit(data, True, blocksize=128, compress_statistics=nested, quant_type="nf4")
    assert param.requires_grad and not param.bnb_quantized and param.quant_state is None
    assert move(param) is param
    packed, state = F.quantize_4bit(data, blocksize=128, compress_statistics=nested, quant_type="nf4")
    assert torch.equal(param.data, packed) and param.quant_state == state
    assert param.bnb_quantized and not param.requires_grad and isinstance(param, nn.Parameter)
    again = param.to("cpu")
    assert again is param and torch.equal(again.data, packed)


def test_what_does_not_quantize():
    param = Params4bit(weight())
    assert param.to("meta").is_meta and not param.to("meta").bnb_quantized
    low = param.to(torch.bfloat16)
    assert isinstance(low, Params4bit) and torch.equal(low.data, weight(torch.bfloat16)) and not low.bnb_quantized
    assert param.to(torch.float32) is param and param.half().dtype == torch.float16
    with pytest.raises(NotImplementedError, match="meta"):
        Params4bit(weight().to("meta")).to("cpu")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (weight(torch.float64), {}, "float32, bfloat16 or float16"),
        (weight(), {"blocksize": 48}, "blocksize"),
        (weight(), {"quant_type": "int5"}, "quant_type"),
        (weight(shape=(3, 3)), {"quant_storage": torch.bfloat16, "quant_type": "nf4"}, "5 bytes"),
    ],
    ids=["float64", "blocksize", "quant_type", "odd number of bytes"],
)
def test_a_failed_quantization_changes_nothing(data, options, message):
    param = Params4bit(data, **options)
    before = dict(vars(param))
    with pytest.raises((ValueError, RuntimeError), match=message):
        param.to("cpu")
    assert torch.equal(param.data, data) and vars(param) == before and not param.bnb_quantized


def test_non_contiguous_weights():
    data = weight().t()
    packed, _ = F.quantize_4bit(data.contiguous(), quant_type="nf4")
    assert torch.equal(Params4bit(data, quant_type="nf4").to("cpu").data, packed)


# ---- conversions and copies ------------------------------------------------------------------------------------

CONVERSIONS = {
    "half": lambda p: p.half(),
    "bfloat16": lambda p: p.bfloat16(),
    "float": lambda p: p.float(),
    "double": lambda p: p.double(),
    "to dtype": lambda p: p.to(torch.float16),
    "to device and dtype": lambda p: p.to("cpu", torch.bfloat16),
    "to tensor": lambda p: p.to(torch.zeros(1, dtype=torch.float16)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "in a foreign module": lambda p: nn.ParameterList([p]).half()[0],
}


@pytest.mark.parametrize("way", CONVERSIONS)
@storages
def test_packed_codes_survive(way, storage):
    """Whatever their dtype: a cast of codes would be garbage."""
    param = Params4bit(weight(), quant_type="nf4", quant_storage=storage).to("cpu")
    expected, attributes = F.dequantize_4bit(param.data, param.quant_state), dict(vars(param))
    result = CONVERSIONS[way](param)
    assert isinstance(result, Params4bit) and result.dtype == storage and result.bnb_quantized
    assert torch.equal(F.dequantize_4bit(result.data, result.quant_state), expected)
    assert vars(result) | {"quant_state": None} == attributes | {"quant_state": None}
    assert torch.equal(F.dequantize_4bit(param.data, param.quant_state), expected)


def test_copies_own_their_memory():
    param = Params4bit(weight(), quant_type="nf4").to("cpu")
    deep, shallow = copy.deepcopy(param), copy.copy(param)
    assert shallow.data_ptr() == param.data_ptr() != deep.data_ptr()
    assert deep.quant_state.absmax.data_ptr() != param.quant_state.absmax.data_ptr()
    deep.data.zero_()
    assert param.data.any()


def test_moving_leaves_the_original_alone():
    param = Params4bit(weight(), quant_type="nf4").to("cpu")
    meta = param.to("meta")
    assert meta.is_meta and meta.quant_state.absmax.is_meta and meta.quant_state.state2.absmax.is_meta
    assert not param.is_meta and param.quant_state.absmax.device.type == "cpu"


def test_neither_module_nor_weight_keeps_the_other_alive():
    layer = linear()
    weight, module = weakref.ref(layer.weight), weakref.ref(layer)
    enabled = gc.isenabled()
    gc.disable()
    try:
        del layer
        assert weight() is None and module() is None  # without the collector: there is no cycle
    finally:
        if enabled:
            gc.enable()


# ---- the state's attributes ------------------------------------------------------------------------------------


def test_attributes_of_the_state():
    param = Params4bit(weight(), quant_type="nf4").to("cpu")
    state = param.quant_state
    found = (param.absmax, param.code, param.quant_map, param.offset, param.state2, param.nested_offset)
    assert found == (state.absmax, state.code, state.code, state.offset, state.state2, state.offset)
    nested = (param.nested_absmax, param.nested_quant_map, param.nested_blocksize, param.nested_dtype)
    assert nested == (state.state2.absmax, state.state2.code, 256, torch.float32)


def test_attributes_that_are_not_there():
    fresh = Params4bit(weight())
    for name in ("absmax", "code", "quant_map", "offset", "state2", "nested_absmax", "nested_offset"):
        assert not hasattr(fresh, name)
    single = Params4bit(weight(), compress_statistics=False).to("cpu")
    assert hasattr(single, "absmax") and single.state2 is None and not hasattr(single, "nested_absmax")


# ---- __dict__ as arguments -------------------------------------------------------------------------------------


def test_dict_of_a_float_parameter():
    """Transformers: the settings of the meta parameter for the loaded one."""
    layer = linear(quantized=False, device="meta", blocksize=128, compress_statistics=False)
    param = Params4bit(weight(), requires_grad=False, **vars(layer.weight)).to("cpu")
    assert (param.blocksize, param.compress_statistics, param.quant_type) == (128, False, "nf4")
    packed, state = F.quantize_4bit(weight(), blocksize=128, quant_type="nf4")
    assert torch.equal(param.data.view(-1, 1), packed) and param.quant_state == state


def test_dict_of_a_quantized_parameter_with_codes():
    param = Params4bit(weight(), quant_type="nf4").to("cpu")
    clone = Params4bit(param.data.clone(), **vars(param))
    assert clone.bnb_quantized and clone.quant_state == param.quant_state and clone.to("cpu") is clone


@pytest.mark.parametrize("reset", [False, True], ids=["as it is", "bnb_quantized reset"])
@storages
def test_dict_of_a_quantized_parameter_with_floats(storage, reset):
    """PEFT's merge; some of its adapters do not say that the data are floats again."""
    layer = linear(quant_storage=storage)
    x, delta = inputs(), 0.01 * weight()
    merged = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state) + delta
    kwargs = vars(layer.weight)
    if reset:
        kwargs["bnb_quantized"] = False
        kwargs["requires_grad"] = False
        kwargs.pop("data", None)
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
        layer.weight = Params4bit(merged, **kwargs).to("cpu")
    else:
        layer.weight = Params4bit(merged, requires_grad=False, **kwargs).to("cpu")
    expected = linear(quantized=False, quant_storage=storage)
    expected.weight.data.copy_(merged)
    assert differing(layer.state_dict(), expected.to("cpu").state_dict()) == []
    assert torch.equal(layer(x), expected(x)) and layer.weight.dtype == storage


def test_making_a_parameter_leaves_the_layer_alone():
    """One that is not assigned, from the settings of a quantized layer's."""
    layer = linear()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    Params4bit(torch.zeros(OUT, IN), **vars(layer.weight)).to("cpu")
    assert differing(layer.state_dict(), before) == []


def test_written_to_the_parameters_directly():
    """accelerate does, after it has quantized with the old parameter's settings."""
    layer = linear(quantized=False, device="meta")
    layer.bias = nn.Parameter(torch.zeros(OUT))
    new = Params4bit(weight(), requires_grad=False, **vars(layer.weight)).to("cpu")
    layer._parameters["weight"] = new
    expected = linear(quantized=False)
    expected.weight.data, expected.bias.data = weight(), torch.zeros(OUT)
    assert torch.equal(layer(inputs()), expected.to("cpu")(inputs()))
    assert differing(layer.state_dict(), expected.state_dict()) == []


@pytest.mark.parametrize("quantized", (False, True))
def test_marks_of_a_plain_parameter_are_kept(quantized):
    """Transformers marks the tensors that it has loaded, and draws the others anew."""
    layer = linear(quantized=quantized)
    data = layer.weight.data.clone() if quantized else weight()
    for value in (data, weight()):
        plain = nn.Parameter(value, requires_grad=False)
        plain.loaded = True
        layer.weight = plain
        assert isinstance(layer.weight, Params4bit) and layer.weight.loaded and torch.equal(layer.weight, value)


def test_offloading():
    """accelerate: every parameter to the meta device, and each back for a call."""
    layer = linear()
    expected = layer(inputs())
    held = {name: param.detach().clone() for name, param in layer.named_parameters()}
    for device in ("meta", "cpu"):
        for name, param in list(layer.named_parameters()):
            data = param.to("meta") if device == "meta" else held[name]
            kwargs = vars(param) if isinstance(param, Params4bit) else {}
            layer._parameters[name] = type(param)(data, requires_grad=param.requires_grad, **kwargs).to(device)
    assert torch.equal(layer(inputs()), expected) and layer.weight.bnb_quantized


@pytest.mark.parametrize("size", [0, 10, IN * OUT])
def test_codes_of_another_size(size):
    param = Params4bit(weight(), quant_type="nf4").to("cpu")
    with pytest.raises(ValueError, match=f"{size} bytes.*{IN * OUT // 2} bytes"):
        Params4bit(torch.zeros(size, dtype=torch.uint8), **vars(param))


# ---- from_prequantized -----------------------------------------------------------------------------------------


@pytest.fixture
def stats() -> dict[str, Tensor]:
    """A state dict's entries, without the weight."""
    entries = linear().state_dict()
    return {key: tensor for key, tensor in entries.items() if key.startswith("weight.")}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_from_prequantized(storage):
    """Transformers: the entries with their prefix; the module gets the weight."""
    source, layer = linear(quant_storage=storage), linear(quantized=False, device="meta", quant_type="fp4")
    entries = source.state_dict()
    data, given = entries.pop("weight"), {k: v for k, v in entries.items() if k != "bias"}
    before = dict(given)
    param = Params4bit.from_prequantized(data, given, device="cpu", module=layer)
    assert given.keys() == before.keys() and param.quant_state == source.quant_state
    assert (param.blocksize, param.compress_statistics, param.quant_type) == (64, True, "nf4")
    assert param.quant_storage == storage and param.bnb_quantized and not param.requires_grad
    layer.weight, layer.bias = param, source.bias
    assert torch.equal(layer(inputs()), source(inputs()))


def test_from_prequantized_does_not_touch_a_quantized_module(stats):
    layer = linear(seed=1)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    Params4bit.from_prequantized(linear().state_dict()["weight"], stats, module=layer)
    assert differing(layer.state_dict(), before) == []


DAMAGES = {
    "no description": (lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"), "quant_state"),
    "no scales": (lambda s: s.pop("weight.absmax"), "absmax"),
    "too few scales": (lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}), "absmax"),
    "scales of another dtype": (lambda s: s.update({"weight.absmax": s["weight.absmax"].float()}), "uint8"),
    "codes without their scales": (
        lambda s: [s.pop("weight.nested_absmax"), s.pop("weight.nested_quant_map")],
        "nested",
    ),
    "another type's codebook": (lambda s: s.update({"weight.quant_map": F.get_4bit_type("fp4", "cpu")}), "quant_map"),
    "too short a codebook": (
        lambda s: s.update({"weight.nested_quant_map": s["weight.nested_quant_map"][:16]}),
        "nested_code",
    ),
    "unknown entry": (lambda s: s.update({"weight.bias": torch.zeros(1)}), "bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_prequantized_refuses(stats, damage):
    change, message = DAMAGES[damage]
    change(stats)
    with pytest.raises((ValueError, KeyError), match=message):
        Params4bit.from_prequantized(linear().state_dict()["weight"], stats)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_shaped_codes_dequantize(dtype):
    """A module holds its codes as [out, in / 2]; functions take them so, a single row, too."""
    for out in (1, 2, OUT):
        layer = linear(size=(IN, out), dtype=dtype)
        flat = F.dequantize_4bit(layer.state_dict()["weight"], layer.quant_state)
        found = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert found.shape == (out, IN) and found.dtype == dtype and torch.equal(found, flat)


def test_public_name():
    assert bnbops.nn.Params4bit is Params4bit and Params4bit.__name__ == "Params4bit"
    assert Linear4bit.__name__ == "Linear4bit"
