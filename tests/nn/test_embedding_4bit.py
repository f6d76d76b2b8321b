"""bnbops.nn.Embedding4bit, EmbeddingNF4, EmbeddingFP4: what is theirs; the rest they share with Linear4bit."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import bnbops.functional as F
from bnbops.nn import Embedding4bit, EmbeddingFP4, EmbeddingNF4, Params4bit
from cases.layers_4bit import DIM, FLOATS, ROWS, STORAGES, copies, differing, embedding, linear, plain_tensors, raw
from cases.quantize_4bit import types

pytestmark = pytest.mark.every_torch

TOKENS = torch.tensor([[1, 5, 0], [ROWS - 1, 5, 2]])
nestings = pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])
dims = pytest.mark.parametrize("dim", [1, 33, DIM, 192])


def table(layer: Embedding4bit) -> Tensor:
    """The fp32 rows that the layer stands for."""
    state = layer.quant_state
    state.dtype = torch.float32
    return F.dequantize_4bit(layer.weight.data, state)


# ---- constructor -----------------------------------------------------------------------------------------------


def test_arguments_reach_the_weight():
    layer = Embedding4bit(10, 64, torch.float16, "nf4", torch.bfloat16, "meta", padding_idx=3, blocksize=32)
    weight = layer.weight
    assert weight.is_meta and weight.dtype == layer.dtype == torch.float16 and layer.padding_idx == 3
    found = (weight.compress_statistics, weight.quant_type, weight.quant_storage, weight.blocksize)
    assert found == (False, "nf4", torch.bfloat16, 32)
    assert isinstance(layer, nn.Embedding) and isinstance(weight, Params4bit) and not weight.requires_grad
    assert (EmbeddingNF4(4, 64).weight.quant_type, EmbeddingFP4(4, 64).weight.quant_type) == ("nf4", "fp4")
    assert EmbeddingNF4(4, 64, compress_statistics=True).weight.compress_statistics
    with pytest.raises(ValueError, match="quant_type"):
        Embedding4bit(4, 64, quant_type="int5")


# ---- looking up ------------------------------------------------------------------------------------------------


@dims
@nestings
@types
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_are_those_of_the_table(dtype, quant_type, nested, dim):
    """The bits of dequantizing all of it, in the dtype of the float weight."""
    layer = embedding(size=(ROWS, dim), dtype=dtype, quant_type=quant_type, compress_statistics=nested)
    rows = layer(TOKENS)
    assert rows.dtype == dtype and torch.equal(rows, table(layer)[TOKENS].to(dtype))
    everything = layer(torch.arange(ROWS, dtype=torch.int32))
    assert torch.equal(everything, F.dequantize_4bit(layer.weight, layer.quant_state))


def test_the_output_keeps_the_dtype_of_the_constructor():
    """A cast of the module does not change it, as in bitsandbytes."""
    layer = embedding(dtype=torch.bfloat16)
    assert layer.half()(TOKENS).dtype == layer.float()(TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_index_shapes(shape):
    assert embedding()(torch.zeros(shape, dtype=torch.long)).shape == (*shape, DIM)


@types
@dims
def test_padding_rows_stay_zeros(dim, quant_type):
    """Exactly, also in a block that they share with other rows."""
    layer = embedding(size=(ROWS, dim), padding_idx=5, quant_type=quant_type, blocksize=128)
    rows = layer(torch.tensor([4, 5, 6]))
    assert torch.equal(rows[1], torch.zeros(dim)) and rows[0].any() and rows[2].any()


def test_the_table_is_never_dequantized():
    """What a lookup allocates does not depend on the number of rows."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            aliases = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            for tensor in result if isinstance(result, tuple) else (result,):
                if tensor.untyped_storage().data_ptr() not in aliases:
                    self.numel = max(self.numel, tensor.numel())
            return result

    layer = embedding(size=(2000, 65), compress_statistics=True)
    with Largest() as largest:
        layer(TOKENS)
    assert largest.numel == TOKENS.numel() * 65


@pytest.mark.parametrize("tokens", [torch.tensor([ROWS]), torch.tensor([-1]), torch.tensor([0.5])], ids=str)
def test_bad_indices(tokens):
    with pytest.raises((RuntimeError, IndexError), match="bnbops::embedding_4bit"):
        embedding()(tokens)


def test_before_quantization():
    with pytest.raises(RuntimeError, match=r"Embedding4bit is not quantized yet.*\.to\(device\)"):
        embedding(quantized=False)(TOKENS)


# ---- saving, which bitsandbytes' layer refuses -----------------------------------------------------------------


@nestings
@dims
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_state_dicts(dim, nested, assign):
    """The format of Linear4bit: what that saves of the same weight."""
    layer = embedding(size=(ROWS, dim), compress_statistics=nested)
    twin = linear(quantized=False, size=(dim, ROWS), bias=False, compress_statistics=nested)
    twin.load_state_dict(embedding(quantized=False, size=(ROWS, dim)).state_dict())
    state = layer.state_dict()
    assert differing(state, twin.to("cpu").state_dict()) == []
    for target in (
        embedding(quantized=False, size=(ROWS, dim), seed=1),
        embedding(quantized=False, size=(ROWS, dim), device="meta"),
        embedding(size=(ROWS, dim), seed=1),
    ):
        target.load_state_dict(copies(state), assign=assign)
        assert differing(target.state_dict(), state) == [] and torch.equal(target(TOKENS), layer(TOKENS))


def test_float_tables_load():
    source = nn.Embedding(ROWS, DIM)
    fresh, quantized = embedding(quantized=False), embedding(seed=1)
    for layer in (fresh, quantized):
        layer.load_state_dict(source.state_dict())
        layer.to("cpu")
        packed, _ = F.quantize_4bit(source.weight.data, quant_type="nf4")
        assert torch.equal(layer.state_dict()["weight"], packed)


def test_a_table_of_another_size_is_refused():
    layer = embedding()
    before = copies(layer.state_dict())
    with pytest.raises(RuntimeError, match="shape"):
        layer.load_state_dict(embedding(size=(ROWS + 2, DIM)).state_dict())
    assert differing(layer.state_dict(), before) == []


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize(
    "way",
    [lambda e: e.half(), lambda e: e.to(torch.bfloat16), copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))],
    ids=["half", "bfloat16", "deepcopy", "pickle"],
)
def test_codes_survive(way, storage):
    layer = embedding(quant_storage=storage)
    expected, codes = layer(TOKENS), raw(layer.weight).clone()
    result = way(layer)
    assert type(result) is Embedding4bit and torch.equal(raw(result.weight), codes)
    assert torch.equal(result(TOKENS), expected)


# ---- compiled, exported, sharded -------------------------------------------------------------------------------


@nestings
def test_compiles(nested):
    """One graph for all numbers of tokens."""
    layer = embedding(compress_statistics=nested)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (TOKENS, torch.arange(30).view(5, 6), torch.arange(28).view(4, 7)):
        assert torch.equal(compiled(tokens), layer(tokens))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer = embedding(compress_statistics=True)
    program = torch.export.export(layer, (TOKENS,), strict=strict)
    assert program.state_dict.keys() == plain_tensors(layer).keys()
    assert torch.equal(program.module()(TOKENS), layer(TOKENS))


def test_functional_call():
    layer, other = embedding(), embedding(seed=1)
    tensors = {name: tensor.detach().clone() for name, tensor in plain_tensors(other).items()}
    assert torch.equal(functional_call(layer, tensors, (TOKENS,)), other(TOKENS))


@dims
def test_fsdp(dim):
    layer = embedding(size=(ROWS, dim), compress_statistics=True)
    expected = layer(TOKENS)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert torch.equal(layer(TOKENS), expected)
    finally:
        destroy_process_group()
