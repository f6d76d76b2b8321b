"""Modules that share one quantized weight, and the savers that write shared tensors once."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from bnbops.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt, Params4bit
from cases.layers_4bit import differing
from cases.quantize_model import quantize_

ROWS, DIM = 40, 64
_seeds = itertools.count()  # no two models are the same
FORMATS = ("nf4", "fp4 nested", "int8")
formats = pytest.mark.parametrize("format", FORMATS)
orders = pytest.mark.parametrize("order", [("table", "head"), ("head", "table")], ids="-".join)
pairs = pytest.mark.parametrize("pair", ["embedding", "linear"])


class Tied(nn.Module):
    """A table, of an embedding or of a linear layer, and a head with the same weight."""

    def __init__(self, format: str, order: tuple[str, str] = ("table", "head"), pair: str = "embedding") -> None:
        super().__init__()
        torch.manual_seed(next(_seeds))
        for name in order:
            setattr(self, name, _layer(format, name == "table" and pair == "embedding"))
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.table, nn.Embedding):
            return self.head(self.table(tokens))
        return self.head(self.table(torch.arange(DIM) / DIM).unsqueeze(1) * torch.ones(DIM))


def _layer(format: str, is_table: bool) -> nn.Module:
    if format == "float":
        return nn.Embedding(ROWS, DIM) if is_table else nn.Linear(DIM, ROWS, bias=False)
    if format == "int8":
        return Embedding8bit(ROWS, DIM) if is_table else Linear8bitLt(DIM, ROWS, bias=False, has_fp16_weights=False)
    options = {"quant_type": format[:3], "compress_statistics": "nested" in format}
    return Embedding4bit(ROWS, DIM, **options) if is_table else Linear4bit(DIM, ROWS, bias=False, **options)


TOKENS = torch.tensor([1, 5, 39])


def _by_quantize_(format: str, *layout: Any) -> nn.Module:
    options = {} if format == "int8" else {"double_quant": "nested" in format}
    return quantize_(Tied("float", *layout), format.split()[0], embeddings=True, skip=(), **options)


TARGETS: dict[str, Callable[..., nn.Module]] = {
    "quantized": lambda *layout: Tied(*layout).to("cpu"),
    "not quantized yet": Tied,
    "by quantize_": _by_quantize_,
    "of another blocksize": lambda *layout: _of_another_blocksize(*layout),
}


def _of_another_blocksize(format: str, *layout: Any) -> nn.Module:
    model = Tied(format, *layout)
    model.table.weight.blocksize, model.table.weight.compress_statistics = 32, "nested" not in format
    return model.to("cpu")


def _assert_loaded(target: nn.Module, source: nn.Module, expected: Tensor) -> None:
    assert target.head.weight is target.table.weight
    assert differing(target.state_dict(), source.state_dict()) == []
    assert torch.equal(target(TOKENS), expected)
    assert torch.equal(target.to("cpu")(TOKENS), expected)


@pytest.mark.parametrize(
    ("format", "way"),
    [case for case in itertools.product(FORMATS, TARGETS) if case != ("int8", "of another blocksize")],
)
@pairs
@orders
def test_safetensors_save_model_and_load_model(format, order, pair, way, tmp_path):
    """Strict: the left-out entries of the second name are those that the model misses, no more and no less."""
    source = Tied(format, order, pair).to("cpu")
    expected, file = source(TOKENS), tmp_path / "model.safetensors"
    save_model(source, file)
    assert ("table.weight" in load_file(file)) != ("head.weight" in load_file(file))
    target = TARGETS[way](format, order, pair)
    load_model(target, file)
    _assert_loaded(target, source, expected)


@formats
def test_by_quantize_(format, tmp_path):
    """A tied model that `quantize_` converted, saved."""
    source = _by_quantize_(format)
    save_model(source, tmp_path / "model.safetensors")
    target = Tied(format)
    load_model(target, tmp_path / "model.safetensors")
    _assert_loaded(target, source, source(TOKENS))


@orders
@formats
def test_files_of_earlier_versions(format, order, tmp_path):
    """They have, by the name that was left out, what did not share memory then."""
    source = Tied(format, order).to("cpu")
    state, second = source.state_dict(), "table"  # the last in the alphabet
    shared = {"weight", "SCB"} if format == "int8" else {"weight", "weight.absmax", "weight.nested_absmax"}
    left = {key: x for key, x in state.items() if key.partition(".")[2] not in shared or not key.startswith(second)}
    assert any(key.startswith(second) for key in left)
    save_file({key: x.clone() for key, x in left.items()}, tmp_path / "model.safetensors")
    for quantized in (True, False):
        target = Tied(format, order).to("cpu") if quantized else Tied(format, order)
        load_model(target, tmp_path / "model.safetensors")
        _assert_loaded(target, source, source(TOKENS))


@orders
@formats
def test_a_strict_load_misses_what_its_own_state_dict_has(format, order):
    """By name, whether or not the tied module has been loaded before."""
    source = Tied(format, order).to("cpu").state_dict()
    for quantized in (True, False):
        target = Tied(format, order)
        target = target.to("cpu") if quantized else target
        own = {key for key in target.state_dict() if key.startswith("head.weight")} - {"head.weight_format"}
        found = target.load_state_dict({k: v for k, v in source.items() if not k.startswith("head.")}, strict=False)
        assert set(found.missing_keys) == own and found.unexpected_keys == []
        assert differing(target.state_dict(), source) == []


@orders
@pytest.mark.parametrize("format", FORMATS[:2])
def test_scales_are_replaced_for_both(format, order):
    """Whichever module gets another weight's codes and scales."""
    model, other = Tied(format, order).to("cpu"), Tied(format, order)
    other.table.weight.blocksize = 32
    other.to("cpu")
    for name in order:
        before = getattr(model, name)
        before.load_state_dict(getattr(other, name).state_dict())
        assert model.head.weight is model.table.weight and model.head.weight_absmax is model.table.weight_absmax
        assert torch.equal(model(TOKENS), other(TOKENS))
        assert type(model.table.weight) is Params4bit
        model = Tied(format, order).to("cpu")


@formats
def test_accelerate(format, tmp_path):
    """Its saver leaves out duplicates, too."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import load_checkpoint_in_model

    source = Tied(format).to("cpu")
    accelerate.Accelerator().save_model(source, str(tmp_path), safe_serialization=True)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("table.weight" in names) != ("head.weight" in names)
    target = Tied(format).to("cpu")
    load_checkpoint_in_model(target, str(tmp_path))
    _assert_loaded(target, source, source(TOKENS))


@formats
def test_torch_save(format, tmp_path):
    source, file = Tied(format).to("cpu"), Path(tmp_path) / "model.pt"
    torch.save(source.state_dict(), file)
    for quantized in (True, False):
        target = Tied(format).to("cpu") if quantized else Tied(format)
        target.load_state_dict(torch.load(file, weights_only=True))
        _assert_loaded(target, source, source(TOKENS))
