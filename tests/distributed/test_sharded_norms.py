"""Squared norms of whole parameters from those of their parts."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from bnbops.optim.core.norms import whole_squared_norms
from cases.ranks import run_on_ranks


def parts(tensors: list[Tensor]) -> Tensor:
    """Squared norms of what this rank holds."""
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return torch.stack([part.double().square().sum() for part in local])


def norms() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = torch.arange(12.0).view(4, 3)
    placed = [x, distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x, mesh, [Replicate()])]
    placed += [distribute_tensor(x[:1], mesh, [Shard(0)]), distribute_tensor(x, mesh, [Shard(1)])]
    squares = parts(placed)
    assert squares[1] != squares[0] and (squares[3] == 0) == (dist.get_rank() == 1)
    expected = parts([x, x, x, x[:1], x])
    assert torch.equal(whole_squared_norms(squares, placed), expected)
    both = whole_squared_norms(torch.stack([squares, 2 * squares]), placed)
    assert torch.equal(both, torch.stack([expected, 2 * expected]))
    plain = squares[:1]
    assert whole_squared_norms(plain, placed[:1]) is plain
    assert torch.equal(whole_squared_norms(squares[1:2], placed[1:2]), expected[1:2])


def on_two_dimensions() -> None:
    """Only the dimensions of a mesh that a tensor is sharded over add up."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    x = torch.arange(12.0).view(4, 3)
    places = [[Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(1)], [Shard(0), Shard(0)]]
    placed = [distribute_tensor(x, square, place) for place in places] + [distribute_tensor(x, line, [Shard(0)])]
    assert torch.equal(whole_squared_norms(parts(placed), placed), parts([x] * len(placed)))


def test_two_ranks():
    run_on_ranks(2, norms)


def test_two_dimensions():
    run_on_ranks(4, on_two_dimensions)
