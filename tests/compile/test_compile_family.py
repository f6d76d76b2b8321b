"""compiled_train_step with every optimizer: one graph, the bits of eager, whatever a schedule changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

import bnbops
from bnbops import optim
from cases.compiled import assert_same, batches, make_model, snapshot, usual_step

FAMILY = {
    "Adam8bit": {"lr": 1e-2},
    "AdamW8bit": {"lr": 1e-2, "percentile_clipping": 20},
    "SGD8bit": {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "SGD": {"lr": 1e-2},
    "Lion8bit": {"lr": 1e-3, "weight_decay": 0.1},
    "RMSprop8bit": {"lr": 1e-3, "momentum": 0.5},
    "Adagrad8bit": {"lr": 1e-2, "lr_decay": 0.1},
    "LAMB8bit": {"lr": 1e-2, "weight_decay": 0.01, "percentile_clipping": 20},
    "LARS8bit": {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.01},
    "AdEMAMix8bit": {"lr": 1e-2, "t_alpha": 5, "t_beta3": 5},
}
FAMILY |= {name.replace("8bit", "32bit"): kwargs for name, kwargs in FAMILY.items() if "8bit" in name}
IN_PYTHON = {"PytorchLARS": {"lr": 1e-2, "momentum": 0.9}}  # its options are constants of the graph, but for lr


def train(name: str, steps: int, backend: object, change: Callable[[torch.optim.Optimizer, int], None]):
    model = make_model()
    optimizer = getattr(optim, name)(model.parameters(), **{**FAMILY, **IN_PYTHON}[name])
    step = usual_step(model, optimizer)
    if backend:
        step = bnbops.compiled_train_step(step, optimizer, backend=backend)
    losses = []
    for i, batch in enumerate(batches(steps)):
        losses.append(step(*batch))
        change(optimizer, i)
    tensors = snapshot(model, optimizer)
    if "8bit" in name:
        assert any(value.dtype == torch.uint8 for value in tensors.values())
    return losses, tensors, step


def schedule_lr(optimizer: torch.optim.Optimizer, i: int) -> None:
    for group in optimizer.param_groups:
        lr = 1e-2 / (i + 2)
        group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else group.update(lr=lr)


@pytest.mark.every_torch
@pytest.mark.parametrize("name", [*FAMILY, *IN_PYTHON])
def test_one_graph_traced_once_and_the_bits_of_eager(name: str) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    losses, tensors, _ = train(name, 6, None, schedule_lr)
    compiled_losses, compiled_tensors, step = train(name, 6, backend, schedule_lr)
    assert not torch.equal(tensors["param 0.weight"], make_model()[0].weight)
    assert compiled_losses == losses
    assert_same(compiled_tensors, tensors)
    assert (step.graph_count, step.recompiles, backend.frame_count) == (1, 0, 1)


@pytest.mark.every_torch
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), torch.tensor([1e-2], dtype=torch.float64)], ids=str)
def test_the_optimizers_step_alone_is_traced_once_without_help(lr: float | Tensor) -> None:
    """Of torch.compile alone: only a float64 tensor without dimensions takes two attempts."""
    torch.compiler.reset()
    model, backend = make_model(), CompileCounterWithBackend("aot_eager")
    optimizer = optim.AdamW8bit(model.parameters(), lr=lr)
    optimizer.init_state()
    step = torch.compile(lambda: type(optimizer).step(optimizer), fullgraph=True, backend=backend)
    for x, _ in batches(3):
        model(x).square().mean().backward()
        step()
        optimizer.zero_grad()
    assert backend.frame_count == 1 and {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def schedule_momentum(optimizer: torch.optim.Optimizer, i: int) -> None:
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.95 - 0.01 * i, *group["betas"][1:])
        if group.get("momentum"):
            group["momentum"] = 0.95 - 0.01 * i
        group["weight_decay"] = 0.01 * (i + 1)


@pytest.mark.parametrize("name", [name for name in FAMILY if "32bit" not in name])
def test_no_recompile_when_momentum_and_weight_decay_change(name: str) -> None:
    losses, tensors, _ = train(name, 6, None, schedule_momentum)
    compiled_losses, compiled_tensors, step = train(name, 6, "eager", schedule_momentum)
    assert compiled_losses == losses
    assert_same(compiled_tensors, tensors)
    assert step.graph_count == 1


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD8bit"])
def test_one_cycle_moves_lr_and_momentum_in_one_graph(name: str) -> None:
    def run(compiled: bool):
        model = make_model()
        optimizer = getattr(optim, name)(model.parameters(), **FAMILY[name])
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=30)
        step = usual_step(model, optimizer)
        if compiled:
            step = bnbops.compiled_train_step(step, optimizer, backend="eager")
        seen = []
        for batch in batches(20):
            step(*batch)
            scheduler.step()
            group = optimizer.param_groups[0]
            seen.append((float(group["lr"]), group["betas"][0] if "betas" in group else group["momentum"]))
        assert len({lr for lr, _ in seen}) == len({momentum for _, momentum in seen}) == 20
        return snapshot(model, optimizer), step

    expected, _ = run(compiled=False)
    actual, step = run(compiled=True)
    assert_same(actual, expected)
    assert step.graph_count == 1
