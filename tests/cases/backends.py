"""Runs test bodies on other kernels than the CPU's.

A backend stands in for the CPU kernels of `torch.ops.bnbops.*`: whatever a test calls, through classes, autograd or a
compiled graph, ends there. "cuda_on_cpu" are the CUDA kernels in the simulator; "cuda" are those on a GPU, to which the
arguments travel and from which the results come back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cuda_on_cpu import library

BACKENDS = ("cpu", "cuda_on_cpu", "cuda")
NO_GPU = "no GPU: there is no CUDA device, or this torch is without CUDA"
SANITIZER = "CUDA_ON_CPU_SANITIZER"  # environment variable: the build of the simulator to test with

on_every_backend = pytest.mark.usefixtures("backend")
# In such a file, a test of what only the CPU kernels have: threads, and errors about values.
on_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@cache
def simulated() -> dict[str, torch._ops.OpOverload]:
    """The operators that the simulator runs, by name."""
    return _with_kernel(library.load(os.environ.get(SANITIZER)), "CPU")


def on_gpu() -> dict[str, Callable[..., Any]]:
    """The operators that have CUDA kernels, for tensors on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return {name: through(op, "cuda") for name, op in _with_kernel(torch.ops.bnbops, "CUDA").items()}


def _with_kernel(namespace: torch._ops._OpNamespace, key: str) -> dict[str, torch._ops.OpOverload]:
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        library_name, _, name = schema.name.partition("::")
        if library_name != namespace.name.rpartition(".")[2]:
            continue
        qualified = f"{schema.name}.{schema.overload_name}".rstrip(".")
        if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            packet = getattr(namespace, name)
            found[f"{name}.{schema.overload_name}".rstrip(".")] = getattr(packet, schema.overload_name or "default")
    return found


def through(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """An operator of another device for tensors on the CPU. Whole storages travel, there and back: what shares memory,
    lies askew or has gaps does so on the device, and a write beside a tensor is seen here."""

    def call(*args: Any, options: Tensor | None = None, **kwargs: Any) -> Any:
        storages: dict[int, tuple[Tensor, Tensor]] = {}

        def there(x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                return x
            storage = x.untyped_storage()
            if storage._cdata not in storages:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                storages[storage._cdata] = here, here.to(device, copy=True)
            moved = storages[storage._cdata][1].untyped_storage()
            return torch.empty(0, dtype=x.dtype, device=device).set_(moved, x.storage_offset(), x.shape, x.stride())

        held = {} if options is None else {"options": options}  # which every device reads on the CPU
        args, kwargs = tree_map_only(Tensor, there, (args, kwargs))
        result = op(*args, **kwargs, **held)
        for here, moved in storages.values():
            here.copy_(moved)
        return tree_map_only(Tensor, Tensor.cpu, result)

    return call


@contextmanager
def replaced(kernels: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """`torch.ops.bnbops.*` run these instead of their CPU kernels."""
    with torch.library._scoped_library("bnbops", "IMPL") as lib:
        for name, kernel in kernels.items():
            lib.impl(name, _below_autograd(kernel), "CPU", allow_override=True)
        yield


def _below_autograd(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """As a kernel runs: the operator that it stands in for has dealt with gradients."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args, **kwargs)

    return call


@dataclass(frozen=True)
class OnCuda:
    """Where a test may put models and tensors to have them treated by CUDA kernels: on a GPU, or on the CPU while the
    simulator stands in for its kernels."""

    backend: str  # "cuda" or "cuda_on_cpu"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.backend == "cuda" else "cpu")

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Tensors of `device` get the CUDA kernels inside; outside, tensors on the CPU get the CPU's."""
        with replaced({} if self.backend == "cuda" else simulated()):
            yield


@contextmanager
def use(backend: str) -> Iterator[None]:
    """One of `BACKENDS` for what happens inside."""
    kernels = {"cpu": dict, "cuda_on_cpu": simulated, "cuda": on_gpu}[backend]()
    with replaced(kernels):
        yield
