"""Optimizers of fully_shard's parameters take the steps of a single process, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from bnbops.optim import GlobalOptimManager
from cases.optimizer_classes import CLASSES, build, fixed_bits
from cases.paged import is_paged
from cases.ranks import run_on_ranks
from cases.sharded import (
    MIN_8BIT,
    assert_same_optimizers,
    copies,
    model,
    set_grads,
    sharded,
    tensors_of,
    whole,
)

pytestmark = pytest.mark.every_torch

SHARDED = [name for name in CLASSES if name != "PytorchLARS"]
OPTIONS = {  # besides the defaults
    "AdamW8bit": {"weight_decay": 0.1},
    "LAMB8bit": {"weight_decay": 0.1, "max_unorm": 0.5},
    "LARS8bit": {"weight_decay": 0.1, "momentum": 0.9},
    "AdEMAMix8bit": {"t_alpha": 3, "t_beta3": 3},
    "Adagrad8bit": {"initial_accumulator_value": 0.5},
    "RMSprop8bit": {"momentum": 0.9},
    "SGD8bit": {"momentum": 0.9, "nesterov": True},
}
CLIPS = {"percentile_clipping": 50}
POLICIES = {
    "plain": {},
    "bf16 compute": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def optimizer_of(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return build(name, params, **{"lr": 1e-2, "min_8bit_size": MIN_8BIT, **OPTIONS.get(name, {}), **options})


def mesh_of(kind: str) -> DeviceMesh:
    """All ranks in a line, or in two lines that hold the same."""
    ranks = dist.get_world_size()
    if kind == "line":
        return init_device_mesh("cpu", (ranks,))
    return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))


def equal_gradients(kind: str, dtype: torch.dtype, names: list[str], options: dict[str, Any]) -> None:
    mesh = mesh_of(kind)
    for name in names:
        optimizers = []
        for module in (model(dtype), sharded(model(dtype), mesh)):
            params = list(module.parameters())
            optimizers.append(optimizer_of(name, params, **options))
            for step in range(2):
                set_grads(params, step)
                optimizers[-1].step()
        assert_same_optimizers(optimizers[1], optimizers[0])
        if fixed_bits(name) == 8:  # by the whole shape: ranks with few rows, or none, agree
            quantized = {key.split(".")[0] for key in tensors_of(optimizers[1]) if key.endswith("_absmax")}
            assert quantized == {str(i) for i, param in enumerate(params) if param.numel() >= MIN_8BIT}, name


def test_every_class():
    run_on_ranks(4, equal_gradients, "line", torch.float32, SHARDED, {})


@pytest.mark.parametrize(
    ("ranks", "kind", "dtype", "names", "options"),
    [
        (2, "line", torch.float32, ["AdamW8bit", "LAMB8bit", "LARS32bit"], CLIPS),
        (4, "line", torch.float32, ["AdamW8bit", "LAMB8bit", "LARS8bit", "Lion32bit"], {**CLIPS, "maximize": True}),
        (4, "hybrid", torch.float32, ["AdEMAMix8bit", "LAMB8bit", "LARS8bit"], CLIPS),
        (4, "line", torch.bfloat16, ["AdamW8bit", "LAMB8bit", "PagedLion8bit"], {}),
        (2, "line", torch.float16, ["AdamW8bit", "AdEMAMix32bit"], {}),
    ],
    ids=["2 ranks", "clipping", "hybrid", "bfloat16", "float16"],
)
def test_ranks_options_and_dtypes(ranks, kind, dtype, names, options):
    run_on_ranks(ranks, equal_gradients, kind, dtype, names, options)


def training(name: str, kind: str, policies: list[str]) -> None:
    """Each rank has its own data, in two parts; a single process steps with the same gradients."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for policy in policies:
        module = sharded(model(), mesh_of(kind), **POLICIES[policy])
        params, alone = list(module.parameters()), copies(module.parameters())
        optimizer, expected = optimizer_of(name, params), optimizer_of(name, alone)
        for _ in range(3):
            for last in (False, True):
                module.set_requires_gradient_sync(last)
                module(torch.randn(6, 300, generator=generator)).square().mean().backward()
            assert whole(clip_grad_norm_(params, 0.01)) > 0.01
            for param, copy in zip(params, alone, strict=True):
                copy.grad = whole(param.grad)
                assert copy.grad.any()
            optimizer.step()
            expected.step()
            optimizer.zero_grad()
        assert_same_optimizers(optimizer, expected)


@pytest.mark.parametrize(
    ("ranks", "name", "kind", "policies"),
    [(4, "AdamW8bit", "line", list(POLICIES)), (4, "LAMB8bit", "hybrid", ["plain"])],
)
def test_training(ranks, name, kind, policies):
    run_on_ranks(ranks, training, name, kind, policies)


def by_columns() -> None:
    mesh, optimizers = mesh_of("line"), []
    for module in (nn.Linear(1024, 6, bias=False), nn.Linear(1024, 6, bias=False)):
        nn.init.ones_(module.weight)
        if optimizers:
            fully_shard(module, mesh=mesh, shard_placement_fn=lambda param: Shard(1))
        optimizers.append(optimizer_of("LAMB8bit", module.parameters()))
        for step in range(2):
            set_grads([module.weight], step)
            optimizers[-1].step()
    assert optimizers[1].state[module.weight]["exp_avg_absmax"].to_local().shape == (6, 2)
    assert_same_optimizers(optimizers[1], optimizers[0])


def test_sharded_by_columns():
    run_on_ranks(2, by_columns)


def joint_batch(engine: str) -> None:
    """On 2 ranks means of gradients are exact, so the whole training is that of a single process."""
    module, alone = model(), model()
    wrapped = DistributedDataParallel(module) if engine == "DDP" else sharded(module, mesh_of("line"))
    optimizer, expected = (optimizer_of("AdamW8bit", m.parameters()) for m in (wrapped, alone))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        halves = torch.randn(2, 8, 300, generator=generator)
        wrapped(halves[dist.get_rank()]).square().mean().backward()
        for half in halves:
            alone(half).square().mean().div(2).backward()
        for one in (optimizer, expected):
            one.step()
            one.zero_grad()
    assert_same_optimizers(optimizer, expected)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_joint_batch(engine):
    run_on_ranks(2, joint_batch, engine)


def scaled(fused: bool) -> None:
    """The gradient of step 1 overflows on one rank: all skip it."""
    module = sharded(model(), mesh_of("line"))
    params, alone = list(module.parameters()), copies(module.parameters())
    optimizer, expected = optimizer_of("LAMB8bit", params, **CLIPS), optimizer_of("LAMB8bit", alone, **CLIPS)
    optimizer.fused_scaling = expected.fused_scaling = fused
    scaler, single = (torch.amp.GradScaler("cpu", init_scale=16.0) for _ in range(2))
    for step in range(3):
        loss = module(torch.randn(6, 300)).square().mean()
        scaler.scale(loss).backward()
        single.scale(loss.detach())  # scalers make their scale then
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            params[0].grad.to_local()[0, 0] = torch.inf
        for param, copy in zip(params, alone, strict=True):
            copy.grad = whole(param.grad)
        for one, of in ((scaler, optimizer), (single, expected)):
            one.step(of)
            one.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == single.get_scale() == 8.0
    assert optimizer.state[params[0]]["step"] == 2
    assert_same_optimizers(optimizer, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    run_on_ranks(2, scaled, fused)


def overridden() -> None:
    manager, optimizers = GlobalOptimManager.get_instance(), []
    for shards in (False, True):
        module = model()
        manager.register_module_override(module[2], "weight", {"optim_bits": 32})
        if shards:
            module = sharded(module, mesh_of("line"))
        params = list(module.parameters())
        manager.override_config(module[0].weight, "optim_bits", 32)
        manager.override_config([module[4].weight, module[4].bias], "lr", 0.5)
        optimizers.append(optimizer_of("AdamW8bit", params))
        optimizers[-1].init_state()
        for step in range(2):
            set_grads(params, step)
            optimizers[-1].step()
        quantized = {key for key in tensors_of(optimizers[-1]) if key.endswith("exp_avg_absmax")}
        assert quantized == {f"{i}.exp_avg_absmax" for i in (6, 8, 10)}
    assert_same_optimizers(optimizers[1], optimizers[0])


def test_overrides():
    run_on_ranks(2, overridden)


def offloaded() -> None:
    """Shards on the CPU of a mesh of GPUs, as CPUOffloadPolicy leaves them: states are there, too."""
    mesh = DeviceMesh("cuda", torch.arange(2), _init_backend=False, _rank=dist.get_rank())
    x = torch.ones(8, 600)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(x.shape, x.stride(), x.dtype))
    param, grad = (DTensor(part, spec, requires_grad=False) for part in (x[:4].clone(), x[:4].clone()))
    param = nn.Parameter(param)
    param.grad = grad
    optimizer = optimizer_of("AdamW8bit", [param])
    optimizer.step()
    assert all(x.to_local().device.type == "cpu" for key, x in optimizer.state[param].items() if key != "step")
    alone = nn.Parameter(torch.ones(4, 600))
    alone.grad = torch.ones(4, 600)
    optimizer_of("AdamW8bit", [alone]).step()
    assert torch.equal(param.to_local(), alone)


def test_offloaded_from_another_device():
    run_on_ranks(2, offloaded)


def paged(directory: str) -> None:
    module = sharded(model(), mesh_of("line"))
    optimizer = optimizer_of("PagedAdamW8bit", module.parameters(), paged_directory=directory)
    optimizer.init_state()
    parts = [x.to_local() for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    assert all(is_paged(part, Path(directory)) for part in parts if part.numel())


def test_paged(tmp_path):
    run_on_ranks(2, paged, str(tmp_path))


def compiled() -> None:
    """The collectives of norms are part of the one graph."""
    optimizers = []
    for backend in (None, "aot_eager"):
        params = list(sharded(model()[6:], mesh_of("line")).parameters())
        optimizer = optimizer_of("LAMB8bit", params, **CLIPS)
        optimizer.init_state()

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            type(optimizer).step(optimizer)

        call = torch.compile(step, fullgraph=True, backend=backend) if backend else step
        for seed in range(2):
            set_grads(params, seed)
            params[0].grad = params[0].grad.redistribute(placements=[Replicate()])  # the step shards it again
            call()
        optimizers.append(optimizer)
    assert_same_optimizers(*optimizers)


def test_compiled():
    run_on_ranks(2, compiled)
