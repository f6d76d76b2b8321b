"""Models, train steps and comparisons that the tests of compiled_train_step share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bnbops.optim import AdamW8bit

Step = Callable[..., object]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 100), nn.GELU(), nn.Linear(100, 8)).to(dtype)


def make(**options: object) -> tuple[nn.Module, AdamW8bit]:
    """A model with 8-bit states (the first weight) and 32-bit states (the rest)."""
    model = make_model()
    return model, AdamW8bit(model.parameters(), lr=1e-2, **options)


def batches(n: int, rows: int = 16, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 48, generator=generator).to(dtype), torch.randint(8, (rows,), generator=generator))
        for _ in range(n)
    ]


def usual_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a train step may change: parameters, gradients, optimizer state, learning rates."""
    tensors = {f"param {name}": p for name, p in model.named_parameters()}
    tensors |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    for k, optimizer in enumerate(optimizers):
        for i, state in enumerate(optimizer.state.values()):
            tensors |= {f"optimizer {k} state {i} {name}": value for name, value in state.items()}
        for i, group in enumerate(optimizer.param_groups):
            tensors[f"optimizer {k} lr {i}"] = torch.tensor(float(group["lr"]), dtype=torch.float64)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
