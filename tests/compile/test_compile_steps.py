"""compiled_train_step with the kinds of steps and parameters that users have. Reference: the same step, run eagerly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bnbops
from bnbops.optim import Adam, AdamW8bit
from cases.compiled import Step, assert_same, batches, make, make_model, snapshot, usual_step


def zero_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def zero_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        for p in model.parameters():
            p.grad = None
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def with_a_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    return step


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        model.zero_grad()
        return loss, norm

    return step


def several_backwards(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        for xs, ys in zip(x.chunk(4), y.chunk(4), strict=True):
            loss = cross_entropy(model(xs), ys) / 4
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@pytest.mark.every_torch
@pytest.mark.parametrize("make_step", [clipped, several_backwards, zero_first, zero_by_hand, with_a_closure])
def test_what_users_put_into_a_step(make_step: Callable[..., Step]) -> None:
    model, optimizer = make()
    eager = make_step(model, optimizer)
    losses = [eager(*batch) for batch in batches(4)]
    expected = snapshot(model, optimizer)

    model, optimizer = make()
    step = bnbops.compiled_train_step(make_step(model, optimizer), optimizer, backend="aot_eager")
    assert [step(*batch) for batch in batches(4)] == losses
    assert_same(snapshot(model, optimizer), expected)
    assert step.graph_count == 1


@pytest.mark.every_torch
def test_clearing_gradients_first_leaves_other_graphs_alone() -> None:
    # Dynamo notes the place of a missing gradient on a None that all graphs share; a later graph would load from there.
    model, optimizer = make()
    bnbops.compiled_train_step(zero_by_hand(model, optimizer), optimizer, backend="eager")(*batches(1)[0])

    @torch.compile(backend="eager", fullgraph=True)
    def other(x: Tensor) -> tuple[Tensor, None]:
        return x + 1, None

    assert other(torch.zeros(2))[1] is None


def test_param_groups_frozen_unused_and_tied_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_model()
            self.head = nn.Linear(8, 48, bias=False)
            self.tied = nn.Linear(8, 48, bias=False)
            self.tied.weight = self.head.weight
            self.unused = nn.Linear(64, 64)
            self.body[2].bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.tied(self.head(self.body(x)) @ self.head.weight))

    def train(compiled: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        net = Net()
        groups = [
            {"params": list(net.body.parameters()), "lr": 1e-2},
            {"params": [*net.head.parameters(), *net.unused.parameters()], "lr": 1e-3, "weight_decay": 0.0},
        ]
        optimizer = AdamW8bit(groups, min_8bit_size=256)
        optimizer.init_state()
        step = usual_step(net, optimizer)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        for batch in batches(3):
            step(*batch)
        assert not compiled or step.graph_count == 1
        return snapshot(net, optimizer)

    assert_same(train(compiled=True), train(compiled=False))


def test_bf16_parameters() -> None:
    def train(compiled: bool) -> dict[str, Tensor]:
        model = make_model(torch.bfloat16)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2)
        step = usual_step(model, optimizer)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="aot_eager")
        for batch in batches(3, dtype=torch.bfloat16):
            step(*batch)
        return snapshot(model, optimizer)

    assert_same(train(compiled=True), train(compiled=False))


@pytest.mark.every_torch
def test_two_optimizers_in_one_graph() -> None:
    def train(compiled: bool) -> dict[str, Tensor]:
        model = make_model()
        optimizers = [AdamW8bit(model[0].parameters(), lr=1e-2), Adam(model[2].parameters(), lr=1e-3)]

        def step(x: Tensor, y: Tensor) -> None:
            cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        run = bnbops.compiled_train_step(step, optimizers, backend="aot_eager") if compiled else step
        for batch in batches(3):
            assert run(*batch) is None
        return snapshot(model, *optimizers)

    assert_same(train(compiled=True), train(compiled=False))


@pytest.mark.every_torch
def test_each_of_two_models_trains_in_turn() -> None:
    # As in a GAN: the second step's backward also reaches the parameters that the first step's graph updated.
    def train(compiled: bool) -> dict[str, Tensor]:
        first, second = make_model(), nn.Linear(8, 8)
        a, b = AdamW8bit(first.parameters(), lr=1e-2), AdamW8bit(second.parameters(), lr=1e-2)
        steps = []
        for optimizer in (a, b):
            step = usual_step(nn.Sequential(first, second), optimizer)
            steps.append(bnbops.compiled_train_step(step, optimizer, backend="eager") if compiled else step)
        for batch in batches(4):
            for step in steps:
                step(*batch)
        return snapshot(nn.Sequential(first, second), a, b)

    assert_same(train(compiled=True), train(compiled=False))


@pytest.mark.every_torch
def test_sizes_that_differ_between_models_are_constants_of_each_graph() -> None:
    def make(rows: int) -> list[torch.fx.GraphModule]:
        model, graphs = nn.Linear(8, 8), []
        optimizer = AdamW8bit(model.parameters(), lr=1e-2)

        def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        def step(x: Tensor) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        bnbops.compiled_train_step(step, optimizer, backend=backend)(torch.zeros(rows, 8))
        return graphs

    for graphs in (make(4), make(6)):
        inputs = graphs[0].graph.find_nodes(op="placeholder")
        assert [node for node in inputs if not isinstance(node.meta["example_value"], Tensor)] == []


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_optimizers_step_alone(scheduled):
    """Forward and backward stay eager; a scheduler has put its wrapper around `optimizer.step`."""
    results = []
    for compiled in (False, True):
        model = make_model()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2) if scheduled else None
        step = (
            bnbops.compiled_train_step(optimizer.step, optimizer, backend="aot_eager") if compiled else optimizer.step
        )
        for x, y in batches(5):
            cross_entropy(model(x), y).backward()
            step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()
        results.append(snapshot(model, optimizer))
    assert (step.graph_count, step.recompiles) == (1, 0)
    assert_same(*results)
