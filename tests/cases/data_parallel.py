"""A model, batches and train steps for the tests of data_parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, gelu

import bnbops
from bnbops.distributed import data_parallel
from cases.sharded import whole

WIDTH, LABELS = 256, 5


class Block(nn.Module):
    """Rows for uneven and empty shards: on 4 ranks, 9 are 3, 3, 3, 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into = nn.Linear(WIDTH, 9)
        self.out = nn.Linear(9, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(gelu(self.into(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mesh_of(mode: str = "fully_shard") -> DeviceMesh:
    ranks = dist.get_world_size()
    if mode == "hybrid_shard":
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (ranks,))


def batch(step: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Of this rank, or of another."""
    generator = torch.Generator().manual_seed(100 * step + (dist.get_rank() if rank is None else rank))
    return torch.randn(8, WIDTH, generator=generator), torch.randint(LABELS, (8,), generator=generator)


def fsdp2(model: Net, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> Net:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    return fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())


def parallel(mode: str, **options: Any) -> Net:
    return data_parallel(Net(), mesh_of(mode), mode, **options)


def optimizer_of(model: nn.Module, cls: type = bnbops.optim.AdamW8bit, **options: Any) -> torch.optim.Optimizer:
    """With 8-bit states for every matrix."""
    return cls(model.parameters(), lr=1e-2, min_8bit_size=1024, **options)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(model(x).float(), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and every tensor of its state, whole."""
    named = {name.removeprefix("module."): param for name, param in model.named_parameters()}
    found = {name: whole(param) for name, param in named.items()}
    for name, param in named.items():
        found |= {f"{name}.{key}": whole(x) for key, x in optimizer.state.get(param, {}).items()}
    return found


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[..., Any], steps: int = 3
) -> tuple[list[Any], dict[str, Tensor]]:
    """What the steps returned, under a schedule of learning rates, and `tensors_of`."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    results = []
    for i in range(steps):
        results.append(step(*batch(i)))
        scheduler.step()
    return results, tensors_of(model, optimizer)


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [key for key, x in expected.items() if not torch.equal(actual[key], x)]
