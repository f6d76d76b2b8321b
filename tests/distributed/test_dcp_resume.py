"""Training goes on bit for bit on other ranks, through every way to save and load."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases.dcp import CASES, Run, assert_equal, load, save
from cases.ranks import run_on_ranks

STAGES = [(2, range(0, 2)), (4, range(2, 4)), (1, range(4, 6)), (2, range(6, 8))]
WAYS = ["save_checkpoint", "nested", "flat", "full", "async_save"]


def names(way: str) -> list[str]:
    return list(CASES) if way == "save_checkpoint" else [*CASES][:4]


def stage(way: str, folder: Path, i: int) -> dict[str, tuple[list[Tensor], dict[str, Tensor]]]:
    """Loads what the stage before has saved, trains, and saves. Losses, and all tensors."""
    results = {}
    for name in names(way):
        run = Run(name, seed=i)  # other values than the saved ones
        if i:
            load(way, run, folder / f"{name}{i - 1}")
        losses = run.train(STAGES[i][1])
        results[name] = losses, run.tensors()
        save(way, run, folder / f"{name}{i}")
    return results


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict[str, tuple[list[Tensor], dict[str, Tensor]]]]:
    """By stage: the losses and tensors of one process with whole parameters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {name: Run(name, shard=False) for name in CASES}
    stages = [{name: (run.train(steps), run.tensors()) for name, run in runs.items()} for _, steps in STAGES]
    torch.set_num_threads(threads)
    return stages


@pytest.mark.parametrize("way", [pytest.param("save_checkpoint", marks=pytest.mark.every_torch), *WAYS[1:]])
def test_training_goes_on_on_other_ranks(way, uninterrupted, tmp_path):
    for i, (count, _) in enumerate(STAGES):
        for results in run_on_ranks(count, stage, way, tmp_path, i):
            for name, (losses, tensors) in results.items():
                expected = uninterrupted[i][name]
                assert torch.equal(torch.stack(losses), torch.stack(expected[0])), (name, losses, expected[0])
                assert_equal(tensors, expected[1])
