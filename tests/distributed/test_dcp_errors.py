"""Damaged checkpoints and those of something else: every rank says so, and goes on training as if nothing had been."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from bnbops.distributed import SafeLoadPlanner, load_checkpoint, save_checkpoint
from bnbops.optim import AdamW8bit
from cases.dcp import Run, assert_equal, in_32_bits, unchanged
from cases.ranks import run_on_ranks
from cases.sharded import model, set_grads

SHARD = "__1_0.distcp"


def edit(file: str, change: Callable[[bytes], bytes], *more: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / file).write_bytes(change((path / file).read_bytes()))
        for action in more:
            action(path)

    return damage


def remove(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# What happened to it, and what load_checkpoint says.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit": (edit(SHARD, flipped), f"is damaged: '{SHARD}' is not as it was saved|rank . failed"),
    "truncated": (edit(SHARD, lambda data: data[:-5000]), f"is damaged: '{SHARD}'|rank . failed"),
    "no shard": (remove(SHARD), f"lacks its file '{SHARD}'|rank . failed"),
    "no .metadata": (remove(".metadata"), "is no checkpoint, or an incomplete one"),
    "truncated .metadata": (edit(".metadata", lambda data: data[:-50]), "'.metadata' cannot be read"),
    "nothing": (shutil.rmtree, "is no checkpoint"),
    # As dcp.save leaves it.
    "truncated, no checksums": (
        edit(SHARD, lambda data: data[:-5000], remove("checksums.json")),
        "cannot be read: rank .*Nothing was loaded",
    ),
    "no shard, no checksums": (
        edit(SHARD, lambda data: data, remove("checksums.json"), remove(SHARD)),
        f"cannot be read: rank .*FileNotFoundError.*{SHARD}.*Nothing was loaded",
    ),
}


def damaged(folder: Path) -> None:
    saved = Run("AdamW8bit")
    saved.train(range(2))
    save_checkpoint(saved.model, saved.optimizer, folder / "good")
    live = Run("AdamW8bit", seed=1)
    live.train(range(1))
    for i, (damage, message) in enumerate(DAMAGE.values()):
        bad = folder / f"bad{i}"
        if dist.get_rank() == 0:
            shutil.copytree(folder / "good", bad)
            damage(bad)
        dist.barrier()
        with unchanged(live), pytest.raises(RuntimeError, match=message):
            load_checkpoint(live.model, live.optimizer, bad)
    failing = mock.patch.object(live.optimizer, "load_state_dict", side_effect=OSError("no room"))
    with unchanged(live), pytest.raises((OSError, RuntimeError), match=r"no room"):
        if dist.get_rank() == 1:
            failing.start()
        load_checkpoint(live.model, live.optimizer, folder / "good")
    mock.patch.stopall()
    live.train(range(1))
    load_checkpoint(live.model, live.optimizer, folder / "good")
    assert_equal(live.tensors(), saved.tensors())


def test_damaged_checkpoints(tmp_path):
    run_on_ranks(2, damaged, tmp_path)


def wider() -> nn.Module:
    module = model()
    module[0], module[2] = nn.Linear(300, 12), nn.Linear(12, 300)
    return module


def regrouped() -> Run:
    run = Run("AdamW8bit")
    first, second = run.optimizer.param_groups
    second["params"].append(first["params"].pop())
    return run


# What it is loaded into, and what load_checkpoint says.
OTHERS: dict[str, tuple[Callable[[], Run], str]] = {
    "other shapes": (lambda: Run("AdamW8bit", module=wider()), r"was saved with shape \[.*\], the model's is \["),
    "more names": (
        lambda: Run("AdamW8bit", module=nn.Sequential(*model(), nn.Linear(3, 3))),
        r"not of the model: it lacks \['8.bias', '8.weight'\]",
    ),
    "fewer names": (
        lambda: Run("AdamW8bit", module=model()[:-1]),
        r"not of the model: it lacks \[\], and has \['7.bias', '7.weight'\]",
    ),
    "other dtype": (lambda: Run("AdamW8bit", module=model(torch.bfloat16)), "saved as torch.float32 .* torch.bfloat16"),
    "32-bit states": (lambda: Run("AdamW32bit"), "(?s)optim_bits=8, .* the optim_bits it was saved with"),
    "other states": (lambda: Run("SGD8bit"), "saved state of '0.weight' .* does not fit: its keys do not fit"),
    "other options": (lambda: Run("LAMB8bit"), "is it of another optimizer"),
    "other groups": (regrouped, "has param groups of .*make them alike"),
}


def of_something_else(folder: Path) -> None:
    for name in ("AdamW8bit", "AdamW32bit"):
        run = Run(name)
        run.train(range(2))
        save_checkpoint(run.model, run.optimizer, folder / name)
    other = Run("AdamW8bit")
    with pytest.raises(ValueError, match="the optimizer has parameters that are not the model's"):
        load_checkpoint(run.model, other.optimizer, folder / "AdamW8bit")
    for make, message in OTHERS.values():
        run = make()
        for _ in range(2):  # without states, and with
            with unchanged(run), pytest.raises(ValueError, match=message):
                load_checkpoint(run.model, run.optimizer, folder / "AdamW8bit")
            run.optimizer.init_state()
    run = Run("AdamW8bit")
    with unchanged(run), pytest.raises(ValueError, match=r"(?s)optim_bits=32, .* the optim_bits it was saved with"):
        load_checkpoint(run.model, run.optimizer, folder / "AdamW32bit")

    # What else is in the way of a checkpoint stays there.
    if dist.get_rank() == 0:
        (folder / "notes").mkdir()
        (folder / "notes" / "a").touch()
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError), match="is no checkpoint and would be replaced"):
        save_checkpoint(run.model, run.optimizer, folder / "notes")
    assert os.listdir(folder / "notes") == ["a"]


def columns(width: int, placement: Placement, **options: Any) -> Run:
    """A weight sharded over 2 ranks, with states from two steps if it is the saved one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    run = Run.__new__(Run)
    run.model = nn.Linear(width, 16, bias=False)
    run.model.weight = nn.Parameter(distribute_tensor(torch.ones(16, width), mesh, [placement]))
    run.optimizer = AdamW8bit(run.model.parameters(), lr=0.01, **options)
    for step in range(2):
        set_grads([run.model.weight], step)
        run.optimizer.step()
    return run


def columns_that_cut_blocks(folder: Path) -> None:
    """8-bit states become 32-bit ones of their values; 32-bit ones, which such a parameter has, go on elsewhere."""
    for width, placement in ((1024, Shard(1)), (640, Shard(0)), (640, Shard(1))):
        run, name = columns(width, placement), f"{width}{placement}"
        assert ("exp_avg_absmax" in run.optimizer.state[run.model.weight]) == (name != "640S(1)")
        save_checkpoint(run.model, run.optimizer, folder / name)
        for other in (Shard(0), Replicate(), Shard(1)):
            live = columns(width, other)
            load_checkpoint(live.model, live.optimizer, folder / name)
            cut = (name, other) == ("640S(0)", Shard(1))
            assert_equal(live.tensors(), in_32_bits(run.tensors()) if cut else run.tensors())
            set_grads([live.model.weight], 2)
            live.optimizer.step()


def through_torch(folder: Path) -> None:
    """torch's own loading casts codes to floats: SafeLoadPlanner refuses, and without it load_state_dict does."""
    for name, other in (("AdamW8bit", "AdamW32bit"), ("AdamW32bit", "AdamW8bit")):
        run, live = Run(name), Run(other)
        run.train(range(1))
        live.train(range(1))
        dcp.save({"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}, checkpoint_id=folder / name)
        state = {"optimizer": get_optimizer_state_dict(live.model, live.optimizer)}
        with unchanged(live), pytest.raises(CheckpointException, match=r"would be cast to|Missing key"):
            dcp.load(state, checkpoint_id=folder / name, planner=SafeLoadPlanner())
    dcp.save({"optimizer": {"code": Path()}}, checkpoint_id=folder / "code")
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        dcp.load({"optimizer": {"code": None}}, checkpoint_id=folder / "code", planner=SafeLoadPlanner())
    run = Run("AdamW32bit")
    run.train(range(1))
    state = {"optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.load(state, checkpoint_id=folder / "AdamW8bit")
    with pytest.raises(ValueError, match="loaded it, it has cast them"):
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])


@pytest.mark.parametrize("check", [of_something_else, columns_that_cut_blocks, through_torch])
def test_checkpoints_of_something_else(check, tmp_path):
    run_on_ranks(2, check, tmp_path)
