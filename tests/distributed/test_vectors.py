"""8-bit states of vectors that are sharded, and of those that others have made of many parameters."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from bnbops.distributed import SafeLoadPlanner, load_checkpoint, save_checkpoint
from bnbops.estimate import estimate
from bnbops.optim import AdamW8bit, GlobalOptimManager
from cases.dcp import Run, assert_equal, in_32_bits
from cases.optimizer_classes import build
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, assert_same_optimizers, copies, model, placed_as, set_grads, whole

# Sizes, and the numbers of ranks of 2, 3 and 4 that have whole blocks of 256. The last blocks of the first are short.
SIZES = {1535: (2, 3), 1024: (2, 4), 600: ()}


class Vectors(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [*((size,) for size in SIZES), (5, 300)]
        self.tensors = nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])


def cut(ranks: int) -> list[int]:
    """The numbers of the vectors that have parts of blocks on a rank."""
    return [i for i, whole_on in enumerate(SIZES.values()) if ranks > 1 and ranks not in whole_on]


def take_steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads([param for group in optimizer.param_groups for param in group["params"]], step)
        optimizer.step()


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


# ---- whole blocks, or 32 bits ----------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW8bit": {"percentile_clipping": 50},
    "LAMB8bit": {"weight_decay": 0.1},
    "LARS8bit": {},
    "Adagrad8bit": {"initial_accumulator_value": 0.5},
    "PagedLion8bit": {},
}


def equal_steps(hybrid: bool) -> list[str]:
    """The steps of a single process, in which the vectors that are cut here have 32-bit states. Returns warnings."""
    ranks = dist.get_world_size()
    shape, names = ((2, ranks // 2), ("replicate", "shard")) if hybrid else ((ranks,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    logging.getLogger("bnbops").addHandler(messages := Messages())
    for name, options in OPTIONS.items():
        module = Vectors()
        alone = copies(module.parameters())
        params = list(fully_shard(module, mesh=mesh).parameters())
        for i in cut(mesh.shape[-1]):
            GlobalOptimManager.get_instance().override_config(alone[i], "optim_bits", 32)
        optimizer, expected = (build(name, p, lr=1e-2, min_8bit_size=MIN_8BIT, **options) for p in (params, alone))
        for one in (optimizer, expected):
            take_steps(one, range(3))
        assert_same_optimizers(optimizer, expected)
        if name.startswith("AdamW") and dist.get_rank() == 0:
            state = [item for state in optimizer.state.values() for item in state.items()]
            scales = sum(x.to_local().nbytes for key, x in state if key.endswith("_absmax"))
            found = estimate(module, name, shards=mesh.shape[-1], min_8bit_size=MIN_8BIT).per_rank
            assert found.scales == scales
            assert found.states + scales == sum(x.to_local().nbytes for key, x in state if key.startswith("exp_avg"))
    return messages.found


@pytest.mark.parametrize(("ranks", "hybrid"), [(2, False), (3, False), (4, True)], ids=["2", "3", "hybrid"])
def test_steps_of_a_single_process(ranks, hybrid):
    found = run_on_ranks(ranks, equal_steps, hybrid)
    expected = [list(SIZES)[i] for i in cut(2 if hybrid else ranks)]
    assert [message.split("]")[0] for message in found[0]] == [f"a parameter of shape [{n}" for n in expected]
    assert not any(found[1:])


# ---- checkpoints -----------------------------------------------------------------------------------------------------

STAGES = [2, 3, 1, 2]


def whole_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    saved = optimizer.state_dict()
    states = {i: {key: whole(x) for key, x in state.items()} for i, state in saved["state"].items()}
    return {**saved, "state": states}


def stage(way: str, folder: Path, i: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loads what the stage before has saved, steps as a single process would, and saves. All tensors, then and now."""
    run = Run("AdamW8bit", module=Vectors(seed=i))
    params = list(run.model.parameters())
    run.optimizer.init_state()
    if i and way == "save_checkpoint":
        load_checkpoint(run.model, run.optimizer, folder / f"{i - 1}")
    elif i:
        values, state_dict = torch.load(folder / f"{i - 1}", weights_only=True)
        for param, value in zip(params, values, strict=True):
            param.data.copy_(placed_as(value, param))
        run.optimizer.load_state_dict(state_dict)
    loaded = run.tensors()

    groups = [{**group, "params": copies(group["params"])} for group in run.optimizer.param_groups]
    alone = AdamW8bit(groups)
    alone.load_state_dict(whole_state_dict(run.optimizer))
    for optimizer in (run.optimizer, alone):
        take_steps(optimizer, range(2 * i, 2 * i + 2))
    assert_same_optimizers(run.optimizer, alone)

    saved = [whole(param) for param in params], whole_state_dict(run.optimizer)
    if way == "save_checkpoint":
        save_checkpoint(run.model, run.optimizer, folder / f"{i}")
    elif dist.get_rank() == 0:
        torch.save(saved, folder / f"{i}")
    return loaded, run.tensors()


@pytest.mark.parametrize("way", ["save_checkpoint", "whole"])
def test_resharding(way, tmp_path):
    """Where blocks are cut, 32-bit states of the very values go on, and they remain such."""
    number = {0: "0", 1: "2", 2: "1"}  # of each vector, as there are two param groups
    saved = None
    for i, ranks in enumerate(STAGES):
        results = run_on_ranks(ranks, stage, way, tmp_path, i)
        for loaded, _ in results:
            if saved is not None:
                assert_equal(loaded, in_32_bits(saved, [number[k] for k in cut(ranks)]))
        saved = results[0][1]


def saved_by_torch(folder: Path, ranks: int) -> None:
    """dcp.load reads codes into 32-bit states and casts them: SafeLoadPlanner refuses, or else load_state_dict."""
    run = Run("AdamW8bit", module=Vectors())
    state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    if dist.get_world_size() == ranks:
        take_steps(run.optimizer, range(2))
        state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
        dcp.save(state, checkpoint_id=folder)
        return
    with pytest.raises(CheckpointException, match="would be cast to"):
        dcp.load(state, checkpoint_id=folder, planner=SafeLoadPlanner())
    dcp.load(state, checkpoint_id=folder)
    before = run.tensors()
    with pytest.raises(ValueError, match=r"'exp_avg\w*' are 8-bit codes, cast by .* load_checkpoint"):
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    assert_equal(run.tensors(), before)


def test_codes_cast_by_torch(tmp_path):
    for ranks in (2, 3):
        run_on_ranks(ranks, saved_by_torch, tmp_path / "a", 2)


# ---- flattened by others ---------------------------------------------------------------------------------------------


def zero_redundancy() -> None:
    """torch's ZeRO gives every parameter to one rank: it steps and saves as a single optimizer does."""
    params = list(Vectors().parameters())
    options = {"lr": 1e-2, "min_8bit_size": MIN_8BIT, "percentile_clipping": 50}
    alone = AdamW8bit(copies(params), **options)
    optimizer = ZeroRedundancyOptimizer(params, AdamW8bit, parameters_as_bucket_view=True, **options)
    for one in (optimizer, alone):
        take_steps(one, range(2))
    optimizer.consolidate_state_dict(0)
    if dist.get_rank() == 0:
        states = optimizer.state_dict()["state"]
        expected = {f"{i}.{key}": x for i, state in alone.state_dict()["state"].items() for key, x in state.items()}
        assert_equal({f"{i}.{key}": x for i, state in states.items() for key, x in state.items()}, expected)
        saved = optimizer.state_dict()
    else:
        saved = {}
    (saved,) = broadcast([saved])
    fresh = ZeroRedundancyOptimizer(list(Vectors().parameters()), AdamW8bit, **options)
    fresh.load_state_dict(saved)
    for p, q in zip(fresh.param_groups[0]["params"], params, strict=True):
        p.data.copy_(q.data)
    for one in (fresh, alone):
        take_steps(one, range(2, 4))
    for p, q in zip(fresh.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def broadcast(objects: list[Any]) -> list[Any]:
    dist.broadcast_object_list(objects, src=0)
    return objects


def flat_shards() -> None:
    """ZeRO by hand: all parameters in one vector, of which every rank steps its part as the whole would be."""
    params = list(model().parameters())
    ranks, rank = dist.get_world_size(), dist.get_rank()
    flat = torch.cat([param.detach().flatten() for param in params])
    size = -(flat.numel() // -(ranks * 256)) * 256  # whole blocks
    flat = torch.cat([flat, torch.zeros(size * ranks - flat.numel())])
    part, complete = (nn.Parameter(x.clone()) for x in (flat[rank * size :][:size], flat))
    optimizer, expected = (AdamW8bit([p], lr=1e-2, min_8bit_size=MIN_8BIT) for p in (part, complete))
    for step in range(3):
        set_grads(params, step)
        grad = torch.cat([param.grad.flatten() for param in params])
        complete.grad = torch.cat([grad, torch.zeros(size * ranks - grad.numel())])
        part.grad = complete.grad[rank * size :][:size]
        optimizer.step()
        expected.step()
    parts = [torch.empty(size) for _ in range(ranks)]
    dist.all_gather(parts, part.detach())
    assert torch.equal(torch.cat(parts), complete)
    state, whole_state = optimizer.state[part], expected.state[complete]
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_absmax"].shape == (size // 256,)
    blocks = size // 256
    for key in ("exp_avg_absmax", "exp_avg_sq_absmax"):
        assert torch.equal(state[key], whole_state[key][rank * blocks :][:blocks])


@pytest.mark.parametrize("check", [zero_redundancy, flat_shards])
def test_flattened(check):
    run_on_ranks(2, check)
