"""bnbops.nn.Linear4bit: casts, copies, state dicts and files, and bitsandbytes' golden layers."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import bnbops.functional as F
from bnbops.nn import Embedding4bit, Linear4bit, Params4bit
from bnbops.optim import AdamW8bit
from cases.layers_4bit import (
    IN,
    OUT,
    STORAGES,
    copies,
    differing,
    embedding,
    inputs,
    linear,
    plain_tensors,
    raw,
)
from reference.quantize_4bit import assert_product

GOLDEN_LAYERS = sorted(path.name for path in Path(__file__).parents[1].glob("golden/w4_[nf]*.safetensors"))
golden_layers = pytest.mark.parametrize("name", GOLDEN_LAYERS)
nestings = pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
assigns = pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])


# ---- golden layers of bitsandbytes -----------------------------------------------------------------------------


def state_dict_of(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "state_dict."
    return {key.removeprefix(prefix): tensor for key, tensor in entries.items() if key.startswith(prefix)}


def fresh(name: str, device: str = "cpu") -> Linear4bit:
    """An unquantized layer as the golden file's name has it."""
    _, quant_type, nesting, size, dtype = name.removesuffix(".safetensors").split("_")
    out_features, in_features = map(int, size.split("x"))
    options = {"quant_type": quant_type, "compress_statistics": nesting == "dq", "dtype": getattr(torch, dtype)}
    return Linear4bit(in_features, out_features, **options, device=device)


def test_golden_layers_are_there():
    kinds = {tuple(name.split("_")[1:4]) for name in GOLDEN_LAYERS}
    assert kinds >= {(t, n, s) for t in ("nf4", "fp4") for n in ("sq", "dq") for s in ("100x64", "33x65")}


def description(state_dict: dict[str, Tensor]) -> dict[str, object]:
    key = next(key for key in state_dict if "bitsandbytes__" in key)
    return json.loads(bytes(state_dict[key].tolist()))


def assert_same_scales(actual: dict[str, Tensor], expected: dict[str, Tensor], scales: Tensor) -> None:
    """Doubly quantized scales, as equal as they can be.

    The mean that is taken off them is a sum whose order depends on the machine: it may differ by an ulp, and then so
    may what is left of it. bitsandbytes' encoder rounds x to 65536 points before it takes the nearest entry of the
    codebook (tests/golden/README.md): codes may differ by one where x is as close to the middle of two entries.
    """
    found, wanted = description(actual), description(expected)
    offset, expected_offset = (torch.tensor(d.pop("nested_offset"), dtype=torch.float32) for d in (found, wanted))
    ulp = (torch.nextafter(expected_offset, torch.tensor(torch.inf)) - expected_offset).item()
    assert found == wanted and abs(offset - expected_offset) <= ulp
    if offset == expected_offset:
        assert differing(actual, expected) in ([], ["weight.absmax"])  # the description's bytes, too
    nested_absmax = expected["weight.nested_absmax"]
    assert torch.allclose(actual["weight.nested_absmax"], nested_absmax, rtol=0, atol=2 * ulp)
    x = (scales - expected_offset) / nested_absmax.repeat_interleave(256)[: scales.numel()]
    code, codes, expected_codes = (
        expected["weight.nested_quant_map"],
        actual["weight.absmax"],
        expected["weight.absmax"],
    )
    differ = (codes != expected_codes).nonzero().flatten()
    assert len(differ) <= 0.01 * len(codes)
    neighbours = torch.stack([codes[differ], expected_codes[differ]]).long()
    assert (neighbours.diff(dim=0).abs() == 1).all()
    assert ((x[differ] - code[neighbours].mean(0)).abs() <= 1 / 65535 + 4 * ulp / nested_absmax.min()).all()


@golden_layers
def test_quantizes_as_bitsandbytes(golden, name):
    """Keys, dtypes, shapes and bytes of the state dict."""
    entries, layer = golden(name), fresh(name)
    layer.load_state_dict({"weight": entries["in.weight"], "bias": entries["in.bias"]})
    actual, expected = layer.to("cpu").state_dict(), state_dict_of(entries)
    if "_sq_" in name:
        assert differing(actual, expected) == []
        return
    rest = {"weight.absmax", "weight.nested_absmax", f"weight.quant_state.bitsandbytes__{layer.weight.quant_type}"}
    assert set(differing(actual, expected)) <= rest
    _, state = F.quantize_4bit(entries["in.weight"], quant_type=layer.weight.quant_type)
    assert_same_scales(actual, expected, state.absmax)


@pytest.mark.every_torch
@pytest.mark.every_torch
@golden_layers
@assigns
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_golden_layers_load_and_save(golden, name, device, assign):
    """Strictly into a fresh layer; what it saves is what it read; it computes what bitsandbytes did."""
    entries, layer = golden(name), fresh(name, device)
    expected = state_dict_of(entries)
    incompatible = layer.load_state_dict(copies(expected), assign=assign)
    assert not incompatible.missing_keys and not incompatible.unexpected_keys
    assert differing(layer.state_dict(), expected) == []
    assert torch.equal(F.dequantize_4bit(layer.weight, layer.quant_state), entries["out.dequantized"])

    weight = entries["out.dequantized"].float()
    x = entries["in.x"].clone().requires_grad_()
    out = layer(x)
    for result in (out.detach(), entries["out.forward_train"]):
        assert_product(result, entries["in.x"], weight, layer.bias.detach())
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    assert grad.dtype == x.dtype
    eps = torch.finfo(x.dtype).eps
    magnitude = (2 * out.detach().float().abs()) @ weight.abs()
    assert ((grad.float() - entries["out.grad_x"].float()).abs() <= 4 * eps * magnitude).all()


# ---- casts and copies ------------------------------------------------------------------------------------------


def torch_saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def with_future(flag: str, way):
    """`way` with one of torch's switches for how conversions put tensors into modules."""

    def convert(layer: nn.Module) -> nn.Module:
        switch = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
        switch(True)
        try:
            return way(layer)
        finally:
            switch(False)

    return convert


CASTS = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "to dtype": lambda layer: layer.to(torch.float16),
    "to device and dtype": lambda layer: layer.to("cpu", torch.bfloat16),
    "to device": lambda layer: layer.to("cpu"),
    "cpu": lambda layer: layer.cpu(),
    "there and back": lambda layer: layer.half().float(),
    "new parameters": with_future("overwrite", lambda layer: layer.to(torch.bfloat16)),
    "exchanged contents": with_future("swap", lambda layer: layer.to(torch.bfloat16)),
    "share_memory": lambda layer: layer.share_memory(),
    "deepcopy": copy.deepcopy,
    "deepcopy in a model": lambda layer: copy.deepcopy(nn.Sequential(layer))[0],
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": torch_saved,
    "copy": copy.copy,
}


@pytest.mark.parametrize("way", CASTS)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_codes_and_scales_survive(way, storage):
    layer = linear(quant_storage=storage)
    expected = copies(layer.state_dict())
    result = CASTS[way](layer)
    assert type(result) is Linear4bit and isinstance(result.weight, Params4bit)
    assert set(differing(result.state_dict(), expected)) <= {"bias"}  # which is cast
    result.bias = nn.Parameter(expected["bias"])
    for x in (inputs(), inputs(dtype=torch.bfloat16)):
        assert torch.equal(result(x), linear(quant_storage=storage)(x))
    state = result.weight.quant_state
    assert state.absmax.data_ptr() == result.weight_absmax.data_ptr() and result.weight.module is not None


def test_copies_are_independent():
    layer = linear()
    twin = copy.deepcopy(layer)
    shared = {t.data_ptr() for t in plain_tensors(layer).values()} & {
        t.data_ptr() for t in plain_tensors(twin).values()
    }
    assert not shared and twin.weight.module is twin and layer.weight.module is layer
    twin.load_state_dict(linear(seed=1).state_dict())
    assert differing(layer.state_dict(), linear().state_dict()) == []


@pytest.mark.parametrize("quantized", [False, True])
def test_meta_and_back(quantized):
    """Empty tensors of the same shapes, which can be loaded into."""
    layer = linear(quantized)
    meta = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in plain_tensors(meta).values()) and isinstance(meta.weight, Params4bit)
    empty = meta.to_empty(device="cpu")
    shapes = {name: (t.dtype, t.shape) for name, t in plain_tensors(layer).items()}
    assert {name: (t.dtype, t.shape) for name, t in plain_tensors(empty).items()} == shapes
    assert isinstance(empty.weight, Params4bit) and empty.weight.bnb_quantized == quantized
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.to("cpu")(inputs()), linear()(inputs()))


def test_unquantized_layers_are_like_linear():
    layer = linear(quantized=False)
    state = nn.Linear(IN, OUT).state_dict()
    layer.load_state_dict(state)
    assert differing(layer.state_dict(), state) == [] and not layer.half().weight.bnb_quantized
    assert layer.weight.dtype == torch.float16 and isinstance(layer.weight, Params4bit)
    twin = pickle.loads(pickle.dumps(layer))
    assert twin.weight.module is twin and torch.equal(twin.to("cpu")(inputs()), layer.to("cpu")(inputs()))


def test_a_plain_parameter_that_is_assigned():
    """Floats are to be quantized with the layer's settings."""
    source = nn.Linear(IN, OUT)
    for layer in (linear(quantized=False, blocksize=128), linear(blocksize=128)):
        layer.weight, layer.bias = source.weight, source.bias
        with pytest.raises(RuntimeError, match="not quantized"):
            layer(inputs())
        assert layer.to("cpu").quant_state.blocksize == 128 and layer.weight.quant_type == "nf4"
        assert source.weight.dtype == torch.float32
        torch.testing.assert_close(layer(inputs()), source(inputs()), rtol=0, atol=0.3)


def test_assigning_a_weight_of_another_shape_changes_nothing():
    layer, other = linear(), linear(size=(OUT, IN))
    before = copies(layer.state_dict())
    with pytest.raises(ValueError, match="shape"):
        layer.weight = other.weight
    with pytest.raises(ValueError, match=r"shape|bytes"):
        layer.quant_state = other.quant_state
    assert differing(layer.state_dict(), before) == []


def test_a_state_that_is_assigned():
    layer, other = linear(compress_statistics=False), linear(seed=1, compress_statistics=False)
    expected = other(inputs()) - other.bias + layer.bias
    layer.weight.data.copy_(other.weight)
    layer.quant_state = copy.deepcopy(other.quant_state)
    torch.testing.assert_close(layer(inputs()), expected)
    assert layer.weight.quant_state == other.quant_state


def test_reset_parameters_refuses_to_scramble_codes():
    layer = linear(quant_storage=torch.bfloat16)
    before = copies(layer.state_dict())
    with pytest.raises(RuntimeError, match="quantized"):
        layer.reset_parameters()
    assert differing(layer.state_dict(), before) == []
    linear(quantized=False).reset_parameters()


# ---- loading ---------------------------------------------------------------------------------------------------

TARGETS = {
    "fresh": lambda: linear(quantized=False, seed=1),
    "meta": lambda: linear(quantized=False, device="meta"),
    "quantized": lambda: linear(seed=1),
    "quantized meta": lambda: linear(seed=1).to("meta"),
    "another type": lambda: linear(seed=1, quant_type="fp4"),
    "another nesting": lambda: linear(seed=1, compress_statistics=False),
    "another blocksize": lambda: linear(seed=1, blocksize=32),
    "another storage": lambda: linear(seed=1, quant_storage=torch.float16),
}


@assigns
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16, "quant_type": "fp4", "blocksize": 128}],
    ids=["nested", "single", "fp4 in bfloat16"],
)
def test_loading(options, target, assign):
    """Whatever the layer was, it becomes the one that was saved."""
    source, layer = linear(**options), TARGETS[target]()
    state = source.state_dict()
    given = copies(state)
    layer.load_state_dict(given, assign=assign)
    assert differing(given, state) == [] and differing(layer.state_dict(), state) == []
    assert torch.equal(layer(inputs()), source(inputs())) and layer.weight.quant_state == source.quant_state
    settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    assert [getattr(layer.weight, s) for s in settings] == [getattr(source.weight, s) for s in settings]
    aliased = layer.weight.data_ptr() == given["weight"].data_ptr()
    assert aliased == assign and isinstance(layer.weight, Params4bit) and layer.weight.module is layer


def test_loading_keeps_tensors_that_fit():
    """As torch's does: an optimizer or a captured graph goes on with them."""
    layer = linear(seed=1)
    before = {name: (t, t.data_ptr()) for name, t in plain_tensors(layer).items()}
    layer.load_state_dict(linear().state_dict())
    assert all(t is before[name][0] and t.data_ptr() == before[name][1] for name, t in plain_tensors(layer).items())


@assigns
@pytest.mark.parametrize("target", ["quantized", "quantized meta"])
def test_floats_into_a_quantized_layer_are_quantized(target, assign):
    source, layer = linear(quantized=False), TARGETS[target]()
    layer.load_state_dict(source.state_dict(), assign=assign or target == "quantized meta")
    assert differing(layer.state_dict(), source.to("cpu").state_dict()) == []


def test_assigned_floats_are_quantized_later():
    layer = linear(quantized=False, device="meta", blocksize=128)
    state = nn.Linear(IN, OUT).state_dict()
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == state["weight"].data_ptr() and isinstance(layer.weight, Params4bit)
    assert layer.to("cpu").quant_state.blocksize == 128


@pytest.mark.parametrize("quantized", [False, True])
def test_a_foreign_switch_of_torch(quantized):
    """torch.__future__.set_swap_module_params_on_conversion also decides how state dicts are loaded."""

    def load(layer: nn.Module) -> nn.Module:
        layer.load_state_dict(linear(quantized).state_dict())
        return layer

    for target in ("fresh", "quantized"):
        layer = with_future("swap", load)(TARGETS[target]())
        assert isinstance(layer.weight, Params4bit)
        assert differing(layer.to("cpu").state_dict(), linear().state_dict()) == []


def error_of(layer: nn.Module, state: dict[str, Tensor]) -> str:
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state)
    return str(error.value)


@pytest.mark.parametrize("target", ["fresh", "quantized"])
def test_strict_loading_names_keys(target):
    state = linear().state_dict()
    for key in ("weight", "bias"):
        layer, part = TARGETS[target](), {k: v for k, v in state.items() if k != key}
        assert f'Missing key(s) in state_dict: "{key}"' in error_of(layer, part)
        assert layer.load_state_dict({k: v for k, v in part.items() if k == "bias"}, strict=False).missing_keys
    message = error_of(TARGETS[target](), state | {"weight.other": torch.zeros(1), "more": torch.zeros(1)})
    assert 'Unexpected key(s) in state_dict: "weight.other", "more"' in message


BAD_STATES = {
    "another shape": (lambda s: s.update(linear(size=(IN, OUT + 1), bias=False).state_dict()), "shape"),
    "no description": (lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"), "quant_state"),
    "codes alone": (lambda s: [s.pop(k) for k in list(s) if k.startswith("weight.")], "quantization state|size"),
    "codes cut off": (lambda s: s.update(weight=s["weight"][:-2]), "bytes"),
    "scales cut off": (lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}), "absmax"),
    "another codebook": (lambda s: s.update({"weight.quant_map": s["weight.quant_map"] * 2}), "quant_map"),
    "floats of another shape": (
        lambda s: [[s.pop(k) for k in list(s) if k.startswith("weight.")], s.update(weight=torch.zeros(3, 4))],
        "shape|size",
    ),
    "damaged description": (
        lambda s: s.update({"weight.quant_state.bitsandbytes__nf4": torch.tensor([0x7B, 0x21], dtype=torch.uint8)}),
        "weight:",
    ),
}


@pytest.mark.parametrize("damage", BAD_STATES)
@pytest.mark.parametrize("target", ["fresh", "quantized"])
def test_bad_states_are_refused(damage, target):
    """In one error that names the weight, which stays what it was, as does the bias of a quantized layer."""
    change, message = BAD_STATES[damage]
    state, layer = linear(bias=target == "quantized").state_dict(), TARGETS[target]()
    layer.bias = layer.bias if target == "quantized" else None
    before = copies(layer.state_dict())
    change(state)
    text = error_of(layer, state)
    assert "weight" in text
    assert any(part in text for part in message.split("|"))
    assert differing(layer.state_dict(), before) == []


# ---- models and files ------------------------------------------------------------------------------------------


def model(quantized: bool = True, seed: int = 0, **options) -> nn.Module:
    layers = [
        embedding(quantized, (50, IN), seed, **options),
        linear(quantized, seed=seed, **options),
        nn.LayerNorm(OUT, device=options.get("device")),
        linear(quantized, (OUT, 33), seed, compress_statistics=False, **options),
    ]
    return nn.Sequential(*layers)


TOKENS = torch.tensor([[1, 5, 49], [0, 2, 2]])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_safetensors(tmp_path, device):
    """No tensors share memory, within a layer or between layers."""
    source, target = model(), model(quantized=False, seed=1, device=device)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    target.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=device == "meta")
    assert torch.equal(target(TOKENS), source(TOKENS))
    save_model(target, tmp_path / "again.safetensors")
    other = model(seed=2)
    assert load_model(other, tmp_path / "again.safetensors") == (set(), [])
    assert torch.equal(other(TOKENS), source(TOKENS))


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_files(tmp_path, mmap):
    source, target = model(), model(quantized=False, device="meta")
    torch.save(source.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
    target.load_state_dict(state, assign=True)
    assert torch.equal(target(TOKENS), source(TOKENS))
    assert target[1].weight.data_ptr() == state["1.weight"].data_ptr()


def test_distributed_state_dicts():
    """torch's functions resolve every key to an attribute."""
    source, target = model(), model(seed=1)
    state = get_model_state_dict(source)
    assert state.keys() == source.state_dict().keys()
    incompatible = set_model_state_dict(target, state)
    assert not incompatible.missing_keys and torch.equal(target(TOKENS), source(TOKENS))


def test_names_of_a_sharded_checkpoint():
    """The tensors by their own names, as FSDP saves them: a layer of the same format takes them."""
    source, layer = linear(), linear(seed=1)
    layer.load_state_dict({name: tensor.detach() for name, tensor in plain_tensors(source).items()})
    assert differing(layer.state_dict(), source.state_dict()) == []
    layer = linear(seed=1)
    layer.load_state_dict({n: t.detach().clone() for n, t in plain_tensors(source).items()}, assign=True)
    assert differing(layer.state_dict(), source.state_dict()) == [] and isinstance(layer.weight, Params4bit)


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = Embedding4bit(40, 64, quant_type="nf4")
        self.head = Linear4bit(64, 40, bias=False, quant_type="nf4", compress_statistics=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


TIES = {
    "quantized": lambda source: source,
    "deepcopy": copy.deepcopy,
    "pickle": lambda source: pickle.loads(pickle.dumps(source)),
    "half and back": lambda source: source.half().float(),
    "loaded into a fresh one": lambda source: loaded(Tied(seed=1), source),
    "loaded into a quantized one": lambda source: loaded(Tied(seed=1).to("cpu"), source),
}


def loaded(target: nn.Module, source: nn.Module) -> nn.Module:
    target.load_state_dict(source.state_dict())
    return target


@pytest.mark.parametrize("way", TIES)
def test_tied_weights(way):
    """One parameter, and one of each of the scales."""
    source = Tied().to("cpu")
    expected = source(TOKENS % 40)
    tied = TIES[way](source)
    assert tied.head.weight is tied.table.weight and tied.head.weight_absmax is tied.table.weight_absmax
    assert [name for name, _ in tied.named_parameters()] == ["table.weight", "table.weight_absmax"]
    assert torch.equal(tied(TOKENS % 40), expected)


def test_tied_weights_in_safetensors(tmp_path):
    """save_model leaves out the second name; moving the model ties the head again."""
    source, target = Tied().to("cpu"), Tied(seed=1)
    save_model(source, tmp_path / "model.safetensors")
    load_model(target, tmp_path / "model.safetensors")
    assert torch.equal(target.to("cpu")(TOKENS % 40), source(TOKENS % 40))


@nestings
def test_optimizers_pass_by_frozen_tensors(nested):
    layer = linear(compress_statistics=nested)
    before = {n: raw(t).clone() for n, t in plain_tensors(layer).items() if n != "bias"}
    for make in (torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), AdamW8bit):
        optimizer = make(layer.parameters())
        layer(inputs()).sum().backward()
        optimizer.step()
    after = plain_tensors(layer)
    assert all(torch.equal(raw(after[name]), bytes_) for name, bytes_ in before.items())
