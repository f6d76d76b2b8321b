"""embedding_4bit: rows of a quantized table are the rows of the dequantized one, bit for bit."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bnbops.functional as F
from cases import backends
from cases.quantize_4bit import types
from reference import quantize_4bit as ref

pytestmark = backends.on_every_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
embedding = torch.ops.bnbops.embedding_4bit
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def table(rows: int, dim: int, blocksize: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows + dim))
    return ref.quantize(values, blocksize, quant_type)


@dtypes
@types
@pytest.mark.parametrize("dim", [1, 2, 31, 32, 33, 63, 64, 65, 96, 128, 200, 777])
def test_rows_are_the_dequantized_ones(dim, quant_type, dtype, guard):
    """Rows begin within blocks, and, if odd, within bytes; every row, the last one at the table's end."""
    for blocksize in (32, 64, 256):
        packed, absmax = table(9, dim, blocksize, quant_type)
        expected = ref.dequantize(packed, absmax, blocksize, quant_type, [9, dim], dtype)
        indices = torch.tensor([8, 0, 3, 3, 1, 7, 2, 4, 5, 6])
        for i in (indices, indices.int(), indices.view(2, 5).t(), indices[4], indices[:0], indices.expand(3, 10)):
            rows = embedding(i, guard(packed), guard(absmax), [9, dim], blocksize, quant_type, dtype)
            assert rows.shape == (*i.shape, dim) and rows.is_contiguous() and rows.dtype == dtype
            assert torch.equal(rows, expected[i.long()])


def test_nested_scales():
    packed, absmax = table(100, 65)
    codes, state = F.quantize_blockwise(absmax - absmax.mean(), blocksize=16)
    nested = {"nested_absmax": state.absmax, "nested_code": state.code, "nested_offset": absmax.mean()}
    indices = torch.arange(99, -1, -7)
    rows = embedding(indices, packed, codes, [100, 65], 64, "nf4", torch.float32, **nested, nested_blocksize=16)
    values = ref.dequantize(packed, codes, 64, "nf4", [100, 65], **nested, nested_blocksize=16)
    assert torch.equal(rows, values[indices])


@backends.on_cpu
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    packed, absmax = table(300, 513)
    indices = torch.randint(300, (1000,), generator=torch.Generator().manual_seed(0))
    one = embedding(indices, packed, absmax, [300, 513], 64, "nf4", torch.bfloat16)
    torch.set_num_threads(threads)
    assert torch.equal(one, embedding(indices, packed, absmax, [300, 513], 64, "nf4", torch.bfloat16))


@backends.on_cpu
@pytest.mark.parametrize("index", [9, -1, 1 << 40, -(1 << 62)])
def test_indices_out_of_range_are_refused(index):
    packed, absmax = table(9, 64)
    with pytest.raises(RuntimeError, match=rf"embedding_4bit: index {index} at position 2 is out of range; .* 9 rows"):
        embedding(torch.tensor([0, 8, index]), packed, absmax, [9, 64], 64, "nf4", torch.float32)


def test_a_table_without_rows():
    empty, absmax = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
    rows = embedding(torch.empty(2, 0, dtype=torch.long), empty, absmax, [0, 64], 64, "nf4", torch.float32)
    assert rows.shape == (2, 0, 64)
    assert embedding(torch.zeros(3, dtype=torch.long), empty, absmax, [9, 0], 64, "nf4", torch.float32).shape == (3, 0)


@backends.on_cpu
def test_a_table_without_rows_has_no_row_0():
    empty, absmax = torch.empty(0, 1, dtype=torch.uint8), torch.empty(0)
    with pytest.raises(RuntimeError, match="index 0 at position 0 is out of range; the table has 0 rows"):
        embedding(torch.zeros(1, dtype=torch.long), empty, absmax, [0, 64], 64, "nf4", torch.float32)


BAD = {
    "float indices": (torch.zeros(2), [9, 64], "indices must be int32 or int64, got float32"),
    "byte indices": (torch.zeros(2, dtype=torch.uint8), [9, 64], "indices must be int32 or int64, got uint8"),
    "a vector's shape": (torch.tensor([0]), [576], "shape must have 2 dimensions, got .576."),
    "another shape": (torch.tensor([0]), [9, 65], r"weight has 288 bytes, but shape .9, 65. needs 293"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_refused(case):
    indices, shape, match = BAD[case]
    packed, absmax = table(9, 64)
    with pytest.raises(RuntimeError, match=f"bnbops::embedding_4bit: {match}"):
        embedding(indices, packed, absmax, shape, 64, "nf4", torch.float32)


def test_rows_are_not_differentiable():
    packed, absmax = table(9, 64)
    rows = embedding(torch.tensor([1]), packed, absmax.requires_grad_(), [9, 64], 64, "nf4", torch.float32)
    assert not rows.requires_grad
    with pytest.raises(RuntimeError, match="vmap is not supported; indices may have any number of dimensions"):
        torch.vmap(lambda i: embedding(i, packed, absmax, [9, 64], 64, "nf4", torch.float32))(torch.tensor([1, 2]))


def test_one_graph_for_any_number_of_indices():
    packed, absmax = table(9, 64)
    counter = CompileCounterWithBackend("aot_eager")

    def rows(indices: Tensor) -> Tensor:
        return embedding(indices, packed, absmax, [9, 64], 64, "nf4", torch.float32)

    torch._dynamo.reset()
    compiled = torch.compile(rows, backend=counter, fullgraph=True, dynamic=True)
    for shape in [(2, 3), (5, 4), (70, 2)]:
        indices = torch.randint(9, shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(compiled(indices), rows(indices))
    assert counter.frame_count == 1


def test_fakes_hold_no_data():
    with FakeTensorMode():
        packed, absmax = torch.empty(1 << 39, dtype=torch.uint8), torch.empty(1 << 28)
        indices = torch.zeros(4, 5, dtype=torch.long)
        rows = embedding(indices, packed, absmax, [1 << 30, 1 << 10], 4096, "nf4", torch.bfloat16)
        assert rows.shape == (4, 5, 1 << 10)
