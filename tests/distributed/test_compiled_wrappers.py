"""fully_shard and DDP, whose hooks cannot be in a graph: what can be compiled beside them, with eager's results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cases.data_parallel import Net, differing, fsdp2, mesh_of, optimizer_of, train
from cases.ranks import run_on_ranks


class Graphs:
    """A backend that keeps a line for each graph that has run: its calls, but for lookups of gradients and parts."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.ran: dict[int, str] = {}

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        names = [node.name for node in module.graph.nodes if node.op.startswith("call")]
        lookup = re.compile(r"(param|grad|(prim_)?to_local|_set_grad_enabled)(_\d+)?")
        line = " ".join(name for name in names if not lookup.fullmatch(name))
        compiled = lookup_backend("aot_eager")(module, inputs)

        def run(*args: Any) -> Any:
            self.ran[id(run)] = f"{self.what}: {line}\n"
            return compiled(*args)

        return run


def model_of(kind: str, backend: Graphs | None) -> tuple[nn.Module, nn.Module]:
    """The one with the parameters, and the one to call."""
    model = Net()
    if kind == "fully_shard":
        for block in model.blocks if backend else ():
            block.compile(backend=backend)  # before fully_shard, whose hooks stay outside
        return (fsdp2(model, mesh_of()),) * 2
    wrapped = DistributedDataParallel(model)
    return model, torch.compile(wrapped, backend=backend) if backend else wrapped


def graphs(kind: str) -> str:
    """Of the model and of the optimizer's step, which train as eager ones do."""
    results, forward, update = [], Graphs("model"), Graphs("optimizer")
    for compiled in (False, True):
        model, call = model_of(kind, forward if compiled else None)
        optimizer = optimizer_of(model)
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
        optimizer.init_state()

        def step_alone(optimizer: torch.optim.Optimizer = optimizer) -> None:
            type(optimizer).step(optimizer)

        take = torch.compile(step_alone, fullgraph=True, backend=update) if compiled else step_alone

        def step(x: Tensor, y: Tensor, model=call, optimizer=optimizer, take=take) -> Tensor:
            loss = cross_entropy(model(x), y)
            loss.backward()
            take()
            optimizer.zero_grad()
            optimizer._opt_called = True  # as step() does: schedulers warn without it
            return loss.detach()

        results.append(train(model, optimizer, step))
    assert torch.equal(torch.stack(results[1][0]), torch.stack(results[0][0]))
    assert differing(results[1][1], results[0][1]) == []
    return "".join([*forward.ran.values(), *update.ran.values()])


@pytest.mark.every_torch
def test_fully_shard_with_compiled_blocks() -> None:
    (graphs_of_a_rank, same) = run_on_ranks(2, graphs, "fully_shard")
    assert graphs_of_a_rank == same
    expecttest.assert_expected_inline(
        graphs_of_a_rank,
        """\
model: layer_norm linear gelu linear_1 add
model: layer_norm linear gelu linear_1 add
optimizer: adam_step_ adam_step__1
""",
    )


def test_ddp() -> None:
    (graphs_of_a_rank, same) = run_on_ranks(2, graphs, "ddp")
    assert graphs_of_a_rank == same
    expecttest.assert_expected_inline(
        graphs_of_a_rank,
        """\
model: layer_norm linear gelu linear_1 x layer_norm_1 linear_2 gelu_1 linear_3 x_1 linear_4
optimizer: adam_step_ adam_step__1
""",
    )
