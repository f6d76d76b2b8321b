"""Optimizers of parameters that DTensors spread in any way: over columns, over two meshes, by tensor parallelism."""

import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from bnbops.optim import AdamW8bit, GlobalOptimManager
from cases.optimizer_classes import build
from cases.ranks import run_on_ranks
from cases.sharded import assert_same_optimizers, copies, set_grads, sharded, tensors_of, whole

pytestmark = pytest.mark.every_torch

Placements = list[Shard | Replicate] | None  # None for a plain tensor
ROWS, COLUMNS, SAME = Shard(0), Shard(1), Replicate()
# Shape, placements on 4 ranks (in a line; 2 x 2), and the bits of the states.
LINE: list[tuple[tuple[int, ...], Placements, int]] = [
    ((6, 2048), [COLUMNS], 8),
    ((5, 1023), [COLUMNS], 8),  # the last rank's block is short, here as in the whole
    ((4, 6, 128), [COLUMNS], 8),  # 2, 2, 2 and 0 columns, of half a block each
    ((6, 1536), [COLUMNS], 32),  # one and a half blocks a rank
    ((6, 1000), [COLUMNS], 32),
    ((4, 6, 256), [COLUMNS], 8),  # 2, 2, 2 and 0 blocks
    ((4, 5, 768), [COLUMNS], 32),  # 6, 6, 3 and 0 blocks, but 4, 4, 4 and 3 of their scales
    ((4, 8, 512), [Shard(2)], 32),
    ((7, 300), [ROWS], 8),
    ((3, 300), [ROWS], 8),
    ((6, 300), [SAME], 8),
    ((130,), [ROWS], 32),
    ((130,), [SAME], 32),
    ((1024,), [ROWS], 8),
    ((600,), [ROWS], 32),
    ((600,), [SAME], 8),
]
SQUARE: list[tuple[tuple[int, ...], Placements, int]] = [
    ((7, 1024), [ROWS, COLUMNS], 8),
    ((7, 1024), [COLUMNS, ROWS], 8),
    ((7, 300), [ROWS, ROWS], 8),
    ((6, 1024), [COLUMNS, COLUMNS], 8),  # evenly, one block a rank
    ((6, 1000), [COLUMNS, COLUMNS], 32),
    ((6, 512), [COLUMNS, COLUMNS], 32),  # half a block
    ((1024,), [ROWS, ROWS], 8),
    ((1536,), [ROWS, ROWS], 32),  # one and a half blocks
    ((1536,), [SAME, ROWS], 8),
    ((6, 512), [SAME, COLUMNS], 8),
    ((6, 300), [ROWS, COLUMNS], 32),
    ((6, 300), [SAME, SAME], 8),
    ((5, 700), None, 8),
    ((9,), None, 32),
]


def optimizer_of(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return build(name, params, lr=1e-2, min_8bit_size=512, percentile_clipping=60)


def spread() -> tuple[list[nn.Parameter], list[int]]:
    """Parameters for LINE and SQUARE, and the bits of their states."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    generator, params, bits = torch.Generator().manual_seed(0), [], []
    for mesh, cases in ((line, LINE), (square, SQUARE)):
        for shape, placements, expected in cases:
            x = torch.randn(shape, generator=generator)
            params.append(nn.Parameter(distributed(x, mesh, placements) if placements else x))
            bits.append(expected)
    return params, bits


def distributed(x: Tensor, mesh: DeviceMesh, placements: list[Shard | Replicate]) -> DTensor:
    same = DTensor.from_local(x.clone(), mesh, [SAME] * mesh.ndim, run_check=False)
    return same.redistribute(placements=placements)


def placements(names: list[str]) -> list[str]:
    manager, log = GlobalOptimManager.get_instance(), Log()
    logging.getLogger("bnbops").addHandler(log)
    for name in names:
        params, bits = spread()
        alone = copies(params)
        optimizer, expected = (
            build(name, p, lr=1e-2, min_8bit_size=512, percentile_clipping=60) for p in (params, alone)
        )
        manager.override_config([param for param, b in zip(alone, bits, strict=True) if b == 32], "optim_bits", 32)
        for step in range(2):
            set_grads(params, step)
            set_grads(alone, step)
            optimizer.step()
            expected.step()
        quantized = {key.split(".")[0] for key in tensors_of(optimizer) if key.endswith("_absmax")}
        assert quantized == {str(i) for i, b in enumerate(bits) if b == 8}
        assert_same_optimizers(optimizer, expected)
    return log.messages


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_placements():
    said, *others = run_on_ranks(4, placements, ["AdamW8bit", "LAMB8bit"])
    cut = [shape for shape, cut, bits in (*LINE, *SQUARE) if cut and bits == 32 and math.prod(shape) >= 512]
    assert others == [[], [], []], "one rank speaks for all, once"
    assert len(said) == len(cut) and all(f"shape {list(x)}" in message for x, message in zip(cut, said, strict=True))
    assert "(Shard(dim=1),) on a mesh of shape (4,)" in said[0]


def gradients() -> None:
    """They come as backward leaves them: partial sums of replicated parameters, or sharded otherwise."""
    mesh = init_device_mesh("cpu", (2,))
    left = [[Partial()], [SAME], [COLUMNS], [Partial("avg")]]
    kept = [[SAME], [ROWS], [ROWS], [COLUMNS]]
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    for name in ("AdamW8bit", "LAMB8bit"):
        params = [nn.Parameter(distributed(x, mesh, placed)) for placed in kept]
        alone = copies(params)
        optimizer, expected = (optimizer_of(name, p) for p in (params, alone))
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(2):
            for param, copy, placed in zip(params, alone, left, strict=True):
                one = torch.randn(8, 512 // (2 if placed == [COLUMNS] else 1), generator=generator)
                if placed == [SAME]:
                    one = x.clone()
                param.grad = DTensor.from_local(one, mesh, placed, run_check=False)
                copy.grad = whole(param.grad)
            optimizer.step()
            expected.step()
        assert_same_optimizers(optimizer, expected)


def multiplied() -> None:
    """The gradient that DTensor's own matmul leaves of a replicated weight."""
    mesh = init_device_mesh("cpu", (2,))
    batch = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(distributed(torch.randn(8, 512, generator=torch.Generator().manual_seed(0)), mesh, [SAME]))
    (copy,) = copies([weight])
    (distributed(batch, mesh, [ROWS]) @ weight.t()).sum().backward()
    assert weight.grad.placements == (Partial(),)
    torch.testing.assert_close(whole(weight.grad), batch.sum(0).expand(8, -1))
    copy.grad = whole(weight.grad)
    optimizer, expected = AdamW8bit([weight]), AdamW8bit([copy])
    optimizer.step()
    expected.step()
    assert_same_optimizers(optimizer, expected)


def refused() -> None:
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    x = torch.ones(8, 512)
    good, partial = (nn.Parameter(DTensor.from_local(x, mesh, [p], run_check=False)) for p in (SAME, Partial()))
    with pytest.raises(ValueError, match=r"shape \[8, 512\] is a partial sum.*\(Partial\(sum\),\).*redistribute"):
        AdamW8bit([good, partial])
    optimizer = AdamW8bit([good, plain := nn.Parameter(x.clone())])
    with pytest.raises(ValueError, match="is a partial sum"):
        optimizer.add_param_group({"params": [partial]})
    assert len(optimizer.param_groups) == 1
    set_grads([good, plain], 0)
    optimizer.step()
    before = {key: tensor.clone() for key, tensor in tensors_of(optimizer).items()}
    for grad, found in ((x, "a plain tensor"), (distributed(x, other, [SAME, SAME]), "one on DeviceMesh")):
        good.grad = None
        good.grad = grad
        with pytest.raises(RuntimeError, match=rf"gradient of a DTensor of shape \[8, 512\].*got {found}"):
            optimizer.step()
    for key, tensor in tensors_of(optimizer).items():
        assert torch.equal(whole(tensor), whole(before[key])), key


def states_decoded() -> None:
    """8-bit states that fit the parameter, but not its shards, become 32-bit ones of their values."""
    mesh, x = init_device_mesh("cpu", (2,)), torch.ones(8, 600)
    by_rows, by_columns = (AdamW8bit([nn.Parameter(distributed(x, mesh, [p]))]) for p in (ROWS, COLUMNS))
    by_rows.init_state()
    by_columns.init_state()
    for optimizer in (by_rows, by_columns):
        set_grads(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
    saved = by_rows.state_dict()
    by_columns.load_state_dict(saved)
    values, found = (one.dequantized_state(one.param_groups[0]["params"][0]) for one in (by_rows, by_columns))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(found[key].full_tensor(), values[key].full_tensor())
        assert by_columns.state_dict()["state"][0][key].placements == (COLUMNS,)
    before = tensors_of(by_rows)
    saved["state"] = {0: saved["state"][0] | {"exp_avg_absmax": torch.zeros(18)}}
    with pytest.raises(ValueError, match=r"'exp_avg_absmax' is .*\[18\], expected .* \[8, 3\]"):
        by_rows.load_state_dict(saved)
    assert all(tensor is before[key] for key, tensor in tensors_of(by_rows).items() if "." in key)


@pytest.mark.parametrize("check", [gradients, multiplied, refused, states_decoded])
def test_gradients_and_errors(check):
    run_on_ranks(2, check)


class Block(nn.Module):
    """An embedding, a residual MLP and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 1024), nn.Linear(1024, 64)
        self.head = nn.Linear(64, 15)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(nn.functional.gelu(self.up(self.norm(x)))))


PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def trained_block(shards: bool) -> None:
    """Matrices and sequences over one dimension of the mesh, batches over the other, with the parameters if `shards`.

    Each step's gradients are those of a single process, nearly, and the rest of it is bit-identical.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    module = parallelize_module(Block(), mesh["tensor"], PLAN)
    if shards:
        module = sharded(module, mesh["data"])
        strided = module.up.weight.placements[0]
        assert (type(strided).__name__, strided.dim) == ("_StridedShard", 0)
    assert module.down.weight.placements[-1] == COLUMNS
    batches = torch.randint(50, (3, mesh.size(0), 4, 6), generator=torch.Generator().manual_seed(0))
    for name in ("AdamW8bit", "LAMB8bit"):
        params, alone = list(module.parameters()), Block()
        alone.load_state_dict({key: whole(param) for key, param in module.named_parameters()})
        copied = list(alone.parameters())
        optimizer, expected = (optimizer_of(name, p) for p in (params, copied))
        for batch in batches:
            module(batch[mesh.get_local_rank("data")]).square().mean().backward()
            alone(batch.flatten(0, 1)).square().mean().backward()
            for param, copy in zip(params, copied, strict=True):
                gradient = whole(param.grad)
                torch.testing.assert_close(gradient, copy.grad, rtol=1e-4, atol=1e-6)
                copy.grad = gradient
            for one in (optimizer, expected):
                one.step()
                one.zero_grad()
        quantized = {key for key in tensors_of(optimizer) if key.endswith("_absmax")}
        assert {f"{i}.exp_avg_absmax" for i, param in enumerate(params) if param.dim() == 2} <= quantized
        assert_same_optimizers(optimizer, expected)


@pytest.mark.parametrize(("ranks", "shards"), [(2, False), (4, True)], ids=["tensor parallel", "with FSDP2"])
def test_parallelize_module(ranks, shards):
    run_on_ranks(ranks, trained_block, shards)
