"""fully_shard and DDP, whose hooks cannot be in a graph: what can be compiled beside them, with eager's results."""

from __future__ import annotations

import expecttest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from data_parallel_cases import Net, batch, differing, fsdp2, mesh_of, optimizer_of, train
from ranks import run_on_ranks


def model_of(kind: str, compiler: CompileCounterWithBackend | None) -> tuple[nn.Module, nn.Module]:
    """The one with the parameters, and the one to call."""
    model = Net()
    if kind == "fully_shard":
        for block in model.blocks if compiler else ():
            block.compile(backend=compiler)  # before fully_shard, whose hooks stay outside
        return (fsdp2(model, mesh_of()),) * 2
    wrapped = DistributedDataParallel(model)
    return model, torch.compile(wrapped, backend=compiler) if compiler else wrapped


def described(counter: CompileCounterWithBackend, what: str) -> str:
    """A line for each graph: its operators and modules, by name."""
    graphs = [[node.name for node in module.graph.nodes if node.op.startswith("call")] for module in counter.graphs]
    assert counter.frame_count == len(graphs)
    return "".join(f"{what}: {' '.join(names)}\n" for names in graphs)


def graphs(kind: str) -> str:
    """Of the model and of the optimizer's step, which train as eager ones do."""
    results, forward, update = [], CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model, call = model_of(kind, forward if compiled else None)
        optimizer = optimizer_of(model)
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
        optimizer.init_state()

        def step_alone(optimizer: torch.optim.Optimizer = optimizer) -> None:
            type(optimizer).step(optimizer)

        take = torch.compile(step_alone, fullgraph=True, backend=update) if compiled else step_alone

        def step(x, y, model=call, optimizer=optimizer, take=take):
            loss = cross_entropy(model(x), y)
            loss.backward()
            take()
            optimizer.zero_grad()
            optimizer._opt_called = True  # as step() does: schedulers warn without it
            return loss.detach()

        results.append(train(model, optimizer, step))
    assert torch.equal(torch.stack(results[1][0]), torch.stack(results[0][0]))
    assert differing(results[1][1], results[0][1]) == []
    return described(forward, "model") + described(update, "optimizer")


def test_fully_shard_with_compiled_blocks() -> None:
    (graphs_of_a_rank, same) = run_on_ranks(2, graphs, "fully_shard")
    assert graphs_of_a_rank == same
    expecttest.assert_expected_inline(graphs_of_a_rank, """""")


def test_ddp() -> None:
    (graphs_of_a_rank, same) = run_on_ranks(2, graphs, "ddp")
    assert graphs_of_a_rank == same
    expecttest.assert_expected_inline(graphs_of_a_rank, """""")
