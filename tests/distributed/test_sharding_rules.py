"""Operators called on DTensors give what they give on whole tensors."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from bnbops.codebooks import create_dynamic_map
from cases.ranks import run_on_ranks

pytestmark = pytest.mark.every_torch

ops = torch.ops.bnbops
CODE = create_dynamic_map()
ROWS, COLUMNS = 66, 512  # rows that 4 ranks cannot share evenly


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(mesh: DeviceMesh, tensor: Tensor, *placements: object) -> DTensor:
    return distribute_tensor(tensor, mesh, placements)


def weight_4bit(shape: tuple[int, int], nested: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Codes and scales in rows, and the nested arguments."""
    codes, absmax = ops.quantize_4bit(normal(*shape, seed=1), 64, "nf4", torch.uint8)
    arguments = {}
    if nested:
        absmax, second = ops.quantize_blockwise(absmax - 1, CODE, 256)
        arguments = {"nested_absmax": second, "nested_code": CODE, "nested_offset": torch.ones(())}
    return codes.view(shape[0], -1), absmax.view(shape[0], -1), arguments


def refused(match: str, function, *args, **kwargs) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=match):
        function(*args, **kwargs)


# ---- quantization ----------------------------------------------------------------------------------------------


def quantization() -> None:
    mesh = line()
    A = normal(64, 32, 16)
    quantizers = [
        lambda A: ops.quantize_blockwise(A, CODE, 256),
        lambda A: ops.quantize_4bit(A, 64, "nf4", torch.uint8),
    ]
    for quantize in quantizers:
        for placement in (Shard(0), Replicate()):
            found = quantize(on(mesh, A, placement))
            for part, expected in zip(found, quantize(A), strict=True):
                assert part.placements == (placement,)
                assert torch.equal(part.full_tensor(), expected)
        refused("Replicate or Shard", quantize, on(mesh, A, Shard(1)))
        refused("Replicate or Shard", quantize, DTensor.from_local(A, mesh, [Partial()]))
        refused("cannot share", quantize, on(mesh, normal(2 * dist.get_world_size() + 1, 256), Shard(0)))
        refused("cannot share", quantize, on(mesh, normal(dist.get_world_size(), 32), Shard(0)))
    codes, absmax = ops.quantize_blockwise(A, CODE, 256)
    sharded = on(mesh, codes, Shard(0)), on(mesh, absmax, Shard(0))
    back = ops.dequantize_blockwise(*sharded, CODE, 256, torch.bfloat16)
    assert back.placements == (Shard(0),)
    assert torch.equal(back.full_tensor(), ops.dequantize_blockwise(codes, absmax, CODE, 256, torch.bfloat16))
    refused("absmax must be placed", ops.dequantize_blockwise, sharded[0], absmax, CODE, 256, torch.float32)


def dequantization_4bit() -> None:
    mesh = line()
    for nested in (False, True):
        shape = (64, 2048 * dist.get_world_size()) if nested else (ROWS, COLUMNS)
        codes, absmax, extra = weight_4bit(shape, nested)
        expected = ops.dequantize_4bit(codes, absmax, 64, "nf4", shape, torch.float32, **extra)
        for placement in (Shard(0), Replicate()) if nested else (Shard(0), Shard(1), Replicate()):
            if nested:
                extra["nested_absmax"] = on(mesh, weight_4bit(shape, True)[2]["nested_absmax"], placement)
            parts = on(mesh, codes, placement), on(mesh, absmax, placement)
            found = ops.dequantize_4bit(*parts, 64, "nf4", shape, torch.float32, **extra)
            assert found.placements == (placement,) and found.shape == shape
            assert torch.equal(found.full_tensor(), expected)
    flat = on(mesh, codes.view(-1, 1), Shard(0)), on(mesh, absmax.view(-1), Shard(0))
    extra["nested_absmax"] = on(mesh, weight_4bit(shape, True)[2]["nested_absmax"], Shard(0))
    found = ops.dequantize_4bit(*flat, 64, "nf4", shape, torch.float32, **extra)
    assert found.placements == (Shard(0),) and torch.equal(found.full_tensor(), expected)


def embedding() -> None:
    mesh = line()
    codes, absmax, _ = weight_4bit((ROWS, COLUMNS))
    indices = torch.arange(4 * 30).view(4, 30) % ROWS
    settings = [ROWS, COLUMNS], 64, "nf4", torch.float32
    expected = ops.embedding_4bit(indices, codes, absmax, *settings)
    cases = [
        (Replicate(), Shard(0), Partial()),
        (Replicate(), Shard(1), Shard(2)),
        (Shard(0), Replicate(), Shard(0)),
        (Shard(1), Shard(0), Partial()),  # indices are gathered
        (Replicate(), Replicate(), Replicate()),
    ]
    for of_indices, of_weight, of_result in cases:
        weight = on(mesh, codes, of_weight), on(mesh, absmax, of_weight)
        found = ops.embedding_4bit(on(mesh, indices, of_indices), *weight, *settings)
        assert found.placements == (of_result,), found.placements
        assert torch.equal(found.full_tensor(), expected)


# ---- products --------------------------------------------------------------------------------------------------

PRODUCTS = [  # placements of x and the weight, of the result
    (Replicate(), Shard(0), Shard(2)),
    (Shard(2), Shard(1), Partial()),
    (Replicate(), Shard(1), Partial()),  # x is cut
    (Shard(0), Replicate(), Shard(0)),
    (Shard(1), Shard(0), Shard(2)),  # x is gathered
    (Shard(2), Replicate(), Replicate()),
    (Replicate(), Replicate(), Replicate()),
]


def gradients(x: Tensor, bias: Tensor, y: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad((y * y).sum(), [x, bias])
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]


def products() -> None:
    mesh = line()
    codes, absmax, _ = weight_4bit((ROWS, COLUMNS))
    x, bias = normal(4, 6, COLUMNS, seed=2).requires_grad_(), normal(ROWS, seed=3).requires_grad_()
    settings = [ROWS, COLUMNS], 64, "nf4"
    whole = ops.linear_4bit(x, codes, absmax, bias, *settings)
    expected = [whole, *gradients(x, bias, whole)]
    for of_x, of_weight, of_result in PRODUCTS:
        parts = [on(mesh, x.detach(), of_x).requires_grad_(), on(mesh, bias.detach(), Replicate()).requires_grad_()]
        weight = on(mesh, codes, of_weight), on(mesh, absmax, of_weight)
        y = ops.linear_4bit(parts[0], *weight, parts[1], *settings)
        assert y.placements == (of_result,), (of_x, of_weight, y.placements)
        for found, wanted in zip([y.full_tensor(), *gradients(*parts, y)], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def products_int8() -> None:
    mesh = line()
    weight, scale = (40 * normal(ROWS, COLUMNS)).clamp(-127, 127).to(torch.int8), normal(ROWS, seed=4).abs()
    x, bias = normal(4, 6, COLUMNS, seed=2).requires_grad_(), normal(ROWS, seed=3).requires_grad_()
    whole = ops.linear_int8(x, weight, scale, bias, 0.0)
    expected = [whole, *gradients(x, bias, whole)]
    for of_x, of_weight, of_result in PRODUCTS:
        if of_weight == Shard(1):
            continue
        parts = [on(mesh, x.detach(), of_x).requires_grad_(), on(mesh, bias.detach(), Replicate()).requires_grad_()]
        y = ops.linear_int8(parts[0], on(mesh, weight, of_weight), on(mesh, scale, of_weight), parts[1], 0.0)
        assert y.placements == (of_result,), (of_x, of_weight, y.placements)
        assert torch.equal(y.full_tensor(), whole)  # sums of integers
        for found, wanted in zip(gradients(*parts, y), expected[1:], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)
    sharded = on(mesh, x.detach(), Shard(0))
    refused("outlier columns", ops.linear_int8, sharded, weight, scale, None, 6.0)
    refused("a row has one scale", ops.linear_int8, sharded, on(mesh, weight, Shard(1)), scale, None, 0.0)
    refused("scale must be placed", ops.linear_int8, sharded, on(mesh, weight, Shard(0)), scale, None, 0.0)


def grid() -> None:
    """Batches over one dimension of the mesh, features over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    codes, absmax, _ = weight_4bit((ROWS, COLUMNS))
    x, settings = normal(8, COLUMNS, seed=2), ([ROWS, COLUMNS], 64, "nf4")
    expected = ops.linear_4bit(x, codes, absmax, None, *settings)
    for of_weight, of_result in ((Shard(0), Shard(1)), (Shard(1), Partial())):
        weight = on(mesh, codes, Replicate(), of_weight), on(mesh, absmax, Replicate(), of_weight)
        y = ops.linear_4bit(on(mesh, x, Shard(0), Replicate()), *weight, None, *settings)
        assert y.placements == (Shard(0), of_result)
        torch.testing.assert_close(y.full_tensor(), expected, rtol=1e-4, atol=1e-4)
    both = on(mesh, codes, Shard(0), Shard(1)), on(mesh, absmax, Shard(0), Shard(1))
    y = ops.linear_4bit(on(mesh, x, Replicate(), Replicate()), *both, None, *settings)
    assert y.placements == (Shard(1), Partial())
    torch.testing.assert_close(y.full_tensor(), expected, rtol=1e-4, atol=1e-4)


def compiled() -> None:
    """One graph, forward and backward."""
    mesh = line()
    codes, absmax, _ = weight_4bit((ROWS, COLUMNS))
    weight = on(mesh, codes, Shard(0)), on(mesh, absmax, Shard(0))

    def function(x: Tensor, indices: Tensor) -> Tensor:
        settings = [ROWS, COLUMNS], 64, "nf4"
        y = ops.linear_4bit(x, *weight, None, *settings)
        rows = ops.embedding_4bit(indices, *weight, *settings, torch.float32)
        codes, absmax = ops.quantize_blockwise(x.detach(), CODE, 256)
        back = ops.dequantize_blockwise(codes, absmax, CODE, 256, torch.float32)
        return y.full_tensor().sum() + rows.full_tensor().sum() + back.full_tensor().sum()

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        x = on(mesh, normal(8, COLUMNS, seed=2), Replicate()).requires_grad_()
        loss = call(x, on(mesh, torch.arange(30), Replicate()))
        loss.backward()
        results.append((loss.detach(), x.grad.full_tensor()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def refusals() -> None:
    mesh, ranks = line(), dist.get_world_size()
    codes, absmax, _ = weight_4bit((ROWS, COLUMNS))
    x, settings = on(mesh, normal(8, COLUMNS), Replicate()), ([ROWS, COLUMNS], 64, "nf4")
    sharded = on(mesh, codes, Shard(0))
    refused("absmax must be placed as weight is", ops.linear_4bit, x, sharded, absmax, None, *settings)
    partial = DTensor.from_local(codes, mesh, [Partial()])
    refused("absmax must be placed", ops.linear_4bit, x, partial, absmax, None, *settings)
    both = partial, DTensor.from_local(absmax, mesh, [Partial()])
    refused("weight may be Replicate", ops.linear_4bit, x, *both, None, *settings)
    narrow = weight_4bit((8, 64 * (ranks + 1)))
    parts = [on(mesh, tensor, Shard(1)) for tensor in narrow[:2]]
    refused("cannot share", ops.dequantize_4bit, *parts, 64, "nf4", [8, 64 * (ranks + 1)], torch.float32)
    nested = weight_4bit((ROWS, COLUMNS), nested=True)
    parts = [on(mesh, tensor, Shard(0)) for tensor in nested[:2]]
    nested[2]["nested_absmax"] = on(mesh, nested[2]["nested_absmax"], Shard(0))
    refused("ranks share the blocks of 256 scales", ops.linear_4bit, x, *parts, None, *settings, **nested[2])
    refused("does not take DTensors; call it on their local parts", ops.squared_norms, [x])
    refused("does not take DTensors", ops.int8_vectorwise_quant, x)
    other = init_device_mesh("cpu", (1, ranks))
    elsewhere = on(other, codes, Replicate(), Replicate()), on(other, absmax, Replicate(), Replicate())
    refused("need the same mesh", ops.linear_4bit, x, *elsewhere, None, *settings)


CHECKS = [quantization, dequantization_4bit, embedding, products, products_int8, compiled, refusals]


def all_of(*checks: object) -> None:
    for check in checks:
        check()


@pytest.mark.parametrize("ranks", [2, 4])
def test_operators_on_dtensors(ranks):
    run_on_ranks(ranks, all_of, *CHECKS)


def test_operators_on_a_two_dimensional_mesh():
    run_on_ranks(4, grid)


IMPORTS = """
import sys
{imports}
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
x = DTensor.from_local(torch.ones(4, 256), init_device_mesh("cpu", (1,)), [Replicate()])
print(torch.ops.bnbops.quantize_blockwise(x, bnbops.codebooks.create_dynamic_map(), 256)[0].placements)
from torch.distributed.fsdp import fully_shard
print(fully_shard(bnbops.nn.Linear4bit(256, 4).to("cpu")).weight.dtype)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import bnbops\nassert 'torch.distributed.tensor' not in sys.modules",
        "import torch.distributed.fsdp\nassert 'torch.distributed.tensor' in sys.modules\nimport bnbops",
    ],
    ids=["bnbops first", "torch.distributed first"],
)
def test_rules_are_there_whatever_is_imported_first(imports):
    code = IMPORTS.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Replicate()" in done.stdout and "torch.uint8" in done.stdout, done.stderr
