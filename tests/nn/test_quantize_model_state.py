"""bnbops.nn.quantize_: weights that are loaded on the way, and its memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bnbops
from cases.quantize_model import FORMATS, TOKENS, Net, assert_unchanged, net, on_meta, quantize_, snapshot

# ---- weights from a state ------------------------------------------------------------------------------------------


def as_file(kind: str, state: dict[str, Tensor], folder: Path) -> Path | dict[str, Tensor]:
    if kind == "mapping":
        return state
    if kind == "torch":
        torch.save(state, folder / "model.pt")
        return folder / "model.pt"
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder / "model.safetensors"
    parts = {f"model-{index}.safetensors": dict(list(state.items())[index::2]) for index in (0, 1)}
    for name, part in parts.items():
        save_file(part, folder / name)
    places = {tensor: name for name, part in parts.items() for tensor in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


KINDS = ["mapping", "torch", "safetensors", "sharded"]


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_meta_model_is_loaded_and_quantized(kind: str, quant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = net(dtype=dtype)
    state = as_file(kind, source.state_dict(), tmp_path)
    model = quantize_(on_meta(lambda: Net(dtype=dtype)), quant, state=state, embeddings=True)
    assert torch.equal(model(TOKENS), quantize_(source, quant, embeddings=True)(TOKENS))


def test_values_are_cast_to_the_models_dtype(tmp_path: Path) -> None:
    state = as_file("safetensors", net().state_dict(), tmp_path)
    model = quantize_(on_meta(lambda: Net(dtype=torch.bfloat16)), state=state)
    expected = quantize_(net().to(torch.bfloat16))
    assert torch.equal(model(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_under_another_default_device(kind: str, quant: str, tmp_path: Path) -> None:
    state = as_file(kind, net().state_dict(), tmp_path)
    with torch.device("meta"):
        model = quantize_(Net(), quant, state=state, embeddings=True)
    assert torch.equal(model(TOKENS), quantize_(net(), quant, embeddings=True)(TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_has_memory_of_its_own(kind: str, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    model = quantize_(on_meta(Net), state=as_file(kind, state, tmp_path))
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in (model.embed.weight, model.norm.weight, model.lm_head.weight):
            parameter.zero_()
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        *("embed.weight", "layers.0.0.bias", "layers.1.0.bias", "norm.weight", "norm.bias", "lm_head.weight"),
    ]


def test_what_a_parameter_has_beside_its_values_stays() -> None:
    model = on_meta(Net)
    model.embed.weight.note = "mine"
    model.norm.weight.requires_grad_(False)
    quantize_(model, state=net().state_dict())
    assert model.embed.weight.note == "mine"
    assert model.embed.weight.requires_grad
    assert not model.norm.weight.requires_grad


def test_a_model_that_has_weights_gets_others() -> None:
    model = net(1)
    embed = model.embed.weight
    quantize_(model, state=net().state_dict())
    assert model.embed.weight is embed
    assert torch.equal(model(TOKENS), quantize_(net())(TOKENS))


def test_one_name_of_a_shared_weight_suffices(tmp_path: Path) -> None:
    source = net(tied=True)
    state = source.state_dict()
    expected = quantize_(source)(TOKENS)
    for missing in ("lm_head.weight", "embed.weight", None):
        given = {name: tensor.clone() for name, tensor in state.items() if name != missing}
        model = on_meta(lambda: Net(tied=True))
        quantize_(model, state=as_file("safetensors", given, tmp_path))
        assert model.lm_head.weight is model.embed.weight
        assert torch.equal(model(TOKENS), expected)


def test_a_buffer_that_is_not_saved() -> None:
    def make() -> nn.Module:
        model = Net()
        model.register_buffer("positions", torch.arange(4), persistent=False)
        return model

    torch.manual_seed(0)
    state = make().state_dict()
    model = on_meta(make)
    with pytest.raises(ValueError, match=r"missing: positions\. State dicts do not have positions: add it"):
        quantize_(model, state=state)
    assert torch.equal(quantize_(model, state=state | {"positions": torch.arange(4)}).positions, torch.arange(4))


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda s: _without(s, "layers.1.2.weight"),
            ValueError,
            r"does not fit the model: missing: layers\.1\.2\.weight",
        ),
        (lambda s: s | {"other": torch.zeros(2)}, ValueError, "does not fit the model: unexpected: other"),
        (lambda s: s | {"scale": torch.zeros(2)}, ValueError, r"of another shape: scale \[2\] instead of \[1\]"),
        (lambda s: {}, ValueError, r"missing: embed\.weight, layers.* and 6 more$"),
        (
            lambda s: s | {"scale": torch.tensor([1])},
            ValueError,
            r"scale as torch\.int64, which cannot become torch\.float32",
        ),
        (lambda s: s | {"scale": 1.5}, TypeError, "state must hold tensors, but 'scale' is a float"),
        (lambda s: s | {"layers.1.2.weight": torch.full((64, 96), torch.inf)}, ValueError, "NaN, infinite or beyond"),
        (lambda s: quantize_(net()).state_dict(), ValueError, "It is quantized already: call quantize_ without state"),
        (lambda s: quantize_(net(), "int8").state_dict(), ValueError, "It is quantized already"),
        (lambda s: 3, TypeError, "state must be a mapping from name to tensor, or a path, got int"),
    ],
)
def test_a_state_that_does_not_fit(damage: Callable, error: type[Exception], message: str) -> None:
    for make in (net, lambda: on_meta(Net)):
        model = make()
        before = snapshot(model)
        with pytest.raises(error, match=message):
            quantize_(model, state=damage(net().state_dict()))
        assert_unchanged(model, before)


def test_two_values_for_a_shared_weight_are_refused() -> None:
    model = on_meta(lambda: Net(tied=True))
    with pytest.raises(
        ValueError, match=r"shares one tensor as embed\.weight and lm_head\.weight, but the state has two"
    ):
        quantize_(model, state=net().state_dict())


def test_a_state_for_a_quantized_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"plain parameters, but layers\.0\.0\.weight is a Params4bit; use load_state_dict"
    ):
        quantize_(quantize_(net()), state=net().state_dict())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _header(path: Path, edit: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("kind", "damage", "error", "message"),
    [
        ("safetensors", Path.unlink, FileNotFoundError, "model.safetensors"),
        ("safetensors", _cut, ValueError, "damaged or cut short"),
        ("safetensors", lambda p: p.write_bytes(b""), ValueError, "is not a safetensors file"),
        ("safetensors", lambda p: p.write_bytes(b"\xff" * 40), ValueError, "is not a safetensors file"),
        (
            "safetensors",
            lambda p: _header(p, lambda h: h["scale"].pop("shape")),
            ValueError,
            "is not a safetensors file",
        ),
        (
            "safetensors",
            lambda p: _header(p, lambda h: h["scale"].update(shape=[2])),
            ValueError,
            "damaged or cut short",
        ),
        (
            "safetensors",
            lambda p: _header(p, lambda h: h["scale"].update(dtype="F4")),
            ValueError,
            "scale is of dtype F4",
        ),
        ("sharded", lambda p: p.write_text("{}"), ValueError, "is not the index of a sharded safetensors file"),
        ("sharded", lambda p: p.write_text("["), ValueError, "is not the index of a sharded safetensors file"),
        ("sharded", lambda p: p.with_name("model-0.safetensors").unlink(), FileNotFoundError, "model-0"),
        ("sharded", lambda p: _drop(p.with_name("model-0.safetensors")), ValueError, "which does not have it"),
        ("torch", lambda p: p.write_bytes(b"nothing"), ValueError, "model.pt cannot be loaded"),
        ("torch", lambda p: torch.save([1], p), ValueError, "model.pt holds a list, not tensors by name"),
        ("torch", lambda p: torch.save({"model": {}}, p), TypeError, "'model' is a dict; if the state dict is an item"),
    ],
)
def test_bad_files(kind: str, damage: Callable, error: type[Exception], message: str, tmp_path: Path) -> None:
    path = as_file(kind, net().state_dict(), tmp_path)
    damage(path)
    model = on_meta(Net)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        quantize_(model, state=path)
    assert_unchanged(model, before)


def _drop(path: Path) -> None:
    save_file({"nothing": torch.zeros(1)}, path)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: pass its safetensors file, or the \.safetensors\.index\.json"):
        quantize_(on_meta(Net), state=tmp_path)


# ---- progress and memory -------------------------------------------------------------------------------------------


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bnbops.nn.quantize_(net(), "nf4")
    assert "quantize to nf4: 100%" in capsys.readouterr().err
    bnbops.nn.quantize_(net(), "nf4", progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    bnbops.nn.quantize_(net(), "nf4")
    assert capsys.readouterr().err == ""


MEMORY = """
import gc, os, sys, torch, bnbops
from torch import nn

ROWS, COLUMNS, LAYERS = (int(size) for size in sys.argv[2:])

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) / 1024

def make(dtype):
    return nn.Sequential(*(nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype) for _ in range(LAYERS)))

def measure(quant, how, dtype):
    warm_up = nn.Sequential(nn.Linear(64, 64))
    bnbops.nn.quantize_(warm_up, quant, state=warm_up.state_dict(), progress=False)
    gc.collect()
    base = status("VmRSS")
    with torch.device("cpu" if how == "in place" else "meta"):
        model = make(dtype)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is the present size
    state = None if how == "in place" else sys.argv[1]
    bnbops.nn.quantize_(model, quant, state=state, progress=False)
    print(quant, how, status("VmHWM") - base, status("VmRSS") - base, sep=",", flush=True)

torch.set_num_threads(1)
cases = [(quant, how, torch.float32) for quant in ("nf4", "int8") for how in ("in place", "from file")]
for case in [*cases, ("nf4", "cast", torch.bfloat16)]:
    if os.fork() == 0:  # malloc's holes of one case would serve the next
        measure(*case)
        os._exit(0)
    assert os.wait()[1] == 0
"""
ROWS, COLUMNS, LAYERS = 1024, 2048, 16
LAYER = ROWS * COLUMNS * 4 / 2**20  # MiB in fp32
FULL = LAYERS * LAYER
QUANTIZED = {"nf4": FULL / 8 * (1 + 2 / 64), "int8": FULL / 4}


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[float, float]]:
    """By format and way: the peak and the final memory, MiB beyond what the process took before the model."""
    path = tmp_path_factory.mktemp("memory") / "model.safetensors"
    save_file({f"{index}.weight": torch.rand(ROWS, COLUMNS) for index in range(LAYERS)}, path)
    command = [sys.executable, "-c", MEMORY, str(path), str(ROWS), str(COLUMNS), str(LAYERS)]
    result = subprocess.run(command, capture_output=True, text=True)
    path.unlink()
    assert result.returncode == 0, result.stderr
    lines = (line.split(",") for line in result.stdout.splitlines())
    return {(quant, how): (float(peak), float(final)) for quant, how, peak, final in lines}


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_loading_peaks_near_the_quantized_size(memory: dict, quant: str) -> None:
    peak, final = memory[quant, "from file"]
    assert peak < QUANTIZED[quant] + 2 * LAYER
    assert final < QUANTIZED[quant] + LAYER


def test_so_does_loading_with_a_cast(memory: dict) -> None:
    peak, final = memory["nf4", "cast"]
    assert peak < QUANTIZED["nf4"] + 2.5 * LAYER  # two copies at a time
    assert final < QUANTIZED["nf4"] + LAYER


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_in_place_frees_weight_by_weight(memory: dict, quant: str) -> None:
    peak, final = memory[quant, "in place"]
    assert FULL < peak < FULL + 2 * LAYER
    assert final < QUANTIZED[quant] + LAYER
