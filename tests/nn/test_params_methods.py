"""Every method of torch.Tensor that moves, copies, casts or views, on the parameters of quantized weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbops.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

pytestmark = pytest.mark.every_torch

SHAPE = (96, 128)


def _float(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def _4bit(**options: Any) -> Params4bit:
    return Params4bit(_float(), quant_type="nf4", **options)


MAKERS: dict[str, Callable[[], nn.Parameter]] = {
    "nf4": lambda: _4bit().to("cpu"),
    "nf4, single": lambda: _4bit(compress_statistics=False).to("cpu"),
    "nf4 in bfloat16": lambda: _4bit(quant_storage=torch.bfloat16).to("cpu"),
    "int8": lambda: Int8Params(_float(), requires_grad=False).to("cpu"),
}
FLOAT_MAKERS: dict[str, Callable[[], nn.Parameter]] = {
    "4 bits": _4bit,
    "8 bits": lambda: Int8Params(_float(), requires_grad=False),
}
quantized = pytest.mark.parametrize("kind", MAKERS)
not_yet = pytest.mark.parametrize("kind", FLOAT_MAKERS)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def _scales(weight: nn.Parameter) -> dict[str, Tensor]:
    if isinstance(weight, Int8Params):
        return {} if weight.SCB is None else {"SCB": weight.SCB}
    state = weight.quant_state
    if state is None:
        return {}
    return {"absmax": state.absmax} | ({"absmax2": state.state2.absmax, "offset": state.offset} if state.nested else {})


def _assert_same(a: nn.Parameter, b: nn.Parameter) -> None:
    assert isinstance(a, type(b)) and a.dtype == b.dtype and a.device == b.device
    assert torch.equal(_bytes(a), _bytes(b)) and _scales(a).keys() == _scales(b).keys()
    assert all(torch.equal(x, _scales(b)[name]) for name, x in _scales(a).items())


def _memory(weight: nn.Parameter) -> set[int]:
    return {weight.data_ptr(), *(x.data_ptr() for x in _scales(weight).values())}


# ---- codes: what moves and casts ---------------------------------------------------------------------------------

TYPE = "torch.HalfTensor"
SAME: dict[str, Callable[[nn.Parameter], Any]] = {
    "to device": lambda p: p.to("cpu"),
    "to device by name": lambda p: p.to(device="cpu"),
    "to dtype": lambda p: p.to(torch.float16),
    "to device, dtype": lambda p: p.to("cpu", torch.bfloat16, non_blocking=True),
    "to None, dtype": lambda p: p.to(None, torch.bfloat16),
    "to other": lambda p: p.to(torch.zeros(1, dtype=torch.float16)),
    "to memory_format": lambda p: p.to(memory_format=torch.contiguous_format),
    "to positional no copy": lambda p: p.to("cpu", torch.float16, False, False),
    "cpu": lambda p: p.cpu(),
    "cpu memory_format": lambda p: p.cpu(memory_format=torch.preserve_format),
    "half": lambda p: p.half(),
    "half memory_format": lambda p: p.half(memory_format=torch.preserve_format),
    "bfloat16": lambda p: p.bfloat16(),
    "float": lambda p: p.float(),
    "double": lambda p: p.double(),
    "type": lambda p: p.type(torch.float16),
    "type by name": lambda p: p.type(TYPE),
    "type by class": lambda p: p.type(torch.FloatTensor),
    "type_as": lambda p: p.type_as(torch.zeros(1, dtype=torch.float16)),
    "contiguous": lambda p: p.contiguous(),
    "share_memory_": lambda p: p.share_memory_(),
    "requires_grad_ off": lambda p: p.requires_grad_(False),
    "copy_": lambda p: p.copy_(p.data.clone()),
}


@pytest.mark.parametrize("way", SAME)
@quantized
def test_codes_stay_what_they_are(kind, way):
    """The same object, as torch's is where nothing changes: no cast touches codes."""
    weight = MAKERS[kind]()
    expected = copy.deepcopy(weight)
    assert SAME[way](weight) is weight
    _assert_same(weight, expected)


COPIES: dict[str, Callable[[nn.Parameter], Any]] = {
    "to copy": lambda p: p.to(copy=True),
    "to device, copy": lambda p: p.to("cpu", copy=True),
    "to device, dtype, copy by position": lambda p: p.to("cpu", torch.float16, False, True),
    "to dtype, copy by position": lambda p: p.to(torch.float16, False, True),
    "to other, copy by position": lambda p: p.to(torch.zeros(1), False, True),
    "to copy, memory_format": lambda p: p.to("cpu", copy=True, memory_format=torch.contiguous_format),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
@quantized
def test_copies_of_codes(kind, way):
    """With scales of their own."""
    weight = MAKERS[kind]()
    result = COPIES[way](weight)
    _assert_same(result, weight)
    assert not _memory(result) & _memory(weight) and not result.requires_grad


@quantized
def test_to_meta(kind):
    weight = MAKERS[kind]()
    for moved in (weight.to("meta"), weight.to("meta", torch.float16), weight.to("meta", copy=True)):
        assert isinstance(moved, type(weight)) and moved.is_meta and moved.dtype == weight.dtype
        assert all(x.is_meta for x in _scales(moved).values()) and _scales(moved).keys() == _scales(weight).keys()
    assert not weight.is_meta


@pytest.mark.parametrize("name", ["cuda", "xpu", "mtia", "hpu", "npu", "ipu"])
@pytest.mark.parametrize("kind", [*MAKERS, *FLOAT_MAKERS])
def test_devices_by_their_own_methods(kind, name, monkeypatch):
    """All end in `to`, which alone knows what moves along, with the arguments as they came."""
    weight, calls = (MAKERS | FLOAT_MAKERS)[kind](), []
    monkeypatch.setattr(type(weight), "to", lambda self, *args, **kwargs: calls.append((*args, kwargs)) or self)
    move = getattr(weight, name)
    assert move() is move(1) is move(f"{name}:1", True) is weight
    format = {"memory_format": torch.preserve_format}
    devices = ((name, False), (f"{name}:1", False), (f"{name}:1", True))
    assert calls == [(device, {"non_blocking": blocking} | format) for device, blocking in devices]


def test_a_device_that_is_not_there():
    for weight in (make() for make in (MAKERS | FLOAT_MAKERS).values()):
        before = copy.deepcopy(weight)
        for name in ("cuda", "xpu") if not torch.cuda.is_available() else ("xpu",):
            with pytest.raises((AssertionError, RuntimeError)):
                getattr(weight, name)()
        _assert_same(weight, before)


# ---- codes: what is a plain tensor of them, as torch has it for every parameter ------------------------------------

PLAIN: dict[str, Callable[[Any], Any]] = {
    "clone": lambda p: p.clone(),
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "view": lambda p: p.view(-1),
    "view dtype": lambda p: p.view(torch.uint8),
    "reshape": lambda p: p.reshape(1, -1),
    "flatten": lambda p: p.flatten(),
    "t": lambda p: p.t(),
    "T": lambda p: p.T,
    "transpose": lambda p: p.transpose(0, 1),
    "chunk": lambda p: p.chunk(2),
    "split": lambda p: p.split(16),
    "torch.chunk": lambda p: torch.chunk(p, 2),
    "torch.split": lambda p: torch.split(p, 16),
    "narrow": lambda p: p.narrow(0, 1, 2),
    "index": lambda p: p[3:5],
    "index by tensor": lambda p: p[torch.tensor([0, 3])],
    "int": lambda p: p.int() if not p.is_floating_point() else p.view(torch.uint8),
    "char": lambda p: p.char() if p.dtype == torch.uint8 else p.view(torch.uint8),
    "to_sparse": lambda p: p.unsqueeze(0),
    "expand": lambda p: p.expand(2, *p.shape),
    "type name": lambda p: p.type(),
    "new_zeros": lambda p: p.new_zeros(3),
    "zeros_like": lambda p: torch.zeros_like(p),
    "empty_like": lambda p: torch.empty_like(p).shape,
    "numpy": lambda p: torch.from_numpy(p.view(torch.uint8).numpy()),
    "tolist": lambda p: p.view(torch.uint8).tolist(),
}


@pytest.mark.parametrize("way", PLAIN)
@quantized
def test_codes_as_plain_tensors(kind, way):
    weight = MAKERS[kind]()
    found, expected = PLAIN[way](weight), PLAIN[way](nn.Parameter(weight.data.clone(), requires_grad=False))
    assert type(found) is type(expected)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert type(a) is type(b)
        assert torch.equal(_bytes(a), _bytes(b)) and a.shape == b.shape if isinstance(a, Tensor) else a == b
    for shares in ("detach", "data", "view", "t", "narrow"):
        assert PLAIN[shares](weight).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


# ---- codes: what is refused ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "numbers into codes": (
        lambda p: p.copy_(_float()[: p.shape[0], : p.shape[1]].double()),
        RuntimeError,
        "which copy_ would overwrite",
    ),
    "requires_grad_": (lambda p: p.requires_grad_(), RuntimeError, "cannot be trained"),
    "channels_last": (lambda p: p.to(memory_format=torch.channels_last), RuntimeError, "rank 4"),
    "cpu channels_last": (lambda p: p.cpu(memory_format=torch.channels_last), RuntimeError, "rank 4"),
    "a device that does not exist": (lambda p: p.to("cqu"), RuntimeError, "device"),
    "too many arguments": (lambda p: p.to("cpu", torch.float16, False, False, 1), TypeError, "to"),
    "unknown argument": (lambda p: p.to("cpu", dtpye=torch.float16), TypeError, "dtpye"),
    "unknown type": (lambda p: p.type("torch.NoTensor"), ValueError, "NoTensor"),
}


@pytest.mark.parametrize("way", REFUSED)
@quantized
def test_refusals_change_nothing(kind, way):
    call, error, message = REFUSED[way]
    weight = MAKERS[kind]()
    before = copy.deepcopy(weight)
    with pytest.raises(error, match=message):
        call(weight)
    _assert_same(weight, before)


@pytest.mark.parametrize("kind", [*MAKERS, *FLOAT_MAKERS])
def test_pinned_memory(kind):
    """As of a plain parameter: pinned, or the error that there is nothing to pin it for."""

    def pinned(weight: nn.Parameter) -> Any:
        try:
            found = weight.pin_memory()
        except Exception as error:
            return type(error), str(error)
        return type(found), found.is_pinned(), found.dtype

    weight = (MAKERS | FLOAT_MAKERS)[kind]()
    assert pinned(weight) == pinned(nn.Parameter(weight.data.clone(), requires_grad=False))


@quantized
def test_shared_memory(kind):
    """Of the scales, too."""
    weight = MAKERS[kind]()
    before = copy.deepcopy(weight)
    weight.share_memory_()
    assert weight.is_shared() and all(x.is_shared() for x in _scales(weight).values())
    _assert_same(weight, before)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: Linear4bit(SHAPE[1], SHAPE[0], quant_type="nf4"),
    "nf4 in bfloat16": lambda: Linear4bit(SHAPE[1], SHAPE[0], quant_type="nf4", quant_storage=torch.bfloat16),
    "int8": lambda: Linear8bitLt(SHAPE[1], SHAPE[0], has_fp16_weights=False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_type_spares_integers(name):
    """torch's casts all tensors, integers too: codes, and scales that are held as integers, are none."""
    layer, x = LAYERS[name]().to("cpu"), _float()[:3]
    expected = copy.deepcopy(layer).half()
    assert layer.type(torch.float16) is layer
    assert torch.equal(layer(x.half()), expected(x.half()))
    _assert_same(layer.weight, expected.weight)


# ---- before quantization -----------------------------------------------------------------------------------------


@not_yet
def test_a_move_quantizes_in_place(kind):
    for move in (lambda p: p.to("cpu"), lambda p: p.cpu(memory_format=torch.preserve_format), lambda p: p.to(p)):
        weight = FLOAT_MAKERS[kind]()
        expected = FLOAT_MAKERS[kind]().to("cpu")
        assert move(weight) is weight
        _assert_same(weight, expected)


@not_yet
def test_a_copy_is_quantized_and_the_weight_is_not(kind):
    weight = FLOAT_MAKERS[kind]()
    for move in (lambda p: p.to("cpu", copy=True), lambda p: p.to("cpu", torch.float16, True, True)):
        _assert_same(move(weight), FLOAT_MAKERS[kind]().to("cpu"))
        assert torch.equal(weight.data, _float()) and not _scales(weight)


def test_a_copy_is_not_the_modules_weight():
    layer = Linear4bit(*reversed(SHAPE), quant_type="nf4")
    weight = layer.weight
    assert weight.to("cpu", copy=True).bnb_quantized
    assert layer.weight is weight and not weight.bnb_quantized and layer.quant_state is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@not_yet
def test_casts_before_quantization(kind, dtype):
    """As torch casts any weight, but for the class, which stays."""
    weight = FLOAT_MAKERS[kind]()
    name = str(dtype).removeprefix("torch.").replace("float64", "double").replace("float16", "half")
    name = "bfloat16" if dtype == torch.bfloat16 else name
    for cast in (
        weight.to(dtype),
        weight.to(dtype=dtype, copy=True),
        weight.type(dtype),
        weight.type_as(torch.zeros(1, dtype=dtype)),
        getattr(weight, name)(),
    ):
        assert isinstance(cast, type(weight)) and cast.dtype == dtype and torch.equal(cast.data, _float(dtype))
        assert not _scales(cast)
    assert weight.to(torch.float32) is weight and weight.float() is weight
    copied = weight.to(copy=True)
    assert copied is not weight and copied.data_ptr() != weight.data_ptr() and torch.equal(copied.data, weight.data)


@not_yet
def test_methods_of_floats(kind):
    """Gradients flow through casts; copies and views are torch's."""
    weight = FLOAT_MAKERS[kind]().requires_grad_()
    plain = nn.Parameter(_float())
    for way in ("clone", "view", "reshape", "t", "index", "expand", "zeros_like", "new_zeros"):
        found, expected = PLAIN[way](weight), PLAIN[way](plain)
        assert type(found) is type(expected) is Tensor and torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad
    weight.to(torch.float64).square().sum().backward()
    assert torch.allclose(weight.grad, 2 * weight.detach())
    assert weight.detach().data_ptr() == weight.data_ptr()


def test_trained_weights_of_8_bit_layers_are_floats():
    weight = Int8Params(_float(), requires_grad=True, has_fp16_weights=True)
    assert weight.to("cpu") is weight and weight.cpu() is weight and weight.dtype == torch.float32
    assert weight.half().requires_grad and not weight.half().is_leaf


PARTS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "chunk": lambda p: torch.chunk(p, 3),
    "chunk of columns": lambda p: torch.chunk(p, 2, dim=1),
    "chunk by names": lambda p: torch.chunk(input=p, chunks=3),
    "split": lambda p: torch.split(p, 40),
    "split by sizes": lambda p: torch.split(p, [32, 64]),
    "split by names": lambda p: torch.split(tensor=p, split_size_or_sections=[64, 64], dim=1),
}


@pytest.mark.parametrize("way", PARTS)
def test_parts_of_a_weight_that_is_not_quantized_yet(way):
    """They are such weights, with the same settings, as in bitsandbytes; quantized, they are tensors of codes."""
    whole = Params4bit(_float(), blocksize=32, quant_type="nf4", compress_statistics=False)
    for part, expected in zip(PARTS[way](whole), PARTS[way](_float()), strict=True):
        assert isinstance(part, Params4bit) and not part.bnb_quantized and torch.equal(part.data, expected)
        settings = (part.blocksize, part.quant_type, part.compress_statistics, part.module, part.requires_grad)
        assert settings == (32, "nf4", False, None, False)
        by_itself = Params4bit(expected.clone(), blocksize=32, quant_type="nf4", compress_statistics=False)
        _assert_same(part.to("cpu"), by_itself.to("cpu"))
    whole = whole.to("cpu")
    assert type(whole) is Params4bit and {type(part) for part in PARTS["chunk"](whole)} == {Tensor}


def test_the_class_by_its_name():
    """Libraries go by it. One that is not quantized yet can do more, but is pickled, and copied, as any."""
    for weight in (_4bit(), copy.copy(_4bit()), copy.deepcopy(_4bit()), type(_4bit())(_float())):
        assert isinstance(weight, Params4bit) and type(weight).__name__ == "Params4bit"
        assert type(weight.to("cpu")) is Params4bit

    class Mine(Params4bit):
        pass

    mine = Mine(_float(), quant_type="nf4")
    assert isinstance(torch.chunk(mine, 2)[0], Mine) and type(mine.to("cpu")) is Mine


@pytest.mark.parametrize("make", [Linear4bit, lambda *size: Linear8bitLt(*size, has_fp16_weights=False)], ids=[4, 8])
def test_gradients_of_floats_go_along(make):
    """As in torch; and none is left of a weight that has become codes."""
    layer = make(128, 96)
    weight = layer.weight.requires_grad_(True)
    weight.grad = torch.ones(96, 128)
    layer.to(torch.bfloat16)
    assert layer.weight is weight and weight.grad.dtype == weight.dtype == torch.bfloat16
    layer.to("cpu")
    assert layer.weight is weight and layer.is_quantized and weight.grad is None
