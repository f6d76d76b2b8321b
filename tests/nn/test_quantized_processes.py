"""Quantized models in other processes, and in files as a whole."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnbops
from bnbops.nn import Embedding4bit, Embedding8bit, Int8Params, Linear4bit, Linear8bitLt, Params4bit
from cases.quantized import EMBEDDINGS, IN, LINEARS, TOKENS, Expert, features, quantized

TIMEOUT = 120  # seconds; a child that failed says nothing


class Tied(nn.Module):
    """A head that shares the table's weight."""

    def __init__(self, table: nn.Embedding, head: nn.Linear) -> None:
        super().__init__()
        self.table, self.head = table, head
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


def _models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    linears = {name: make().to("cpu") for name, make in LINEARS.items() if name != "parametrized"}
    embeddings = {f"embedding, {name}": quantized(make, torch.float32) for name, make in EMBEDDINGS.items()}
    tied = {
        "tied nf4": Tied(Embedding4bit(TOKENS, IN), Linear4bit(IN, TOKENS, bias=False)).to("cpu"),
        "tied int8": Tied(Embedding8bit(TOKENS, IN), Linear8bitLt(IN, TOKENS, False, has_fp16_weights=False)).to("cpu"),
    }
    return linears | embeddings | tied | {"not quantized yet": Linear4bit(IN, IN), "float": nn.Linear(IN, IN)}


def _outputs(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    tokens, x = torch.tensor([1, 5, TOKENS - 1]), features(3)
    with torch.no_grad():
        return {
            name: model(tokens if isinstance(model, Tied) or "embedding" in name else x)
            for name, model in models.items()
            if name != "not quantized yet"
        }


def _tensors(models: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, model in models.items():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield f"{name}: {path}", tensor.detach()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _answer(models: dict[str, nn.Module], queue: Any, answers: Any) -> None:
    """In another process: what the models compute, then a mark in each of their tensors."""
    queued = queue.get(timeout=TIMEOUT)
    found = [_outputs(models), _outputs(queued)]
    for _, tensor in (*_tensors(models), *_tensors(queued)):
        tensor.flatten()[0].zero_()  # also of floats that hold codes
    answers.put(pickle.dumps([{name: out.numpy() for name, out in each.items()} for each in found]))


@contextmanager
def _strategy(name: str) -> Iterator[None]:
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy(name)
    try:
        yield
    finally:
        mp.set_sharing_strategy(before)


@pytest.mark.every_torch
@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_arguments_and_queues_of_a_spawned_process(strategy):
    """They compute the same there, and it is the same memory: what the process writes to a tensor, this one sees."""
    models, queued, context = _models(), _models(), mp.get_context("spawn")
    expected = _outputs(models)
    with _strategy(strategy):
        queue, answers = context.Queue(), context.Queue()
        process = context.Process(target=_answer, args=(models, queue, answers))
        process.start()
        queue.put(queued)
        found = pickle.loads(answers.get(timeout=TIMEOUT))
        process.join(TIMEOUT)
    assert process.exitcode == 0
    for outputs in found:
        assert outputs.keys() == expected.keys()
        assert [name for name, out in outputs.items() if not torch.equal(torch.from_numpy(out), expected[name])] == []
    for name, tensor in (*_tensors(models), *_tensors(queued)):
        assert not _bytes(tensor)[: tensor.element_size()].any(), name
    assert not _bytes(models["nf4"].weight.quant_state.absmax)[:4].any()


class Answers(Dataset):
    """What models compute for an input, so that a worker has to hold them."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        self.models, self.names = models, list(_outputs(models))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Tensor:
        return _outputs({self.names[i]: self.models[self.names[i]]})[self.names[i]]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context):
    models = _models()
    if context == "fork":
        models["parametrized"] = quantized(Expert)
    loader = DataLoader(Answers(models), batch_size=None, num_workers=1, multiprocessing_context=context)
    expected = _outputs(models).values()
    assert all(torch.equal(found, wanted) for found, wanted in zip(loader, expected, strict=True))


def test_parametrized_modules_are_pickled_by_nobody():
    """As torch says of any parametrization."""
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(quantized(Expert))


# ---- whole modules and parameters in files -------------------------------------------------------------------------


def _through_file(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch.save": lambda models: _through_file(models, weights_only=False),
    "pickle": lambda models: pickle.loads(pickle.dumps(models)),
    "deepcopy": copy.deepcopy,
    "copy": lambda models: {name: copy.copy(model) for name, model in models.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_whole_modules(way):
    """The same tensors, and those that share memory still do: parameters with what they show, and tied ones."""
    models = _models()
    before = {name: _bytes(tensor).clone() for name, tensor in _tensors(models)}
    copies = WAYS[way](models)
    after = dict(_tensors(copies))
    assert after.keys() == before.keys()
    assert [name for name, tensor in after.items() if not torch.equal(_bytes(tensor), before[name])] == []
    for name, out in _outputs(copies).items():
        assert torch.equal(out, _outputs({name: models[name]})[name]), name
    for name in ("nf4", "nf4 nested", "bytes in bfloat16", "embedding, nf4"):
        layer, shown = copies[name], copies[name].weight.quant_state
        held = layer.weight_absmax if shown.nested else layer.weight_absmax.view(torch.float32)
        assert shown.absmax.data_ptr() == held.data_ptr()
    for name in ("tied nf4", "tied int8"):
        assert copies[name].head.weight is copies[name].table.weight


def test_a_file_has_each_tensor_once():
    layer = Linear4bit(IN, 64 * IN, bias=False).to("cpu")
    file = io.BytesIO()
    torch.save(layer, file)
    assert len(file.getvalue()) < layer.weight.nbytes + layer.weight_absmax.nbytes + 8000


@pytest.mark.parametrize("nested", [False, True])
def test_parameters_without_a_module(nested):
    """Their file loads with weights_only: what rebuilds them runs no code but the class's own checks."""
    weight = Params4bit(torch.randn(IN, IN), compress_statistics=nested, quant_type="nf4").to("cpu")
    for way in (lambda x: _through_file(x, weights_only=True), lambda x: pickle.loads(pickle.dumps(x))):
        loaded = way({"weight": weight})["weight"]
        assert type(loaded) is Params4bit and torch.equal(loaded.data, weight.data)
        assert loaded.quant_state == weight.quant_state and loaded.bnb_quantized and not loaded.requires_grad


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "int8", "not quantized yet"])
def test_state_dicts_of_parameters(name):
    model = _models()[name]
    state = _through_file(model.state_dict(keep_vars=True), weights_only=True)
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(state)
    assert all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_pickles_of_earlier_versions():
    """A Params4bit's attributes had its quantization state, in fp32."""
    from bnbops.nn.four_bit import parameter

    weight = Params4bit(torch.randn(IN, IN), quant_type="nf4").to("cpu")
    attributes = {name: vars(weight)[name] for name in parameter._ATTRIBUTES} | {"module": None}
    rebuilt = parameter._rebuild(Params4bit, weight.data, False, attributes)
    assert rebuilt.quant_state == weight.quant_state and torch.equal(rebuilt.data, weight.data)


def test_files_that_name_former_modules(golden, pytestconfig):
    """Written when the classes were in modules of other names, which files by `torch.save` hold."""
    parameters = golden("nn_parameters.pt")
    modules = torch.load(pytestconfig.rootpath / "tests/golden/nn_modules.pt", weights_only=False)
    assert {type(parameter) for parameter in parameters.values()} == {Params4bit, Int8Params}
    for name, parameter in parameters.items():
        held = modules.get_parameter(name)
        assert type(parameter) is type(held) and torch.equal(_bytes(parameter), _bytes(held))
        if held._holds_codes:
            assert torch.equal(parameter._values(torch.float32), held._values(torch.float32))
    for name, module in modules.items():
        assert type(module) is getattr(bnbops.nn, name)
        fresh = copy.deepcopy(module)
        fresh.load_state_dict(module.state_dict())
