"""Models, gradients and comparisons for the tests on several ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cases.codecs import as_bytes

MIN_8BIT = 512  # elements; every matrix of `model()` has them, but not every shard


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Rows for uneven and empty shards: on 4 ranks, 10 are 3, 3, 3, 1; 5 are 2, 2, 1, 0; and 3 are 1, 1, 1, 0."""
    torch.manual_seed(seed)
    layers = [nn.Linear(300, 10), nn.GELU(), nn.Linear(10, 300), nn.LayerNorm(300), nn.Linear(300, 5)]
    return nn.Sequential(*layers, nn.Linear(5, 300), nn.GELU(), nn.Linear(300, 3)).to(dtype)


def sharded(module: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """`module` with each child, and what is left, under FSDP2."""
    for child in module.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def whole(x: Tensor) -> Tensor:
    """All of a tensor, without its graph."""
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def placed_as(x: Tensor, param: Tensor) -> Tensor:
    """A tensor that every rank has all of, sharded as a parameter is."""
    if not isinstance(param, DTensor):
        return x
    return distribute_tensor(x, param.device_mesh, param.placements, src_data_rank=None)


def set_grads(params: Iterable[Tensor], step: int) -> None:
    """Gradients that depend on the step's number and the parameters' order and shapes only. Some are outliers."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * (30 if step == 1 else 0.1)
        param.grad = placed_as(grad.to(param.dtype), param)


def copies(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Whole parameters with the same values."""
    return [nn.Parameter(whole(param).clone()) for param in params]


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and every tensor of its state, by number and name."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = {f"{i}": param.detach() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        found |= {f"{i}.{name}": tensor for name, tensor in sorted(optimizer.state.get(param, {}).items())}
    return found


def assert_same_optimizers(actual: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """This rank's parts of parameters and states are those of tensors that `expected` has whole."""
    sharded_tensors, whole_tensors = tensors_of(actual), tensors_of(expected)
    assert sharded_tensors.keys() == whole_tensors.keys()
    for key, tensor in sharded_tensors.items():
        wanted = placed_as(whole_tensors[key], tensor)
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape, key
        part, wanted_part = (as_bytes(x.to_local() if isinstance(x, DTensor) else x) for x in (tensor, wanted))
        assert torch.equal(part, wanted_part), key
