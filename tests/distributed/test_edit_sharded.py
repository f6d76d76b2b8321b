"""States of sharded parameters, read and changed by their values, are those of a single process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from bnbops.optim import Adagrad8bit, AdamW8bit, Optimizer
from cases.dcp import FROM_RANK_0, FULL, Run
from cases.optimizers import params
from cases.ranks import run_on_ranks
from cases.sharded import MIN_8BIT, assert_same_optimizers, placed_as, set_grads, whole

SHAPES = [(65, 80), (130,), (3, 512), (2048,), (1000,), (8, 1024)]  # 8 bits, 32, 8 and an empty shard, 8, 32 if cut, 8


def pair(cls: type[Optimizer]) -> list[tuple[list[nn.Parameter], Optimizer]]:
    """Sharded and whole, after two steps; the last one is sharded by columns. Precisions are alike."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = params(*SHAPES)
    q = [
        nn.Parameter(distribute_tensor(x.detach(), mesh, [Shard(int(x.shape == (8, 1024)))], src_data_rank=None))
        for x in p
    ]
    options = {"min_8bit_size": MIN_8BIT, "lr": 0.01, "percentile_clipping": 50}
    options |= {"initial_accumulator_value": 0.25} if cls is Adagrad8bit else {}
    pairs = [(x, cls([{"params": [*x[:4], x[5]]}, {"params": [x[4]], "optim_bits": 32}], **options)) for x in (q, p)]
    for x, optimizer in pairs:
        take_steps(x, optimizer, range(2))
    return pairs


def take_steps(p: list[nn.Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(p, step)
        optimizer.step()


def by_values() -> None:
    for cls in (AdamW8bit, Adagrad8bit):
        (q, optimizer), (p, expected) = pairs = pair(cls)
        for x, y in zip(q, p, strict=True):
            found, wanted = optimizer.dequantized_state(x), expected.dequantized_state(y)
            assert found.keys() == wanted.keys()
            for key, value in found.items():
                assert torch.equal(whole(value), wanted[key])
                assert isinstance(value, DTensor) == (key not in ("step", "gnorm_vec"))
        generator = torch.Generator().manual_seed(1)
        names = [name for name in found if name not in ("step", "gnorm_vec")]
        for i, (x, y) in enumerate(zip(q, p, strict=True)):
            for name in names:
                value = torch.rand(y.shape, generator=generator)
                expected.set_state(y, {name: value, "step": 5})
                given = [value, placed_as(value, x), distribute_tensor(value, x.device_mesh, [Replicate()])][i % 3]
                optimizer.set_state(x, {name: given, "step": 5})
        masks = [torch.rand(y.shape, generator=generator) < 0.1 for y in p]
        expected.reset_state(p, masks)
        optimizer.reset_state(
            q, [placed_as(m, x) if i % 2 else m for i, (m, x) in enumerate(zip(masks, q, strict=True))]
        )
        assert_same_optimizers(optimizer, expected)
        for x, one in pairs:
            take_steps(x, one, range(2, 4))
            one.reset_state(x[2:])
            take_steps(x, one, range(4, 6))
        assert_same_optimizers(optimizer, expected)


def refusals() -> None:
    (q, optimizer), (_, expected) = pair(AdamW8bit)
    mesh = q[0].device_mesh
    partial = DTensor.from_local(torch.ones(65, 80), mesh, [Partial()], run_check=False)
    for call, match in (
        (lambda: optimizer.set_state(q[0], exp_avg=partial), "partial sum"),
        (lambda: optimizer.set_state(q[0], exp_avg=torch.ones(33, 80)), r"must have shape \[65, 80\], got \[33, 80\]"),
        (
            lambda: expected.set_state(
                expected.param_groups[0]["params"][0], exp_avg=placed_as(torch.ones(65, 80), q[0])
            ),
            "is sharded",
        ),
        (lambda: optimizer.reset_state(q[0], placed_as(torch.ones(65, dtype=torch.bool), q[0])), "broadcast|DTensor"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert_same_optimizers(optimizer, expected)


WRITES: list[Callable[[DTensor], Any]] = [
    lambda x: x.zero_(),
    lambda x: x.to_local().zero_(),
    lambda x: x.mul_(placed_as(torch.ones(x.shape, dtype=torch.uint8), x)),
]


def written_as_numbers() -> None:
    """On every rank, or where this rank's part was written."""
    for write in WRITES:
        (q, optimizer), _ = pair(AdamW8bit)
        write(optimizer.state[q[5]]["exp_avg"])
        for step in (optimizer.step, optimizer.init_state):
            with pytest.raises(RuntimeError, match=r"'exp_avg' of a parameter of shape \[8, 1024\].* reset_state"):
                step()
        optimizer.reset_state(q[5])
        optimizer.step()


def read_in_place(folder: Path) -> None:
    """torch's checkpoints read into the states that there are, in pieces from other numbers of ranks, too."""
    run = Run("AdamW8bit")
    run.train(range(2))
    state = get_optimizer_state_dict(run.model, run.optimizer)
    if dist.get_world_size() == 4:
        dcp.save(state, checkpoint_id=folder)
        return
    full = get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
    for read in (
        lambda: dcp.load(state, checkpoint_id=folder),
        lambda: dcp.load({"state": run.optimizer.state_dict()["state"]}, checkpoint_id=folder / "own"),
        lambda: set_optimizer_state_dict(run.model, run.optimizer, full, options=FROM_RANK_0),
    ):
        if not (folder / "own").exists():
            dcp.save({"state": run.optimizer.state_dict()["state"]}, checkpoint_id=folder / "own")
        read()
        run.train(range(2))
    local = run.optimizer.state[next(run.model.parameters())]["exp_avg"].to_local()
    local.zero_()
    with pytest.raises(RuntimeError, match="reset_state"):
        run.train(range(2))


@pytest.mark.parametrize("check", [by_values, refusals, written_as_numbers])
def test_on_two_ranks(check):
    run_on_ranks(2, check)


def test_reading_in_place_is_fine(tmp_path):
    for ranks in (4, 2):
        run_on_ranks(ranks, read_in_place, tmp_path)
