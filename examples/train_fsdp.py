"""Trains the GPT of train_gpt.py on several processes, with checkpoints that any other number of them can continue.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --save-every 20
    torchrun --nproc-per-node 4 examples/train_fsdp.py --resume fsdp-out
    torchrun --nproc-per-node 2 examples/train_fsdp.py --mode data_parallel
    python examples/train_fsdp.py

Each process has a GPU to itself where there are GPUs, else they share the CPU; without torchrun there is one process.
Batches are a function of seed and step, and a batch is split evenly among the processes. So their number changes
nothing but the order in which gradients are summed: a run resumed on as many processes repeats the uninterrupted one
bit for bit; on another number, gradients differ in their last bits, and now and then an 8-bit code falls on the other
side of a rounding boundary. demo_fsdp.py measures how far the losses are apart.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from gpt import GPT, cross_entropy
from text_data import Text, load_text
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from training import (
    CONFIG,
    SHAPE,
    Parser,
    add_training_options,
    check_resumable,
    check_shape,
    local,
    lr_factor,
    positive_int,
    state_bytes,
    train_step,
)

import bnbops
from bnbops.distributed import data_parallel, load_checkpoint, save_checkpoint

MODES = {
    "fsdp2": "fully_shard: each process keeps its rows of weights, gradients and states",
    "data_parallel": "the same rows, and a step with its collectives is one compiled graph",
    "ddp": "each process keeps all of them",
}
OPTIMIZERS = [name for name in bnbops.optim.__all__ if name not in ("Optimizer", "GlobalOptimManager")]
T = TypeVar("T")


@dataclass
class Run:
    """A finished run."""

    config: dict[str, Any]
    mode: str
    resumed_at: int  # steps that were in the checkpoint
    losses: list[float]  # of whole batches, one a step, those in the checkpoint included
    state_bytes: list[int]  # the optimizer's, by rank
    adamw_bytes: list[int]  # what torch's AdamW would have, by rank


# ----------------------------------------------------------------------------------------------------------- training


def build(args: argparse.Namespace, vocabulary: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Every process makes the same weights, and keeps what it has to."""
    torch.manual_seed(args.seed)
    model: nn.Module = GPT(vocabulary, **{key: getattr(args, key) for key in SHAPE}).to(args.device)
    mesh = init_device_mesh(args.device.type, (dist.get_world_size(),))
    if args.mode == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif args.mode == "data_parallel":
        data_parallel(model, mesh, "fully_shard")
    else:
        model = DistributedDataParallel(model)
    return model, getattr(bnbops.optim, args.optimizer)(model.parameters(), lr=args.lr)


def train(args: argparse.Namespace, text: Text) -> Run:
    config = {"optimizer": args.optimizer, "data": text.digest} | {key: getattr(args, key) for key in CONFIG}
    model, optimizer = agreed(lambda: build(args, len(text.vocabulary)))
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, args.steps))
    losses = agreed(lambda: restore(args.resume, config, model, optimizer, scheduler)) if args.resume else []
    step = train_step(lambda tokens, targets: cross_entropy(model(tokens), targets), model.parameters(), optimizer)
    if args.mode == "data_parallel":
        step = bnbops.compiled_train_step(step, optimizer, backend=args.backend)

    start = len(losses)
    progress = tqdm(
        range(start, args.steps), args.optimizer, initial=start, total=args.steps, unit="step", disable=rank() != 0
    )
    for index in progress:
        batch = text.batch("train", args.seed, index, args.batch_size, args.block_size)
        losses.append(mean_over_ranks(step(*(own_part(x).to(args.device) for x in batch))))
        if not math.isfinite(losses[-1]):
            fail(f"{args.optimizer} diverged at step {index + 1}: the loss is {losses[-1]}; try a lower --lr", 1)
        scheduler.step()
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        done = index + 1
        if args.save_every and (done % args.save_every == 0 or done == args.steps):
            extra = {"config": config, "losses": losses, "scheduler": scheduler.state_dict()}
            save(args.out, done, args.keep, model, optimizer, extra)
    return Run(config, args.mode, start, losses, gathered(state_bytes(optimizer)), gathered(adamw_bytes(model)))


def own_part(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[rank()]


def mean_over_ranks(loss: Tensor) -> float:
    """The loss of the whole batch, as its parts are of one size."""
    total = loss.double()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def adamw_bytes(model: nn.Module) -> int:
    """Measured, on parameters without data."""
    parameters = [nn.Parameter(torch.empty_like(local(p.detach()), device="meta")) for p in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    optimizer.step()
    return state_bytes(optimizer)


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(folder: Path) -> dict[int, Path]:
    """By the number of steps that were done."""
    found = {path.name.removeprefix("step-"): path for path in folder.glob("step-*")}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def save(
    folder: Path, done: int, keep: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
) -> None:
    """Beside the former ones, of which the oldest then go. Those of steps to come are of a run that got further."""
    agreed(lambda: save_checkpoint(model, optimizer, folder / f"step-{done}", extra=extra))
    if rank() == 0:
        found = checkpoints(folder)
        for step in sorted(step for step in found if step <= done)[:-keep]:
            shutil.rmtree(found[step])


def restore(
    path: Path, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR
) -> list[float]:
    """The losses so far. `path` is a checkpoint, or a run's folder for its newest one."""
    if found := checkpoints(path):
        path = found[max(found)]
    try:
        extra = load_checkpoint(model, optimizer, path)
    except ValueError as error:
        raise ValueError(f"{path} is of another configuration: {error}") from error
    if extra.keys() != {"config", "losses", "scheduler"}:
        raise ValueError(f"{path} is not a checkpoint of this script")
    check_resumable(path, extra["config"], config, len(extra["losses"]))
    scheduler.load_state_dict(extra["scheduler"])
    return extra["losses"]


# ---------------------------------------------------------------------------------------------------------- processes


@contextmanager
def process_group() -> Iterator[None]:
    """torchrun's processes, or this one alone."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank()


def gathered(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(function: Callable[[], T]) -> T:
    """Calls it on every rank. Where one cannot go on, none does, and one says why."""
    problem = None
    try:
        result = function()
    except (ValueError, OSError, RuntimeError) as error:
        problem = str(error)
    for found in gathered(problem):
        if found is not None:
            fail(found)
    return result


def fail(message: str, code: int = 2) -> NoReturn:
    """On every rank: torchrun ends the others as soon as one has ended, so none may until the message is out."""
    if rank() == 0:
        print(f"train_fsdp.py: error: {message}", file=sys.stderr, flush=True)
    gathered(None)
    raise SystemExit(code)


# ------------------------------------------------------------------------------------------------------- command line


class AgreeingParser(Parser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> AgreeingParser:
    result = AgreeingParser(description=__doc__.partition("\n")[0])
    add_training_options(result)
    result.set_defaults(out=Path("fsdp-out"), batch_size=8)
    add, modes = result.add_argument, "; ".join(f"{name}: {what}" for name, what in MODES.items())
    add("--mode", choices=MODES, default="fsdp2", help=f"{modes} (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="AdamW8bit", metavar="NAME", help="of bnbops.optim (%(default)s)")
    add("--save-every", type=positive_int, metavar="STEPS", help="save checkpoints, OUT/step-STEP")
    add("--keep", type=positive_int, default=2, metavar="N", help="the last checkpoints to keep (%(default)s)")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue the run that saved this; a folder's newest")
    return result


def prepare(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Text]:
    """Checks all input before anything is computed or written; raises ValueError or OSError."""
    args = parser().parse_args(argv)
    check_shape(args)
    if args.batch_size % dist.get_world_size():
        raise ValueError(
            f"--batch-size {args.batch_size} cannot be split evenly among {dist.get_world_size()} processes; make it "
            "a multiple"
        )
    args.device = torch.device("cpu")
    if torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if here > torch.cuda.device_count():
            raise ValueError(f"{here} processes for {torch.cuda.device_count()} GPUs; start as many as there are GPUs")
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    text = load_text(args.data, args.vocabulary, args.block_size)
    torch.use_deterministic_algorithms(True)  # else a resumed run repeats nothing bit for bit
    torch.utils.deterministic.fill_uninitialized_memory = False
    args.out.mkdir(parents=True, exist_ok=True)
    return args, text


def run(argv: Sequence[str] | None = None) -> Run:
    """In a process group."""
    args, text = agreed(lambda: prepare(argv))
    result = train(args, text)
    if rank() == 0:
        (args.out / "history.json").write_text(json.dumps(asdict(result), indent=1))
        print(f"{dist.get_world_size()} x {args.device.type}, {args.mode}: loss {result.losses[-1]:.4f}")
        for number, (ours, theirs) in enumerate(zip(result.state_bytes, result.adamw_bytes, strict=True)):
            print(f"rank {number}: optimizer state {ours:,} bytes (torch's AdamW: {theirs:,})")
    return result


def main(argv: Sequence[str] | None = None) -> Run:
    with process_group():
        return run(argv)


if __name__ == "__main__":
    main()
