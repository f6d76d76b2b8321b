"""data_parallel under compiled_train_step: collectives, backward and optimizer are one graph, with eager's results."""

from __future__ import annotations

import os
from typing import Any

import expecttest
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import bnbops
from bnbops.compile import GraphBreakError, NothingTrainedError
from bnbops.distributed import data_parallel
from bnbops.optim import LAMB8bit
from cases import fsdp_quantized as cases
from cases.data_parallel import (
    WIDTH,
    Net,
    batch,
    differing,
    fsdp2,
    mesh_of,
    optimizer_of,
    step_of,
    tensors_of,
    train,
)
from cases.ranks import run_on_ranks
from cases.sharded import whole

LAMB = {"cls": LAMB8bit, "weight_decay": 0.1, "percentile_clipping": 50}


def trained(mode: str, backend: str | None, clip: float | None, options: dict[str, Any]) -> tuple[Any, ...]:
    """Losses and tensors; compiled, all of it was one graph."""
    model = data_parallel(Net(blocks=1), mesh_of(mode), mode)
    optimizer = optimizer_of(model, **options)
    step = step_of(model, optimizer, clip)
    if backend is None:
        return train(model, optimizer, step)
    torch._dynamo.reset()
    step = bnbops.compiled_train_step(step, optimizer, backend=backend)
    result = train(model, optimizer, step)
    assert (step.graph_count, step.recompiles) == (1, 0)
    return result


def as_eager(cases: list[tuple[str, str, float | None, dict[str, Any]]]) -> None:
    for mode, backend, clip, options in cases:
        losses, expected = trained(mode, None, clip, options)
        actual = trained(mode, backend, clip, options)
        assert torch.equal(torch.stack(actual[0]), torch.stack(losses))
        assert differing(actual[1], expected) == []


@pytest.mark.every_torch
def test_two_ranks() -> None:
    run_on_ranks(2, as_eager, [("fully_shard", "aot_eager", 0.5, LAMB), ("replicate", "eager", 0.5, {})])


def test_four_ranks_with_empty_shards() -> None:
    run_on_ranks(4, as_eager, [("fully_shard", "eager", None, {}), ("hybrid_shard", "eager", 0.5, {})])


# ---- what the graph holds --------------------------------------------------------------------------------------


def graph_of_a_step(mode: str) -> str:
    """The collectives and the operators around them, in the order of their calls; all else is left out."""
    model = data_parallel(nn.Linear(WIDTH, 4, bias=False), mesh_of(), mode)
    optimizer = bnbops.optim.AdamW8bit(model.parameters(), min_8bit_size=1024)
    calls: list[str] = []

    def compiler(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        for node in module.graph.nodes:
            # What changes its arguments is wrapped, and comes as the first of them.
            op = node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) else node.target
            if isinstance(op, torch._ops.OpOverload) and op.namespace in ("_c10d_functional", "bnbops"):
                calls.append(op._schema.name)
            elif op is torch.ops.aten.mm.default:
                calls.append("aten::mm")
        return module

    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    bnbops.compiled_train_step(step, optimizer, backend=aot_autograd(fw_compiler=compiler))(torch.randn(3, WIDTH))
    return "\n".join(calls) + "\n"


def test_the_collectives_of_a_step() -> None:
    sharded, same = run_on_ranks(2, graph_of_a_step, "fully_shard")
    assert sharded == same
    expecttest.assert_expected_inline(
        sharded,
        """\
_c10d_functional::all_gather_into_tensor
_c10d_functional::wait_tensor
aten::mm
aten::mm
_c10d_functional::reduce_scatter_tensor
_c10d_functional::wait_tensor
_c10d_functional::all_reduce
_c10d_functional::wait_tensor
bnbops::adam_step_
""",
    )
    expecttest.assert_expected_inline(
        run_on_ranks(2, graph_of_a_step, "replicate")[0],
        """\
aten::mm
aten::mm
_c10d_functional::all_reduce
_c10d_functional::wait_tensor
bnbops::adam_step_
""",
    )


# ---- inductor --------------------------------------------------------------------------------------------------


def inductor(cache: str) -> None:
    """Compiled twice: the second time from the cache on disk, where ranks with other numbers of rows meet."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    results = []
    for compiled in (False, True, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = data_parallel(nn.Linear(WIDTH, 9), mesh_of())
        optimizer = optimizer_of(model)
        step = step_of(model, optimizer)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer)
        results.append(train(model, optimizer, step))
    assert (step.graph_count, step.recompiles) == (1, 0)
    torch.testing.assert_close(results[1:], results[:1] * 2)


def test_inductor(tmp_path) -> None:
    run_on_ranks(2, inductor, str(tmp_path), seconds=600)  # a C++ compiler runs on each


# ---- accumulation ----------------------------------------------------------------------------------------------


def accumulation() -> None:
    """In one graph; and in two, with the gradients between them."""

    def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str) -> dict[str, Tensor]:
        def backward(x: Tensor, y: Tensor) -> Tensor:
            loss = cross_entropy(model(x), y) / 2
            loss.backward()
            return loss

        def update(x: Tensor, y: Tensor) -> Tensor:
            loss = backward(x, y)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        def both(x: Tensor, y: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
            return backward(x, y) + update(x2, y2)

        first, second, whole = backward, update, both
        if kind == "two graphs":
            first = bnbops.compiled_train_step(backward, optimizer, accumulate=True, backend="eager")
            second = bnbops.compiled_train_step(update, optimizer, backend="eager")
        elif kind == "one graph":
            whole = bnbops.compiled_train_step(both, optimizer, backend="eager")
        for i in range(3):
            if kind == "one graph":
                whole(*batch(2 * i), *batch(2 * i + 1))
            else:
                first(*batch(2 * i))
                second(*batch(2 * i + 1))
        if kind == "two graphs":
            assert first.graph_count == second.graph_count == 1
        elif kind == "one graph":
            assert whole.graph_count == 1
        return tensors_of(model, optimizer)

    results = []
    for kind in ("eager", "one graph", "two graphs"):
        torch._dynamo.reset()
        model = data_parallel(Net(blocks=1), mesh_of())
        results.append(losses_of(model, optimizer_of(model), kind))
    assert differing(results[1], results[0]) == differing(results[2], results[0]) == []


# ---- adapters beside a quantized base --------------------------------------------------------------------------


def adapters(name: str) -> None:
    """As under fully_shard. The codes are gathered as bytes, and nothing of them is reduced."""
    losses, expected = cases.train(cases.shard(cases.with_adapters(cases.quantized(name))), [dist.get_rank()])
    model = data_parallel(cases.with_adapters(cases.quantized(name)), mesh_of())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert dist.get_rank() != 0 or "base" in repr(model)  # one rank can print it
    eager = cases.train(model, [dist.get_rank()])
    assert torch.equal(torch.stack(eager[0]), torch.stack(losses)) and differing(eager[1], expected) == []

    model = data_parallel(cases.with_adapters(cases.quantized(name)), mesh_of())
    optimizer = cases.optimizer_of(model)

    @bnbops.compiled_train_step(optimizer=optimizer, backend="eager")
    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for i in range(3):
        assert torch.equal(step(*cases.batch(i, dist.get_rank())), losses[i][0])
    assert (step.graph_count, step.recompiles) == (1, 0)
    assert all(torch.equal(whole(param), expected[key]) for key, param in model.named_parameters())


def quantized() -> None:
    for name in cases.FORMATS:
        adapters(name)


# ---- refusals --------------------------------------------------------------------------------------------------


def refusals() -> None:
    """Every rank refuses, and the next collective finds all of them."""
    for model in (fsdp2(Net(blocks=1), mesh_of()), nn.parallel.DistributedDataParallel(Net(blocks=1))):
        optimizer = optimizer_of(model)
        with pytest.raises(GraphBreakError, match=r"bnbops\.distributed\.data_parallel takes their place"):
            bnbops.compiled_train_step(step_of(model, optimizer), optimizer, backend="eager")(*batch(0))
    model = data_parallel(Net(blocks=1), mesh_of())
    optimizer = optimizer_of(model)

    def forgets_backward(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x), y)
        optimizer.step()
        return loss

    before = tensors_of(model, optimizer)
    with pytest.raises(NothingTrainedError, match="found no gradient"):
        bnbops.compiled_train_step(forgets_backward, optimizer, backend="eager")(*batch(0))
    dist.barrier()
    assert differing({key: x for key, x in tensors_of(model, optimizer).items() if key in before}, before) == []


def together(*checks: str) -> None:
    for check in checks:
        globals()[check]()


def test_the_rest_on_two_ranks() -> None:
    run_on_ranks(2, together, *(check.__name__ for check in (accumulation, quantized, refusals)))
