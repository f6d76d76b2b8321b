"""Parameters, gradients and comparisons for the tests of the optimizer classes."""

import torch
from torch import Tensor, nn


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * 0.1).to(p)


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients that depend on the step's number only."""
    for step in steps:
        set_grads(parameters, step)
        optimizer.step()


MIXED = [(64, 80), (5, 7), (130,), (3, 40, 40)]  # 8-bit, small, one dimension, 8-bit with awkward rows


def flat_state(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Every state tensor, by parameter number and name."""
    states = optimizer.state_dict()["state"]
    return {(i, name): tensor for i, state in states.items() for name, tensor in state.items()}


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    a_state, b_state = flat_state(a), flat_state(b)
    assert a_state.keys() == b_state.keys()
    for key in a_state:
        assert torch.equal(a_state[key], b_state[key]) and a_state[key].dtype == b_state[key].dtype, key


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
