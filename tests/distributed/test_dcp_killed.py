"""A process killed while it saves leaves the former checkpoint, or the new one."""

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from bnbops.distributed import load_checkpoint, save_checkpoint
from cases.dcp import Run, assert_equal
from cases.ranks import RankError, run_on_ranks

# Where the process is killed: rank, what it is about to do, and how often it has done that before.
PLACES = {
    "writing": (1, (filesystem, "_write_item"), 7),
    "metadata": (0, (filesystem.os, "fsync"), 1),
    "first rename": (0, (Path, "rename"), 1),  # the one before is of .metadata
    "second rename": (0, (Path, "rename"), 2),
}


def save_two(folder: Path, place: str) -> None:
    run = Run("AdamW8bit")
    run.train(range(2))
    save_checkpoint(run.model, run.optimizer, folder / place, extra={"saved": 1})
    rank, (owner, name), times = PLACES[place]
    calls, called = iter(range(100)), getattr(owner, name)

    def dying(*args: object) -> object:
        if next(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*args)

    run.train(range(2, 4))
    if dist.get_rank() == rank:
        mock.patch.object(owner, name, dying).start()
    save_checkpoint(run.model, run.optimizer, folder / place, extra={"saved": 2})


def load_and_save(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What there is after the kill; and saving goes on."""
    loaded = {}
    for place in PLACES:
        run = Run("AdamW8bit", seed=5)
        assert load_checkpoint(run.model, run.optimizer, folder / place) == {"saved": 1}
        loaded[place] = run.tensors()
        run.train(range(2, 4))
        save_checkpoint(run.model, run.optimizer, folder / place, extra={"saved": 3})
        other = Run("AdamW8bit", seed=6)
        assert load_checkpoint(other.model, other.optimizer, folder / place) == {"saved": 3}
        assert_equal(other.tensors(), run.tensors())
    assert sorted(os.listdir(folder)) == sorted(PLACES)  # nothing is left over
    return loaded


def test_the_former_checkpoint_is_there(tmp_path):
    for place, (rank, _, _) in PLACES.items():
        with pytest.raises(RankError, match=f"rank {rank}: ended with exit code -9"):
            run_on_ranks(2, save_two, tmp_path, place)
    expected = Run("AdamW8bit", shard=False)
    expected.train(range(2))
    for loaded in run_on_ranks(2, load_and_save, tmp_path):
        for tensors in loaded.values():
            assert_equal(tensors, expected.tensors())
