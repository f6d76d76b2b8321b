"""Linear8bitLt under torch.compile and torch.export: one graph, the results of eager, any batch size."""

import io

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import bnbops
from bnbops import MatmulLtState, matmul
from bnbops.nn import Embedding8bit, Int8Params, Linear8bitLt
from bnbops.optim import AdamW8bit

kinds = pytest.mark.parametrize("has_fp16_weights", [False, True])


def make_model(has_fp16_weights: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [Linear8bitLt(40, 64, True, has_fp16_weights, 3.0), Linear8bitLt(64, 8, False, has_fp16_weights)]
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.Linear(8, 8)).to("cpu")


def inputs(rows: int) -> Tensor:
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
    x[:, 5] *= 9
    return x


def results(model: nn.Module, forward: nn.Module, rows: int) -> list[Tensor]:
    """Output and all gradients."""
    x = inputs(rows).requires_grad_()
    model.zero_grad()
    out = forward(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.every_torch
@kinds
def test_forward_and_backward_in_one_graph(has_fp16_weights):
    """A first batch, then one graph for all others."""
    torch.compiler.reset()
    model, counter = make_model(has_fp16_weights), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows, graphs in ((5, 1), (7, 2), (9, 2), (300, 2), (2, 2)):
        actual, expected = results(model, compiled, rows), results(model, model, rows)
        assert len(actual) == (7 if has_fp16_weights else 5)
        assert all(map(torch.equal, actual, expected)) and counter.frame_count == graphs


@kinds
def test_modes_of_a_compiled_model(has_fp16_weights):
    """Evaluation without gradients, autocast, checkpointing, a changed threshold."""
    torch.compiler.reset()
    model = make_model(has_fp16_weights)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled.eval()(inputs(5)), model(inputs(5)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(inputs(5))
        assert out.dtype == torch.bfloat16 and torch.equal(out, model(inputs(5)))
    before = model(inputs(5))
    model[0].state.threshold = 0.5
    assert torch.equal(compiled(inputs(5)), model(inputs(5))) and not torch.equal(model(inputs(5)), before)
    saved = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, results(model, saved, 5), results(model, model, 5)))


@pytest.mark.every_torch
@kinds
def test_trains_in_one_graph(has_fp16_weights):
    """The bits of eager, with an 8-bit optimizer; frozen weights stay as they are."""
    runs = []
    for compiled in (False, True):
        model = make_model(has_fp16_weights)
        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2, min_8bit_size=64)

        def step(x: Tensor, model: nn.Module = model, optimizer: AdamW8bit = optimizer) -> Tensor:
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        runs.append(([step(inputs(16)).item() for _ in range(4)], model.state_dict()))
    assert (step.graph_count, step.recompiles) == (1, 0)
    (losses, state), (compiled_losses, compiled_state) = runs
    assert losses == compiled_losses and losses[-1] < losses[0]
    assert all(torch.equal(state[key], compiled_state[key]) for key in state)
    unchanged = torch.equal(state["0.weight"], make_model(has_fp16_weights).state_dict()["0.weight"])
    assert unchanged != has_fp16_weights


def test_a_new_weight_reaches_the_compiled_model():
    """One assigned to the module, one with new scales, and one put into `_parameters`, past the module."""
    torch.compiler.reset()
    layer = make_model(False)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    seen = [compiled(inputs(5))]
    layer.weight = Int8Params(torch.randn(64, 40), requires_grad=False).to("cpu")
    seen.append(compiled(inputs(5)))
    layer.weight.SCB = 2 * layer.weight.SCB
    seen.append(compiled(inputs(5)))
    layer._parameters["weight"] = Int8Params(torch.randn(64, 40), requires_grad=False).to("cpu")
    seen.append(compiled(inputs(5)))
    assert torch.equal(seen[-1], layer(inputs(5)))
    assert len({out.sum().item() for out in seen}) == 4


def test_matmul_in_one_graph():
    torch.compiler.reset()
    layer = make_model(False)[0]
    state = MatmulLtState(CB=layer.weight.CB, SCB=layer.SCB, has_fp16_weights=False)
    product = torch.compile(lambda x: matmul(x, state.CB, state=state), fullgraph=True, backend="aot_eager")
    assert torch.equal(product(inputs(5)), matmul(inputs(5), layer.weight))


@pytest.mark.every_torch
@kinds
@pytest.mark.parametrize("strict", [False, True])
def test_export(has_fp16_weights, strict):
    """Export, save, load: the same numbers at any batch size, from parameters that keep their names."""
    model = make_model(has_fp16_weights).eval()
    rows = torch.export.Dim("rows", min=1, max=4096)
    program = torch.export.export(model, (inputs(5),), dynamic_shapes=({0: rows},), strict=strict)
    scales = set() if has_fp16_weights else {"0.weight_scale", "2.weight_scale"}
    names = {"0.weight", "0.bias", "2.weight", "3.weight", "3.bias"}
    assert set(program.state_dict) == names | scales and not program.constants
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for n in (1, 5, 33):
        assert torch.equal(module(inputs(n)), model(inputs(n)))


@pytest.mark.every_torch
def test_embedding():
    torch.compiler.reset()
    embedding = Embedding8bit(24, 40, dtype=torch.bfloat16).to("cpu")
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager", dynamic=True)
    program = torch.export.export(embedding, (torch.arange(4),), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert set(program.state_dict) == {"weight", "weight_scale"}
    for n in (3, 24):
        expected = embedding(torch.arange(n))
        assert torch.equal(compiled(torch.arange(n)), expected) and expected.dtype == torch.bfloat16
        assert torch.equal(program.module()(torch.arange(n)), expected)
