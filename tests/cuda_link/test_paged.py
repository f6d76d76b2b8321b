"""Paged optimizers without a GPU: torch takes the library's functions, which fail in peace, and the states of fake CUDA
parameters are in paged memory wherever they come from."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bnbops
from bnbops._library import cuda_library
from bnbops.optim.paging import memory as paging
from bnbops.optim.paging import unified
from cases.optimizer_classes import CLASSES, build
from cases.paged import RecordedMemory

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/cuda/test_gpu.py")


def test_torch_takes_the_functions():
    assert cuda_library() == bnbops.library_path().with_name("libbnbops_cuda.so")
    allocator = unified._allocator(str(cuda_library()))
    assert isinstance(allocator.allocator(), torch._C._cuda_CUDAAllocator)
    assert unified._allocator(str(cuda_library())) is allocator


@NO_GPU
def test_functions_without_a_gpu():
    library = ctypes.CDLL(str(cuda_library()))
    library.bnbops_managed_alloc.restype = ctypes.c_void_p
    assert library.bnbops_managed_support(0) == 0
    assert library.bnbops_managed_alloc(ctypes.c_size_t(1024), 0, None) is None
    library.bnbops_managed_free(None, ctypes.c_size_t(1024), 0, None)


@NO_GPU
def test_no_unified_memory_without_a_gpu():
    with pytest.raises(ValueError, match="needs unified memory, which cuda:0 does not have"):
        unified.UnifiedMemory(torch.device("cuda", 0))


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("Paged")])
def test_states_stay_in_paged_memory(name, monkeypatch):
    monkeypatch.setattr(paging, "UnifiedMemory", RecordedMemory)

    def assert_paged(optimizer: torch.optim.Optimizer) -> RecordedMemory:
        [memory] = optimizer._memory._unified.values()
        for state in optimizer.state.values():
            assert {key for key, tensor in state.items() if memory.gave(tensor)} == state.keys() - {"step"}
        return memory

    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in [(64, 300), (64,), (3, 16, 64)]]
        optimizer = build(name, params)
        for _ in range(2):
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.step()
        assert len(optimizer.state) == 3
        first = assert_paged(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        assert assert_paged(optimizer) is not first  # whose memory is free as soon as it is gone
        other = build(name.removeprefix("Paged"), params)
        other.load_state_dict(optimizer.state_dict())
        assert other._memory._unified == {}
        optimizer.load_state_dict(other.state_dict())
        assert_paged(optimizer)
        optimizer.step()
