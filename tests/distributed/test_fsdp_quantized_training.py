"""Frozen layers in 4 and 8 bits under fully_shard and DDP: the training of one process, bit by bit."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from bnbops.functional import dequantize_4bit
from bnbops.nn import Linear4bit, Linear8bitLt, plain_state_dict, quantize_
from bnbops.nn.parametrize import replace_parameter_4bit
from cases.fsdp_quantized import (
    FORMATS,
    Net,
    Tied,
    backward,
    batch,
    loss_of,
    mesh_of,
    quantized,
    shard,
    train,
    whole_tensors,
    with_adapters,
)
from cases.layers_4bit import differing
from cases.ranks import run_on_ranks
from cases.sharded import whole

INTEGERS = (torch.uint8, torch.int8, torch.int32)  # what codes and scales are held in


def own_batch() -> tuple[int, list[int]]:
    """The batch that this rank trains on, and those of all ranks.

    A sum of two, or of four times the same, is exact in any order: so two ranks get different batches, and four the
    same.
    """
    count = dist.get_world_size()
    return (dist.get_rank(), [0, 1]) if count == 2 else (0, [0] * count)


def assert_trains_as_one_process(sharded: nn.Module, expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    own, _ = own_batch()
    losses, tensors = train(sharded, [own])
    assert [x.item() for x in losses] == [x[own].item() for x in expected[0]]
    if isinstance(sharded, DistributedDataParallel):
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    assert differing(tensors, expected[1]) == []


# ---- adapters beside a frozen base, AdamW8bit ------------------------------------------------------------------


def qlora(name: str) -> None:
    frozen = whole_tensors(quantized(name))
    expected = train(with_adapters(quantized(name)), own_batch()[1])
    kept = [x for key, x in expected[1].items() if not key.startswith("state") and x.dtype in INTEGERS]
    assert len(kept) >= 5 and all(any(torch.equal(x, y) for y in frozen.values()) for x in kept)
    meshes = [mesh_of(), mesh_of(2, 2)] if dist.get_world_size() == 4 else [mesh_of()]
    for mesh in meshes:
        for reshard in (True, False, *[2] * (mesh.shape == (4,))):
            model = shard(with_adapters(quantized(name)), mesh=mesh, reshard_after_forward=reshard)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            assert_trains_as_one_process(model, expected)
    assert_trains_as_one_process(replicated(with_adapters(quantized(name, seed=dist.get_rank()))), expected)


def replicated(model: nn.Module) -> nn.Module:
    """DDP takes the first rank's tensors, codes and scales too."""
    return DistributedDataParallel(model)


@pytest.mark.every_torch
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.every_torch)])
def test_adapters_train_as_on_one_process(count, name):
    run_on_ranks(count, qlora, name)


# ---- mixed precision -------------------------------------------------------------------------------------------


def mixed(name: str) -> None:
    """fp32 scales keep their bits: the sharded model computes as one of which only the floats were cast."""
    one, sharded = with_adapters(quantized(name)), with_adapters(quantized(name))
    in_fp32 = loss_of(one, 0, 0)
    one.table.dtype = torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    shard(sharded, mp_policy=policy)

    def in_bf16(tokens: Tensor) -> Tensor:
        cast = {key: p.bfloat16() if p.is_floating_point() else p for key, p in one.named_parameters()}
        return functional_call(one, cast, (tokens,))

    losses = [backward(loss_of(model, 0, 0)) for model in (in_bf16, sharded)]
    assert losses[0] == losses[1] and losses[0] != in_fp32
    for (key, p), q in zip(one.named_parameters(), sharded.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and p.dtype == q.dtype
        assert p.grad is None or torch.equal(p.grad, whole(q.grad)), key


def several_mixed() -> None:
    for name in FORMATS:
        mixed(name)


@pytest.mark.every_torch
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.every_torch), 4])
def test_mixed_precision(count):
    run_on_ranks(count, several_mixed)


# ---- memory ----------------------------------------------------------------------------------------------------


def saved_storages(model: nn.Module) -> tuple[Tensor, list[torch.UntypedStorage]]:
    """The loss, and the memory of codes and scales that its backward pass reads."""
    storages = []

    whole = {buffer.data_ptr() for buffer in model.buffers()}  # the codebook of nested scales

    def pack(x: Tensor) -> Tensor:
        held = x.dtype in INTEGERS or any(x.data_ptr() == p.data_ptr() for p in model.parameters())
        if (held and x.data_ptr() not in whole) or x.untyped_storage().nbytes() == 0:
            storages.append(x.untyped_storage())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model, 0, 0)
    return loss, storages


def memory(name: str) -> None:
    count, hidden = dist.get_world_size(), 1024
    for reshard in (True, False):
        model = with_adapters(quantized(name, hidden=hidden))
        frozen = {key: p for key, p in model.named_parameters() if p.dtype in INTEGERS}
        whole_bytes = sum(p.nbytes for p in frozen.values())
        rows = sum(-(-p.shape[0] // count) * p[0].nbytes for p in frozen.values())
        originals = [weakref.ref(p) for p in frozen.values()]
        assert whole_bytes > 0.12e6
        shard(model, reshard_after_forward=reshard)
        mine = [p.to_local().untyped_storage().nbytes() for key, p in model.named_parameters() if key in frozen]
        assert sum(mine) == rows < whole_bytes / count * 1.02 + 64
        del frozen
        gc.collect()
        assert not any(ref() for ref in originals)  # nor anything that they hold

        loss, storages = saved_storages(model)
        codes = [storage for storage in storages if storage.nbytes() > 0]
        assert len(storages) >= 8 and bool(codes) == (not reshard)
        loss.backward()
        assert not any(storage.nbytes() for storage in codes)  # what backward gathered, it has freed


def several_memories() -> None:
    for name in FORMATS:
        memory(name)


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_holds_its_rows_only(count):
    run_on_ranks(count, several_memories)


# ---- other layers and ways to shard ----------------------------------------------------------------------------


def int8_training() -> None:
    """Linear8bitLt whose float weight trains, sharded as any other, quantized when it has been gathered."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Net()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                layer = Linear8bitLt(module.in_features, module.out_features, has_fp16_weights=True, threshold=2.0)
                model.set_submodule(name, layer)
        return model

    assert_trains_as_one_process(shard(make()), train(make(), own_batch()[1]))


class Experts(nn.Module):
    """Three experts: some of 4 ranks have none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 32, 64))
        self.gate = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,eoi,bi->bo", self.gate(x).softmax(-1), self.up, x)


def experts() -> None:
    torch.manual_seed(0)
    one = Experts()
    replace_parameter_4bit(one, "up", compress_statistics=True)
    sharded = copy.deepcopy(one)
    fully_shard(sharded, mesh=mesh_of())
    x = torch.randn(4, 64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, y in zip((one, sharded), inputs, strict=True):
        model(y).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(whole(sharded.gate.weight.grad), one.gate.weight.grad)
    assert differing(whole_tensors(sharded), plain_state_dict(one)) == []
    with pytest.raises(RuntimeError, match="plain_state_dict"):
        sharded.load_state_dict(one.state_dict())
    sharded.load_state_dict(sharded.state_dict())


def tied() -> None:
    """One group has the weight and its scales once, and puts them into both modules."""
    one, sharded = Tied().to("cpu"), Tied().to("cpu")
    fully_shard(sharded, mesh=mesh_of())
    tokens = batch(0, 0)[0]
    assert sharded.head.weight is sharded.table.weight and len(list(sharded.parameters())) == 2
    assert torch.equal(sharded(tokens), one(tokens))


def partly_sharded() -> None:
    """One layer alone: the others keep bitsandbytes' entries."""
    one, model = quantized(), quantized()
    fully_shard(model.blocks[0].into, mesh=mesh_of())
    results = []
    for net in (one, model):
        loss = backward(loss_of(net, 0, 0))
        results.append((loss, whole(net.blocks[0].into.bias.grad), whole(net.blocks[0].norm.weight.grad)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    state = model.state_dict()
    assert {"blocks.0.into.weight_absmax", "blocks.0.out.weight.absmax"} <= state.keys()
    assert not any(model.load_state_dict(state))
    assert torch.equal(loss_of(model, 0, 0), results[0][0])


def reading_the_weight() -> None:
    """What dequantizes a layer's weight gathers it first."""
    one, model = quantized(), shard(quantized())
    layers = [net.blocks[0].into for net in (one, model)]
    with pytest.raises(RuntimeError, match=r"sharded: call unshard\(\)"):
        layers[1].quant_state  # noqa: B018
    model.blocks[0].unshard()
    assert torch.equal(*(dequantize_4bit(layer.weight, layer.quant_state) for layer in layers))
    model.blocks[0].reshard()
    assert isinstance(layers[1].weight, DTensor)


def mistakes() -> None:
    """On every rank, and before anything has changed."""
    mesh, x = mesh_of(), torch.randn(2, 128)
    late = fully_shard(nn.Sequential(nn.Linear(128, 64)), mesh=mesh)
    with pytest.raises(ValueError, match=r"0: its weight is sharded .* quantize the model first"):
        quantize_(late)
    assert type(late[0]) is nn.Linear
    for kind, options in ((Linear4bit, {}), (Linear8bitLt, {"has_fp16_weights": False})):
        layer = kind(128, 64, **options)
        fully_shard(layer, mesh=mesh)
        packed = plain_state_dict(kind(128, 64, **options).to("cpu"))
        with pytest.raises(RuntimeError, match="this layer is not: quantize before fully_shard"):
            set_model_state_dict(layer, packed, options=StateDictOptions(full_state_dict=True))
        with pytest.raises(RuntimeError, match=r"is not quantized.*, and shard it, if at all, only then"):
            layer.to("cpu")(x)
    for spoil in ("policy", "cast"):
        layer = Linear4bit(128, 64, quant_storage=torch.bfloat16).to("cpu")
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float16)} if spoil == "policy" else {}
        fully_shard(layer, mesh=mesh, **options)
        with pytest.raises(RuntimeError, match=r"cast from torch\.bfloat16 to torch\.float16: choose quant_storage"):
            (layer.half() if spoil == "cast" else layer)(x)


def different_batches() -> None:
    """The order in which a reduction adds n gradients is the backend's: n - 1 roundings in either order, each of 2**-24
    of the sum of magnitudes at most."""
    count, one, sharded = dist.get_world_size(), with_adapters(quantized()), shard(with_adapters(quantized()))
    trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
    each = [torch.autograd.grad(loss_of(one, 0, rank), trained) for rank in range(count)]
    backward(loss_of(sharded, 0, dist.get_rank()))
    found = [whole(parameter.grad) for parameter in sharded.parameters() if parameter.requires_grad]
    for actual, *gradients in zip(found, *each, strict=True):
        gradients = torch.stack(gradients)
        bound = 2 * (count - 1) * 2**-24 * gradients.abs().sum(0) / count
        assert ((actual - gradients.sum(0) / count).abs() <= bound).all()


def others() -> None:
    for check in (different_batches, int8_training, experts, tied, partly_sharded, reading_the_weight, mistakes):
        check()


@pytest.mark.parametrize("count", [2, 4])
def test_other_layers_and_ways_to_shard(count):
    run_on_ranks(count, others)
