"""What only a GPU can show: CUDA graphs, streams, several devices, paging, NVIDIA's checkers.

Without a GPU everything here is skipped; `make test-gpu` runs it together with the tests that run on any kernels
(test_on_cuda.py has what the simulator can show, too).
"""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import bnbops as bnb
from bnbops.functional import create_dynamic_map
from bnbops.optim.paging.unified import UnifiedMemory
from cases.optimizer_classes import CLASSES, build
from cases.optimizers import assert_same, assert_same_state, params, train
from gpu_bundle import sanitizer

pytestmark = pytest.mark.usefixtures("gpu")

# ---- CUDA graphs -----------------------------------------------------------------------------------------------


class Training:
    """A train step over a 4-bit layer and layers that are trained, with a learning rate on the device."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(64, 256), bnb.nn.LinearNF4(256, 128), nn.GELU(), nn.Linear(128, 8)]
        self.model = nn.Sequential(*layers).to("cuda")
        self.lr = torch.tensor(1e-2, device="cuda")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = bnb.optim.AdamW8bit(trained, lr=self.lr, min_8bit_size=1024)
        self.x, self.y = torch.randn(32, 64, device="cuda"), torch.randint(8, (32,), device="cuda")

    def step(self) -> Tensor:
        loss = cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def steps(self) -> set[float]:
        return {state["step"].item() for state in self.optimizer.state.values()}

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph of the step, after three eager ones on a stream of their own, as torch's documentation asks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph


def test_a_captured_train_step_trains():
    eager, captured = Training(), Training()
    graph = captured.capture()
    for _ in range(5):
        graph.replay()
    losses = [eager.step().item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert captured.steps() == eager.steps() == {8.0}
    for a, b in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_captured_step_reads_the_learning_rate_when_it_runs():
    training = Training()
    graph = training.capture()
    before = copy.deepcopy(training.model.state_dict())
    training.lr.fill_(0.0)
    graph.replay()
    assert all(torch.equal(a, before[name]) for name, a in training.model.state_dict().items())
    training.lr.fill_(1e-2)
    graph.replay()
    assert not torch.equal(training.model[0].weight, before["0.weight"])


def test_a_captured_step_skips_overflows():
    param = nn.Parameter(torch.ones(64, 64, device="cuda"))
    optimizer = bnb.optim.AdamW8bit([param], lr=1e-2)
    optimizer.init_state()
    param.grad, optimizer.grad_scale = torch.ones_like(param), torch.ones(1, device="cuda")
    optimizer.found_inf = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert torch.equal(param, torch.ones_like(param)) and optimizer.state[param]["step"].item() == 0
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    assert (param < 1).all() and optimizer.state[param]["step"].item() == 1


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc), which Triton builds launchers with")
def test_a_train_step_that_inductor_compiled_trains():
    """With the kernels that it makes between those of bnbops."""
    eager, compiled = Training(), Training()
    try:
        step = bnb.compiled_train_step(compiled.step, compiled.optimizer)
    except NotImplementedError as error:
        pytest.skip(str(error))
    losses = [(step().item(), eager.step().item()) for _ in range(4)]
    assert losses[-1] < losses[0]
    for a, b in losses:
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert compiled.steps() == eager.steps() == {4.0}


# ---- streams and devices ---------------------------------------------------------------------------------------


def test_kernels_run_on_the_current_stream():
    """Behind what that stream still has to do."""
    x, code = torch.ones(1 << 20, device="cuda"), create_dynamic_map().cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles
        x.fill_(2.0)
        _, absmax = torch.ops.bnbops.quantize_blockwise(x, code, 256)
    stream.synchronize()
    assert torch.equal(absmax, torch.full_like(absmax, 2.0))


def test_steps_do_not_wait_for_the_device():
    """A step returns while the stream is still at work on something else."""
    training = Training()
    training.step()
    params = training.optimizer.param_groups[0]["params"]
    for param in params:
        param.grad = torch.ones_like(param)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    training.optimizer.step()
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_another_device_may_be_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    x, code = torch.randn(1000), create_dynamic_map()
    expected = torch.ops.bnbops.quantize_blockwise(x, code, 64)
    with torch.cuda.device(0):
        actual = torch.ops.bnbops.quantize_blockwise(x.to("cuda:1"), code.to("cuda:1"), 64)
        assert torch.cuda.current_device() == 0
    for a, b in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda:1") and torch.equal(a.cpu(), b)


# ---- paged optimizers ------------------------------------------------------------------------------------------

SHAPES = [(1024, 512), (64, 80), (130,), (3, 40, 40)]
PAGED = [name for name in CLASSES if name.startswith("Paged")]


def is_managed(tensor: Tensor) -> bool:
    """Whether the driver says so."""
    managed, is_managed_attribute = ctypes.c_uint(), 8  # CU_POINTER_ATTRIBUTE_IS_MANAGED
    pointer = ctypes.c_uint64(tensor.data_ptr())
    cuda = ctypes.CDLL("libcuda.so.1")
    assert cuda.cuPointerGetAttribute(ctypes.byref(managed), is_managed_attribute, pointer) == 0
    return bool(managed.value)


def unpaged(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of states that are in ordinary memory."""
    assert len(optimizer.state) == len(SHAPES)
    return {key for state in optimizer.state.values() for key, x in state.items() if not is_managed(x)}


def on_gpu(device: str = "cuda") -> list[nn.Parameter]:
    return [nn.Parameter(x.to(device)) for x in params(*SHAPES)]


@pytest.mark.parametrize("name", PAGED)
def test_paged_optimizers_train_as_the_others(name):
    p, q = on_gpu(), on_gpu()
    paged, plain = build(name, p), build(name.removeprefix("Paged"), q)
    train(p, paged, range(3))
    train(q, plain, range(3))
    assert_same(p, q)
    assert_same_state(paged, plain)
    assert unpaged(paged) == {"step"}
    assert unpaged(plain) == {key for state in plain.state.values() for key in state}


def reloaded(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> tuple:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer, params


COPIES = {
    "load_state_dict": reloaded,
    "deepcopy": lambda *pair: copy.deepcopy(pair),
    "pickle": lambda *pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_paged_states_are_paged(how):
    p, q = on_gpu(), on_gpu()
    paged, plain = bnb.optim.PagedAdamW8bit(p), bnb.optim.AdamW8bit(q)
    train(p, paged, range(2))
    train(q, plain, range(2))
    paged, p = COPIES[how](paged, p)
    assert unpaged(paged) == {"step"}
    train(p, paged, range(2, 4))
    train(q, plain, range(2, 4))
    assert_same(p, q)
    assert_same_state(paged, plain)


def test_paged_states_give_their_memory_back():
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    memory = UnifiedMemory(torch.device("cuda", 0))
    x = memory.zeros((2**25,), torch.uint8)
    assert torch.cuda.memory_reserved() >= before + 2**25 and is_managed(x)
    del x, memory
    assert torch.cuda.memory_reserved() == before
    memory = UnifiedMemory(torch.device("cuda", 0))
    x = memory.zeros((2**25,), torch.uint8)
    del memory
    assert not x.any()  # which outlives its pool
    del x
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


def test_no_room_for_paged_states():
    memory = UnifiedMemory(torch.device("cuda", 0))
    with pytest.raises(torch.OutOfMemoryError, match="no room for a paged optimizer state of"):
        memory.zeros((2**50,), torch.uint8)
    x = torch.ones(1000, device="cuda")
    torch.ops.bnbops.squared_norms([x])
    assert not memory.zeros((1000,), torch.uint8).any()


def test_a_captured_step_with_paged_states():
    param = nn.Parameter(torch.ones(256, 256, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = bnb.optim.PagedAdamW8bit([param], lr=1e-2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"call optimizer\.init_state\(\) before"), torch.cuda.graph(graph):
        optimizer.init_state()
    optimizer.init_state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    assert (param < 1).all() and optimizer.state[param]["step"].item() == 1


def test_paged_states_on_another_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    p, q = on_gpu("cuda:1"), on_gpu("cuda:1")
    paged, plain = bnb.optim.PagedAdamW8bit(p), bnb.optim.AdamW8bit(q)
    train(p, paged, range(2))
    train(q, plain, range(2))
    assert_same(p, q)
    assert_same_state(paged, plain)
    assert {x.device for state in paged.state.values() for x in state.values()} == {torch.device("cuda:1")}


# ---- checkers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_compute_sanitizer_finds_nothing(tool, tmp_path: Path):
    """In the self-check of every operator."""
    program = sanitizer.find()
    if program is None:
        pytest.skip("compute-sanitizer (of the CUDA toolkit) is not installed")
    sanitizer.watch(program, tool, [sys.executable, "-m", "bnbops"], tmp_path)
