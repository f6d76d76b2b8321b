"""Runs a function on several ranks: real processes that talk over gloo."""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the server that ranks are forked from: a rank then starts in a tenth of a second, not in five.
_IMPORTS = (
    "torch._dynamo",
    "torch._functorch.partitioners",
    "torch._inductor.compile_fx",
    "networkx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "bnbops.nn",
    "pytest",
)
_SECONDS = 240  # for all of a function; a quiet machine needs a fraction of it


class RankError(AssertionError):
    """A rank raised, or died. Its own report is the message."""


def run_on_ranks(count: int, function: Callable[..., Any], *args: Any, seconds: float = _SECONDS) -> list[Any]:
    """Calls `function(*args)` on `count` ranks of a process group.

    Args:
        count: the world size.
        function: of a module's top level; torch runs it on one thread.
        args: what pickle can carry.
        seconds: after which all ranks are stopped.

    Returns:
        What each rank returned: tensors and plain values, which `torch.load` reads.

    Raises:
        RankError: a rank raised an exception, ended without an answer, or took too long.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        ranks = [
            context.Process(target=_rank, args=(rank, count, Path(folder, "store"), sender, function, args))
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(ranks, pipes, strict=True):
                process.start()
                sender.close()  # so that the rank's end tells of itself
            return _answers([receiver for receiver, _ in pipes], ranks, seconds)
        finally:
            for process in ranks:
                process.kill()
                process.join()


@cache
def _context() -> ForkServerContext:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTS))
    return context


def _answers(receivers: list[Connection], ranks: list[ForkServerProcess], seconds: float) -> list[Any]:
    answers: dict[int, Any] = {}
    failures: list[str] = []
    while (missing := [receiver for receiver in receivers if receivers.index(receiver) not in answers]) and (
        ready := wait(missing, timeout=5 if failures else seconds)  # when one has failed, others fail of it, or hang
    ):
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                failure, answer = receiver.recv()
            except EOFError:
                ranks[rank].join()
                failure, answer = f"ended with exit code {ranks[rank].exitcode} and no answer", b""
            answers[rank] = answer
            if failure:
                failures.append(f"rank {rank}: {failure}")
    if failures:
        raise RankError("\n".join(failures))
    if missing:
        late = [rank for rank in range(len(receivers)) if rank not in answers]
        raise RankError(f"no answer of rank {late} within {seconds} s")
    return [torch.load(io.BytesIO(answers[rank]), weights_only=True) for rank in sorted(answers)]


def _rank(
    rank: int, count: int, store: Path, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    failure, answer = None, io.BytesIO()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=_SECONDS)
        )
        torch.save(function(*args), answer)
        dist.barrier()  # nobody leaves while others still talk to it
    except BaseException:
        failure = traceback.format_exc()
    sender.send((failure, answer.getvalue()))
    sender.close()
    os._exit(0)  # no waiting for threads of a broken group
