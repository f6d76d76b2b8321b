"""The processes that distributed tests run on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from cases.ranks import RankError, run_on_ranks


def summed(x: float) -> torch.Tensor:
    total = torch.tensor(x * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return total


def failing(kind: str) -> None:
    if dist.get_rank() == 1:
        if kind == "raises":
            raise ValueError("planted")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def silent() -> None:
    time.sleep(60)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_rank_answers(count):
    assert run_on_ranks(count, summed, 2.0) == [torch.tensor(count * (count + 1.0))] * count


@pytest.mark.parametrize(("kind", "message"), [("raises", "rank 1: .*planted"), ("dies", "rank 1: .*exit code -9")])
def test_a_failing_rank_is_reported(kind, message):
    with pytest.raises(RankError, match=f"(?s){message}"):
        run_on_ranks(2, failing, kind)


def test_a_silent_rank_is_stopped():
    with pytest.raises(RankError, match=r"no answer of rank \[0, 1\] within 1 s"):
        run_on_ranks(2, silent, seconds=1)
