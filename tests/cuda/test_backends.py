"""cases/backends.py: an operator of another device sees what the caller's tensors are, and what it writes comes back. A
copy on the CPU stands in for the other device."""

import pytest
import torch
from torch import Tensor

from bnbops.functional import create_dynamic_map
from bnbops.testing.samples import SAMPLED, operator, samples
from cases import backends
from ops.test_fakes import described

WITH_TENSORS = [name for name in SAMPLED if "Tensor" in str(operator(name)._schema)]


def bits(values: object) -> object:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.detach().contiguous().view(-1).view(torch.uint8).tolist(), values
    )


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_the_detour_changes_nothing(name):
    """Results, what is written, shapes and strides, for every layout that the samples have."""
    for sample in samples(name):
        direct, detour = sample.map(Tensor.detach).clone(), sample.map(Tensor.detach).clone()
        expected = direct.run(operator(name))
        actual = detour.run(backends.through(operator(name), "cpu"))
        assert described(actual) == described(expected), sample.name
        assert bits([actual, detour.args, detour.kwargs]) == bits([expected, direct.args, direct.kwargs]), sample.name


def test_writes_go_to_a_copy_first():
    """So that a kernel's results are those of the device, not of the memory here."""
    seen = []

    def op(x: Tensor) -> Tensor:
        seen.append(x)
        return x.add_(1)

    x = torch.zeros(3)
    result = backends.through(op, "cpu")(x)
    assert torch.equal(x, torch.ones(3)) and torch.equal(result, x)
    assert seen[0].data_ptr() != x.data_ptr()


def test_shared_memory_stays_shared():
    codes, code = torch.zeros(100, dtype=torch.uint8), create_dynamic_map()
    memory = torch.zeros(400, dtype=torch.uint8)
    op = backends.through(torch.ops.bnbops.dequantize_blockwise.out, "cpu")
    with pytest.raises(RuntimeError, match="share memory"):
        op(memory[:100], torch.ones(2), code, 64, torch.float32, out=memory.view(torch.float32))
    op(codes, torch.ones(2), code, 64, torch.float32, out=memory.view(torch.float32))


def test_a_write_beside_a_tensor_comes_back(guard):
    """The memory around a tensor travels with it."""
    x = guard(torch.zeros(8))

    def careless(x: Tensor) -> None:
        x.as_strided((9,), (1,), x.storage_offset()).fill_(1)

    backends.through(careless, "cpu")(x)
    beside = x.as_strided((1,), (1,), x.storage_offset() + 8)
    assert beside.item() == 1
    beside.view(torch.uint8).fill_(0xA5)


def test_what_is_not_on_the_cpu_stays_where_it_is():
    x, options = torch.empty(3, device="meta"), torch.zeros(2)
    seen = []
    backends.through(lambda x, y, options: seen.extend([x, y, options]), "cpu")(x, torch.ones(2), options=options)
    assert seen[0] is x and seen[2] is options and seen[1].device.type == "cpu"


def test_without_a_gpu_its_backend_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="no GPU"), backends.use("cuda"):
        raise AssertionError
