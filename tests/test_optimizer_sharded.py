"""Sharded parameters (DTensors) on two processes: the steps of one process, with norms of whole parameters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from bnbops.optim.norms import whole_squared_norms
from optimizer_cases import flat_state, params, set_grads
from optimizer_classes import build

RANKS = 2
SHAPES = [(65, 80), (1, 4096), (130,), (7, 5)]  # unevenly sharded, with an empty shard, with 32-bit states, not sharded
PLACEMENTS = [Shard(0), Shard(0), Shard(0), None]
OPTIMIZERS = {
    "AdamW8bit": {"percentile_clipping": 50},
    "LAMB8bit": {"weight_decay": 0.1, "percentile_clipping": 50},
    "LAMB32bit": {},
    "LARS8bit": {"weight_decay": 0.1},
    "Adagrad8bit": {"initial_accumulator_value": 0.5},
    "PagedLion8bit": {},
    "RMSprop8bit": {"momentum": 0.9},
}


def sharded(x: Tensor, placement: Shard | None, mesh: DeviceMesh) -> Tensor:
    return x if placement is None else distribute_tensor(x, mesh, [placement])


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(name: str, mesh: DeviceMesh | None) -> dict[object, Tensor]:
    """Parameters and states after three steps, whole; sharded over a mesh or not."""
    full = params(*SHAPES)
    placements = PLACEMENTS if mesh else [None] * len(SHAPES)
    p = [nn.Parameter(sharded(x.detach(), place, mesh)) for x, place in zip(full, placements, strict=True)]
    optimizer = build(name, p, lr=1e-2, **OPTIMIZERS[name])
    for step in range(3):
        set_grads(full, step)
        for x, y, place in zip(p, full, placements, strict=True):
            x.grad = sharded(y.grad * (30 if step == 1 else 1), place, mesh)
        optimizer.step()
    tensors = {i: whole(x.detach()) for i, x in enumerate(p)}
    return tensors | {key: whole(x) for key, x in flat_state(optimizer).items()}


def every_optimizer(mesh: DeviceMesh) -> None:
    for name in OPTIMIZERS:
        expected, actual = trained(name, None), trained(name, mesh)
        assert actual.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(actual[key], expected[key])] == [], name


def norms(mesh: DeviceMesh) -> None:
    rank = dist.get_rank()
    x = torch.arange(12.0).view(4, 3)
    placed = [x, distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x, mesh, [Replicate()])]
    placed += [distribute_tensor(x[:1], mesh, [Shard(0)])]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in placed]
    squares = torch.stack([part.double().square().sum() for part in local])
    assert squares[1] != squares[0] and (squares[3] == 0) == (rank == 1)
    expected = torch.stack([y.double().square().sum() for y in (x, x, x, x[:1])])
    assert torch.equal(whole_squared_norms(squares, placed), expected)
    both = whole_squared_norms(torch.stack([squares, 2 * squares]), placed)
    assert torch.equal(both, torch.stack([expected, 2 * expected]))
    plain = squares[:1]
    assert whole_squared_norms(plain, placed[:1]) is plain
    assert torch.equal(whole_squared_norms(squares[1:2], placed[1:2]), expected[1:2])
    partial = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    with pytest.raises(RuntimeError, match="partial sum"):
        whole_squared_norms(squares[:1], [partial])


def hybrid(_mesh: DeviceMesh) -> None:
    """Replicated over one dimension of a mesh and sharded over the other: only the latter adds up."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicate", "shard"))
    x = torch.arange(12.0).view(4, 3)
    placed = distribute_tensor(x, mesh, [Replicate(), Shard(0)])
    squares = placed.to_local().double().square().sum().view(1)
    assert torch.equal(whole_squared_norms(squares, [placed]), x.double().square().sum().view(1))


def compiled(mesh: DeviceMesh) -> None:
    """The norms' collectives are part of the one graph."""
    results = []
    for backend in (None, "aot_eager"):
        full = params(*SHAPES)
        p = [nn.Parameter(sharded(x.detach(), place, mesh)) for x, place in zip(full, PLACEMENTS, strict=True)]
        optimizer = build("LAMB8bit", p, lr=1e-2, percentile_clipping=50)
        optimizer.init_state()

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            type(optimizer).step(optimizer)

        call = torch.compile(step, fullgraph=True, backend=backend) if backend else step
        for seed in range(3):
            set_grads(full, seed)
            for x, y, place in zip(p, full, PLACEMENTS, strict=True):
                x.grad = sharded(y.grad, place, mesh)
            call()
        results.append([whole(x.detach()) for x in p])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def process(rank: int, file: Path, checks: list[Callable[[DeviceMesh], None]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    try:
        for check in checks:
            check(init_device_mesh("cpu", (RANKS,)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("checks", [[norms, hybrid, every_optimizer], [compiled]], ids=["eager", "compiled"])
def test_on_two_processes(checks, tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path / "store", checks), nprocs=RANKS)
