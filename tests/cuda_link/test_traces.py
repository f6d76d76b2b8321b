"""What a GPU would run, on fake CUDA tensors: train steps and quantized models keep everything on the device.

Nothing in them needs the device's values on the host: fake tensors have none to give. Torch's autograd engine wants a
real device, so optimizers step eagerly with gradients that are given, and what has a backward is recorded as a graph on
the CPU and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map_only

import bnbops as bnb
from cases.compiled import batches, make_model, usual_step
from cases.optimizer_classes import CLASSES, build
from ops.test_fakes import fake_cuda

ON_CPU = ("lr", "options")  # arguments of steps that may, or must, be in the host's memory
Graphs = list[tuple[GraphModule, list[Any]]]


class OnCuda(Interpreter):
    """Runs a graph that was recorded on the CPU as if it had been on a GPU. Every result has to be there."""

    def __init__(self, graph: GraphModule, inputs: list[Any]) -> None:
        super().__init__(graph)
        self.inputs = inputs
        self.on_cpu = {n.kwargs[name] for n in graph.graph.nodes for name in ON_CPU if n.kwargs.get(name) is not None}
        self.calls: list[str] = []

    def replay(self) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
            self.run(*map(self.placed, placeholders, self.inputs))

    def placed(self, node: Node, value: Any) -> Any:
        """An input on its device: empty, since only its shape counts."""
        if not isinstance(value, Tensor):
            return value
        device = "cpu" if node in self.on_cpu else "cuda"
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.op == "call_function":
            self.calls.append(node.format_node() or "")
            if node not in self.on_cpu:
                devices = {x.device.type for x in tree_leaves(result) if isinstance(x, Tensor)}
                assert devices <= {"cuda"}, node.format_node()
        return result

    def get_attr(self, target: str, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return fake_cuda(value) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        cuda = tree_map_only(torch.device, lambda _: torch.device("cuda"), kwargs)
        return super().call_function(target, args, cuda)


def recorder() -> tuple[Graphs, Callable[..., Any]]:
    """A compiler that keeps the graphs, forward and backward, that it gets, and their inputs."""
    graphs: Graphs = []

    def record(graph: GraphModule, inputs: list[Any]) -> Any:
        graphs.append((graph, inputs))
        return make_boxed_func(graph.forward)

    return graphs, aot_autograd(fw_compiler=record, bw_compiler=record)


def replayed(graphs: Graphs) -> list[str]:
    """The calls in each graph, a line each."""
    interpreters = [OnCuda(graph, inputs) for graph, inputs in graphs]
    for interpreter in interpreters:
        interpreter.replay()
    return ["\n".join(interpreter.calls) for interpreter in interpreters]


@pytest.mark.parametrize("name", [name for name in CLASSES if "Paged" not in name])
def test_optimizers_step(name):
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in [(64, 300), (64,), (3, 16, 64)]]
        optimizer = build(name, params, **({"min_8bit_size": 1} if name != "PytorchLARS" else {}))
        for _ in range(2):
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.step()
            optimizer.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert states and {x.device.type for x in states} == {"cuda"}


def test_clipped_and_scaled_steps():
    with FakeTensorMode():
        param = nn.Parameter(torch.empty(64, 64, device="cuda"))
        optimizer = bnb.optim.AdamW8bit([param], percentile_clipping=5)
        param.grad = torch.empty_like(param)
        optimizer.grad_scale, optimizer.found_inf = (torch.empty(1, device="cuda") for _ in range(2))
        optimizer.step()


@pytest.mark.parametrize("name", ["AdamW8bit", "LAMB8bit", "AdEMAMix32bit"])
def test_compiled_train_step(name):
    torch._dynamo.reset()
    model = make_model()
    optimizer = build(name, model.parameters())
    graphs, backend = recorder()
    step = bnb.compiled_train_step(usual_step(model, optimizer), optimizer, backend=backend)
    step(*batches(1)[0])
    (calls,) = replayed(graphs)
    assert f"bnbops.{optimizer._rules[0].step}" in calls


IN_4_BITS = ("linear_4bit", "linear_4bit_input_grad")
IN_INT8 = ("linear_int8_weight_only", "linear_int8_input_grad")  # as models on the CPU train, where these are traced
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {
    "NF4": (lambda: bnb.nn.LinearNF4(64, 128), IN_4_BITS),
    "FP4, plain scales": (lambda: bnb.nn.LinearFP4(64, 128, compress_statistics=False), IN_4_BITS),
    "LLM.int8": (lambda: bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False, threshold=6.0), IN_INT8),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_quantized_models(layer):
    """Forward, and backward to a layer that is trained."""
    torch._dynamo.reset()
    make, (operator, gradient) = LAYERS[layer]
    model = nn.Sequential(nn.Linear(64, 64), make(), nn.GELU(), nn.Linear(128, 8)).to("cpu")
    graphs, backend = recorder()
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(16, 64)).sum().backward()
    forward, backward = replayed(graphs)
    assert f"bnbops.{operator}." in forward and f"bnbops.{gradient}." in backward
