"""Paged states of CUDA parameters, as far as no GPU is needed: the library's functions in the simulator, what is asked
of torch, and which states are asked for. tests/cuda_link and tests/cuda/test_gpu.py go on."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bnbops import _library
from bnbops.optim import AdamW8bit, PagedAdamW8bit
from bnbops.optim.paging import memory as paging
from bnbops.optim.paging import unified
from bnbops.optim.paging.unified import UnifiedMemory
from cases import backends
from cases.paged import RecordedMemory
from cuda_on_cpu import library

HERE = torch.device("cpu", 0)  # plays a CUDA device

# ---- the library's functions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated() -> ctypes.CDLL:
    functions = ctypes.CDLL(str(library.build(os.environ.get(backends.SANITIZER))))
    functions.bnbops_managed_alloc.restype = ctypes.c_void_p
    functions.bnbops_managed_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    functions.bnbops_managed_free.restype = None
    functions.bnbops_managed_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return functions


def assert_kernels_launch() -> None:
    """No earlier failure is taken for theirs."""
    assert backends.simulated()["squared_norms"]([torch.full((2,), 3.0)]).item() == 18


@pytest.mark.parametrize("size", [1, 255, 2**21, 20 * 2**20])
def test_memory(size, simulated):
    memory = [simulated.bnbops_managed_alloc(size, 0, None) for _ in range(2)]
    assert all(memory) and abs(memory[0] - memory[1]) >= size
    assert [address % 256 for address in memory] == [0, 0]
    for address, byte in zip(memory, (1, 2), strict=True):
        ctypes.memset(address, byte, size)
    assert ctypes.string_at(memory[0], size) == b"\1" * size
    for address in memory:
        simulated.bnbops_managed_free(address, size, 0, None)


@pytest.mark.parametrize("size", [0, 2**62])
def test_no_memory(size, simulated):
    assert simulated.bnbops_managed_alloc(size, 0, None) is None
    simulated.bnbops_managed_free(None, size, 0, None)
    assert_kernels_launch()


def test_support(simulated):
    assert [simulated.bnbops_managed_support(device) for device in (0, 1, -1)] == [2, 0, 0]
    assert_kernels_launch()


# ---- what is asked of torch ------------------------------------------------------------------------------------


class Torch:
    """What a torch with CUDA does about pools, with a device that supports paging, or not, or only half."""

    def __init__(self, patch: Callable[..., None], support: int = 2) -> None:
        self.active: list[object] = []
        self.room, self.capturing = True, False
        zeros = torch.zeros

        def allocate(*args, **kwargs) -> Tensor:
            if self.active and not self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.pool_of_last = self.active[-1:]
            return zeros(*args, **kwargs)

        @contextmanager
        def use_mem_pool(pool: object, device: torch.device) -> Iterator[None]:
            self.active.append((pool, device))
            try:
                yield
            finally:
                self.active.pop()

        @contextmanager
        def device(device: torch.device) -> Iterator[None]:
            self.current = device
            yield
            self.current = None

        def pool(allocator: object) -> object:
            return SimpleNamespace(allocator=allocator, device=self.current)

        patch(torch, "zeros", allocate)
        patch(torch.cuda, "use_mem_pool", use_mem_pool)
        patch(torch.cuda, "device", device)
        patch(torch.cuda, "MemPool", pool)
        patch(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch(unified, "_allocator", lambda path: SimpleNamespace(allocator=lambda: f"allocator of {path}"))
        patch(_library, "_cuda", backends.library.ROOT / "libbnbops_cuda.so")
        patch(unified.ctypes, "CDLL", lambda _: SimpleNamespace(bnbops_managed_support=lambda _: support))


def test_tensors_come_from_the_pool(monkeypatch):
    cuda = Torch(monkeypatch.setattr)
    memory, other = UnifiedMemory(HERE), UnifiedMemory(HERE)
    for dtype in (torch.uint8, torch.float32):
        x = memory.zeros((3, 5), dtype)
        assert torch.equal(x, torch.zeros((3, 5), dtype=dtype)) and x.dtype == dtype and x.is_contiguous()
    x = memory.zeros((3,), torch.float32)
    [(pool, device)] = cuda.pool_of_last
    assert pool.allocator == f"allocator of {_library.cuda_library()}" and pool.device == device == HERE
    other.zeros((3,), torch.float32)
    [(other_pool, _)] = cuda.pool_of_last
    assert other_pool is not pool and cuda.active == []


def test_no_room_is_said(monkeypatch):
    cuda = Torch(monkeypatch.setattr)
    memory = UnifiedMemory(HERE)
    cuda.room = False
    said = "no room for a paged optimizer state of 4,096 bytes in the unified memory of cpu:0"
    with pytest.raises(torch.OutOfMemoryError, match=said) as raised:
        memory.zeros((4, 256), torch.float32)
    assert str(raised.value.__cause__) == "CUDA out of memory" and cuda.active == []
    cuda.room = True
    assert memory.zeros((4, 256), torch.float32).shape == (4, 256)


def test_no_states_are_made_in_a_captured_graph(monkeypatch):
    cuda = Torch(monkeypatch.setattr)
    memory = UnifiedMemory(HERE)
    cuda.capturing = True
    with pytest.raises(RuntimeError, match=r"call optimizer\.init_state\(\) before"):
        memory.zeros((3,), torch.float32)


def test_devices_that_do_not_page(monkeypatch):
    Torch(monkeypatch.setattr, support=0)
    with pytest.raises(ValueError, match="needs unified memory, which cpu:0 does not have; use is_paged=False"):
        UnifiedMemory(HERE)
    Torch(monkeypatch.setattr, support=1)
    with pytest.warns(UserWarning, match="paged optimizer states on cpu:0 stay in the GPU's memory"):
        UnifiedMemory(HERE)


def test_kernels_are_needed(monkeypatch):
    why = "bnbops was built without CUDA kernels: install nvcc"
    monkeypatch.setattr(_library, "_cuda", why)
    with pytest.raises(NotImplementedError, match=f"bnbops has no CUDA kernels here: {why}"):
        UnifiedMemory(HERE)


# ---- which states are there ------------------------------------------------------------------------------------


def test_states_lie_on_the_device_of_their_parameter(monkeypatch, tmp_path):
    """Of paged groups alone, and no file is looked for."""
    monkeypatch.setattr(paging, "UnifiedMemory", RecordedMemory)
    with FakeTensorMode():
        p = [nn.Parameter(torch.empty(64, 256, device=f"cuda:{i}")) for i in (0, 1, 0, 0)]
        groups = [{"params": [x], "is_paged": i < 3} for i, x in enumerate(p)]
        optimizer = AdamW8bit(groups, percentile_clipping=5, paged_directory=tmp_path / "missing")
        optimizer.init_state()
        memory = optimizer._memory._unified
        assert {str(device) for device in memory} == {"cuda:0", "cuda:1"}
        for i, x in enumerate(p):
            state = optimizer.state[x]
            paged = {key for key, tensor in state.items() if memory[x.device].gave(tensor)}
            assert paged == (state.keys() - {"step", "gnorm_vec"} if i < 3 else set())
            assert {tensor.device for tensor in state.values()} == {x.device}


def test_a_paged_class_on_a_build_without_kernels(monkeypatch):
    monkeypatch.setattr(_library, "_cuda", "bnbops was built without CUDA kernels")
    with FakeTensorMode():
        optimizer = PagedAdamW8bit([nn.Parameter(torch.empty(64, 256, device="cuda"))])
        with pytest.raises(NotImplementedError, match="bnbops was built without CUDA kernels"):
            optimizer.init_state()
