"""bnbops.nn.Linear4bit, LinearNF4, LinearFP4: what they compute, how they train, compile and export."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import bnbops
import bnbops.functional as F
from bnbops.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from cases.layers_4bit import FLOATS, IN, OUT, STORAGES, inputs, linear, plain_tensors
from cases.quantize_4bit import types
from reference.quantize_4bit import assert_product

pytestmark = pytest.mark.every_torch

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
nestings = pytest.mark.parametrize("nested", [False, True], ids=["single", "nested"])


def dequantized(layer: Linear4bit) -> Tensor:
    """The fp32 weight that the layer stands for."""
    state = layer.quant_state
    state.dtype = torch.float32
    return F.dequantize_4bit(layer.weight.data, state)


# ---- constructor -----------------------------------------------------------------------------------------------


def test_arguments_reach_the_weight():
    layer = Linear4bit(64, 8, False, torch.float16, False, "nf4", torch.bfloat16, "meta", blocksize=32)
    weight = layer.weight
    assert layer.bias is None and layer.compute_dtype == torch.float16 and weight.is_meta
    found = (weight.compress_statistics, weight.quant_type, weight.quant_storage, weight.blocksize)
    assert found == (False, "nf4", torch.bfloat16, 32) and layer.quant_storage == torch.bfloat16
    assert linear(quantized=False, dtype=torch.float16).bias.dtype == torch.float16
    assert isinstance(layer, nn.Linear) and isinstance(weight, Params4bit) and not weight.requires_grad
    assert (LinearNF4(64, 8).weight.quant_type, LinearFP4(64, 8, blocksize=32).weight.quant_type) == ("nf4", "fp4")
    assert LinearFP4(64, 8, blocksize=32).weight.blocksize == 32
    assert bnbops.nn.Linear4bit is Linear4bit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int5"}, "quant_type"),
        ({"blocksize": 100}, "blocksize"),
        ({"quant_storage": torch.int64}, "quant_storage"),
        ({"quant_storage": torch.float32, "size": (33, 1)}, "17 bytes"),
        ({"compute_dtype": torch.float64}, "compute_dtype"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        linear(quantized=False, **options)


def test_description():
    assert "nf4, not quantized yet" in repr(linear(quantized=False))
    assert "nf4, blocksize=64, double quantization" in repr(linear())


# ---- the tensors -----------------------------------------------------------------------------------------------


@nestings
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_tensors_by_rows(storage, nested):
    layer = linear(quant_storage=storage, compress_statistics=nested)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in plain_tensors(layer).items()}
    expected = {
        "weight": (storage, (OUT, IN // 2 // storage.itemsize)),
        "bias": (torch.float32, (OUT,)),
        "weight_absmax": (torch.uint8 if nested else torch.int32, (OUT, IN // 64)),
    }
    if nested:
        expected |= {"weight_nested_absmax": (torch.int32, (1,)), "weight_nested_offset": (torch.int32, (1,))}
        expected |= {"weight_nested_code": (torch.int32, (256,))}
    assert shapes == expected
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert not layer._non_persistent_buffers_set  # Transformers empties those after it has loaded a model


@nestings
@pytest.mark.parametrize("size", [(65, 33), (96, 10), (64, 1), (1, 1)], ids=str)
def test_tensors_where_blocks_straddle_rows(size, nested):
    """Flat, also for a single row, whose codes [1, n] would read as the transpose of [n, 1]."""
    layer = linear(size=size, compress_statistics=nested)
    numel = size[0] * size[1]
    assert layer.weight.shape == ((numel + 1) // 2, 1) and layer.weight_absmax.shape == ((numel + 63) // 64,)
    assert layer(inputs(3, size[0])).shape == (3, size[1])


@nestings
def test_a_slice_of_rows_is_a_layer(nested):
    """What sharding along dimension 0 keeps together."""
    layer = linear(compress_statistics=nested, bias=False)
    full, half = dequantized(layer), slice(OUT // 2, OUT)
    state = layer.quant_state
    state.shape, state.absmax = torch.Size([OUT // 2, IN]), layer.weight_absmax[half].flatten()
    if not nested:
        state.absmax = state.absmax.view(torch.float32)
        assert torch.equal(F.dequantize_4bit(layer.weight[half], state), full[half])
    else:  # all scales are within one nested block here
        assert torch.equal(F.dequantize_4bit(layer.weight.data[half], state), full[half])


@nestings
def test_states_show_the_tensors(nested):
    layer = linear(compress_statistics=nested)
    assert linear(quantized=False).quant_state is None
    for state in (layer.quant_state, layer.weight.quant_state):
        assert state.absmax.shape == (OUT * IN // 64,) and state.absmax.data_ptr() == layer.weight_absmax.data_ptr()
        assert (state.shape, state.blocksize, state.quant_type) == (torch.Size([OUT, IN]), 64, "nf4")
        if nested:
            assert state.offset.shape == () and state.offset.dtype == state.state2.absmax.dtype == torch.float32
            assert state.offset.data_ptr() == layer.weight_nested_offset.data_ptr()
    assert layer.quant_state == layer.weight.quant_state == linear(compress_statistics=nested).quant_state


# ---- forward ---------------------------------------------------------------------------------------------------


@dtypes
@nestings
@types
@pytest.mark.parametrize("size", [(IN, OUT), (65, 33)], ids=str)
def test_forward(size, quant_type, nested, dtype):
    layer = linear(size=size, quant_type=quant_type, compress_statistics=nested)
    for rows in (1, 7):
        x = inputs(rows, size[0], dtype)
        out = layer(x)
        assert out.dtype == dtype
        assert_product(out.detach(), x, dequantized(layer), layer.bias.detach().to(dtype))


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, IN), (2, 0, 3, IN)], ids=str)
def test_leading_dimensions(shape):
    layer = linear()
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], OUT)
    out.sum().backward()
    assert x.grad.shape == shape
    torch.testing.assert_close(out, torch.nn.functional.linear(x, dequantized(layer), layer.bias))


@pytest.mark.parametrize("compute_dtype", FLOATS, ids=str)
@dtypes
def test_compute_dtype(compute_dtype, dtype):
    """x goes to it, the result back to x's dtype."""
    layer, plain = linear(compute_dtype=compute_dtype), linear()
    x = inputs(dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype and torch.equal(out, plain(x.to(compute_dtype)).to(dtype))


@dtypes
def test_every_call_has_its_own_dtype(dtype):
    """Unlike in bitsandbytes, where the first call's dtype stays."""
    layer = linear()
    layer(inputs())
    assert layer(inputs(dtype=dtype)).dtype == dtype and layer.compute_dtype is None


def test_forward_changes_nothing():
    """Neither the bias, whose dtype is not x's, nor the weight, in eval mode or not."""
    layer = linear()
    before = {name: (t.data_ptr(), t.detach().clone()) for name, t in plain_tensors(layer).items()}
    attributes = dict(vars(layer))
    for training, dtype in itertools.product((True, False), FLOATS):
        layer.train(training)(inputs(dtype=dtype))
    after = plain_tensors(layer)
    assert after.keys() == before.keys() and vars(layer) == attributes | {"training": False}
    assert all(after[n].data_ptr() == p and torch.equal(after[n], t) for n, (p, t) in before.items())


def test_forward_before_quantization():
    for layer in (linear(quantized=False), linear(quantized=False, device="meta")):
        with pytest.raises(RuntimeError, match=r"not quantized yet.*\.to\(device\)"):
            layer(inputs())


@pytest.mark.parametrize(
    "x", [torch.zeros(2, IN + 1), torch.zeros(2, IN).double(), torch.zeros(2, IN).int(), torch.tensor(1.0)]
)
def test_forward_refuses(x):
    with pytest.raises(RuntimeError, match="bnbops::linear_4bit"):
        linear()(x)


# ---- gradients -------------------------------------------------------------------------------------------------


@dtypes
@nestings
def test_gradients(nested, dtype):
    """grad @ W for the input, the sum of the rows for the bias, nothing else."""
    layer = linear(compress_statistics=nested)
    x, grad = inputs(dtype=dtype).requires_grad_(), inputs(5, OUT, dtype)
    layer(x).backward(grad)
    assert_product(x.grad, grad, dequantized(layer).t())
    assert layer.bias.grad.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.bias.grad, grad.float().sum(0), rtol=eps, atol=8 * eps)
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """As torch.nn.Linear: computes in autocast's dtype and returns it. A compute_dtype decides on the result's."""
    layer, fixed = linear(), linear(compute_dtype=torch.float32)
    x = inputs().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = layer(x)
        assert out.dtype == nn.functional.linear(x, dequantized(layer)).dtype == dtype
        assert fixed(x).dtype == torch.float32
    assert torch.equal(out, layer(x.to(dtype)))
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_grad_scaler():
    """A step on the bias and on a layer before, fp16 under autocast: nothing is skipped, the codes stay."""
    model = nn.Sequential(nn.Linear(16, IN), linear())
    optimizer = bnbops.optim.AdamW8bit(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    weight, bias = model[1].weight.clone(), model[1].bias.clone()
    with torch.autocast("cpu", torch.float16):
        loss = model(inputs(size=16)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0 and torch.equal(model[1].weight, weight)
    assert not torch.equal(model[1].bias, bias)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    grads = []
    for checkpointed in (False, True):
        model, x = nn.Sequential(linear(), nn.GELU(), linear(size=(OUT, IN))), inputs().requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        out.square().sum().backward()
        grads.append([x.grad, model[0].bias.grad, model[2].bias.grad])
    assert all(map(torch.equal, *grads))


def test_lora_learns():
    """Adapters over a frozen layer reach a target, with 8-bit optimizer states."""
    torch.manual_seed(0)
    layer, down, up = linear(bias=False), nn.Linear(IN, 4, bias=False), nn.Linear(4, OUT, bias=False)
    nn.init.zeros_(up.weight)
    frozen = layer.weight.clone()
    target = torch.randn(OUT, 2) @ torch.randn(2, IN) * 0.05
    optimizer = bnbops.optim.AdamW8bit([*layer.parameters(), *down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for step in range(150):
        x = torch.randn(64, IN, generator=torch.Generator().manual_seed(step))
        loss = (layer(x) + up(down(x)) - x @ (dequantized(layer) + target).t()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0] and torch.equal(layer.weight, frozen)


# ---- compiled, exported, functional ----------------------------------------------------------------------------


def test_functional_call():
    """The plain tensors are the whole state."""
    layer, other, x = linear(), linear(seed=1), inputs()
    tensors = {name: tensor.detach().clone() for name, tensor in plain_tensors(other).items()}
    assert all(type(tensor) is Tensor for tensor in tensors.values())
    assert torch.equal(functional_call(layer, tensors, (x,)), other(x))
    assert not torch.equal(layer(x), other(x))


@nestings
@dtypes
def test_compiles_forward_and_backward(nested, dtype):
    """One graph, the bits of eager, and no recompiling for other batch sizes."""
    model = nn.Sequential(linear(compress_statistics=nested), nn.GELU(), linear(size=(OUT, 33)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for rows in (4, 7, 31):
        results = []
        for run in (model, compiled):
            x = inputs(rows, dtype=dtype).requires_grad_()
            model.zero_grad()
            out = run(x)
            out.float().square().sum().backward()
            results.append([out, x.grad, model[0].bias.grad, model[2].bias.grad])
        assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


def test_a_step_is_one_graph():
    model = nn.Sequential(linear(), nn.GELU(), nn.Linear(OUT, 8))
    optimizer = bnbops.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    @bnbops.compiled_train_step(optimizer=optimizer, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    losses = [step(inputs()).item() for _ in range(4)]
    assert step.graph_count == 1 and losses[-1] < losses[0]


def test_the_state_can_be_read_in_a_graph():
    layer, x = linear(), inputs()

    def merged(x: Tensor) -> Tensor:
        return x @ F.dequantize_4bit(layer.weight, layer.quant_state).t()

    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), merged(x))


@pytest.mark.parametrize("strict", [False, True])
@nestings
def test_export(nested, strict):
    layer, rows = linear(compress_statistics=nested), torch.export.Dim("rows", max=64)
    program = torch.export.export(layer, (inputs(),), dynamic_shapes=({0: rows},), strict=strict)
    assert program.state_dict.keys() == plain_tensors(layer).keys()
    calls = [node.target for node in program.graph.nodes if "bnbops" in str(node.target)]
    assert calls == [torch.ops.bnbops.linear_4bit.default]
    for x in (inputs(), inputs(9)):
        assert torch.equal(program.module()(x), layer(x))


# ---- sharded ---------------------------------------------------------------------------------------------------


@nestings
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_fsdp(storage, nested):
    """All tensors are sharded together. Mixed precision casts no scales, and no codes in integers or its own dtype."""
    options = {"quant_storage": storage, "compress_statistics": nested}
    model = nn.Sequential(linear(**options), nn.Linear(OUT, 65), linear(size=(65, 32), compress_statistics=nested))
    x, results = inputs(dtype=torch.bfloat16), []
    expected = copy.deepcopy(model).bfloat16()(x)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        results.append(model(x))
        results[0].sum().backward()
        assert model[0].bias.grad is not None
        state_dict = model.state_dict()  # by the tensors' own names: they can be resharded
        assert state_dict.keys() == plain_tensors(model).keys()
        model.load_state_dict(state_dict)
        results.append(model(x))
        assert all(torch.equal(result, expected) for result in results)
    finally:
        destroy_process_group()
