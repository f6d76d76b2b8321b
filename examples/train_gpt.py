"""Trains a 10 M-parameter GPT on real text, once per optimizer, and sets the runs side by side.

    python examples/train_gpt.py                                 # torch's fp32 AdamW, then bnbops' 8-bit AdamW
    python examples/train_gpt.py --optimizer adamw8bit --data my_book.txt --steps 2000 --save-every 500
    python examples/train_gpt.py --optimizer adamw8bit --data my_book.txt --steps 2000 --resume out/adamw8bit-500.pt

With bnbops' optimizers a step (forward, backward, clipping, update) is one compiled graph. Every run of the same seed
sees the same weights and batches; a resumed run repeats the uninterrupted one bit for bit.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpt import GPT
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from text_data import Text, load_text
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from training import (
    CONFIG,
    SHAPE,
    Parser,
    Step,
    add_training_options,
    aligned,
    check_resumable,
    check_shape,
    lr_factor,
    positive_int,
    state_bytes,
    train_step,
)

import bnbops.optim

BASELINE, CONTENDER = "torch-adamw", "adamw8bit"  # what is trained by default
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    BASELINE: torch.optim.AdamW,
    "adam8bit": bnbops.optim.Adam8bit,
    "adam32bit": bnbops.optim.Adam32bit,
    "adamw8bit": bnbops.optim.AdamW8bit,
    "adamw32bit": bnbops.optim.AdamW32bit,
}
CHECKPOINT_KEYS = {"config", "history", "rng", "model", "optimizer", "scheduler"}
VALIDATION_BATCHES = 8
VALIDATIONS = 6  # in a run, the last one included
PROMPT = b"def "


@dataclass
class History:
    """What a run has measured so far; a checkpoint carries it."""

    train_loss: list[float] = field(default_factory=list)  # one per step
    step_seconds: list[float] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)


@dataclass
class Result:
    """A finished run."""

    optimizer: str
    config: dict[str, Any]
    parameters: int
    state_bytes: int
    graphs: str
    history: History
    sample: str

    @property
    def train_loss(self) -> float:
        return statistics.fmean(self.history.train_loss[-20:])

    @property
    def validation_loss(self) -> float:
        return self.history.validation_loss[-1][1]

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.history.step_seconds)


# ----------------------------------------------------------------------------------------------------------- training


def build_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    fused = {"fused": True} if name == BASELINE else {}
    return OPTIMIZERS[name](model.parameters(), lr=lr, betas=(0.9, 0.99), **fused)


def build_step(args: argparse.Namespace, name: str, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[Step, Any]:
    """One training step, and a function that tells how many graphs it was compiled to."""
    if not args.compile:
        return train_step(model.loss, model.parameters(), optimizer), lambda: "eager"
    if name == BASELINE:  # as PyTorch users do: the model is compiled, clipping and the fused optimizer are eager
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return torch._dynamo.lookup_backend(args.backend)(graph, inputs)

        loss_of = torch.compile(model.loss, backend=backend)
        return train_step(loss_of, model.parameters(), optimizer), lambda: f"{len(graphs)} + eager step"
    step = train_step(model.loss, model.parameters(), optimizer)
    compiled = bnbops.compiled_train_step(step, optimizer, backend=args.backend)
    return compiled, lambda: str(compiled.graph_count)


@torch.no_grad()
def evaluate(model: GPT, text: Text, args: argparse.Namespace) -> float:
    """The mean loss over a few held-out batches, the same ones every time."""
    batches = (
        text.batch("validation", args.seed, index, args.batch_size, args.block_size)
        for index in range(VALIDATION_BATCHES)
    )
    return statistics.fmean(model.loss(*batch).item() for batch in batches)


def train(name: str, text: Text, args: argparse.Namespace) -> Result:
    torch.compiler.reset()
    torch.manual_seed(args.seed)
    model = GPT(len(text.vocabulary), **{key: getattr(args, key) for key in SHAPE}).to(getattr(torch, args.dtype))
    optimizer = build_optimizer(name, model, args.lr)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, args.steps))
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = restore(args.checkpoint, stateful) if args.checkpoint else History()
    step, graphs = build_step(args, name, model, optimizer)
    config = run_config(name, text, args)

    start = len(history.train_loss)
    progress = tqdm(range(start, args.steps), desc=name, initial=start, total=args.steps, unit="step")
    for index in progress:
        batch = text.batch("train", args.seed, index, args.batch_size, args.block_size)
        began = time.perf_counter()
        loss = step(*batch).item()
        history.step_seconds.append(time.perf_counter() - began)
        history.train_loss.append(loss)
        if not math.isfinite(loss):
            raise SystemExit(f"{name} diverged at step {index + 1}: the loss is {loss}; try a lower --lr")
        scheduler.step()
        done = index + 1
        if done % max(1, args.steps // VALIDATIONS) == 0 or done == args.steps:
            history.validation_loss.append((done, evaluate(model, text, args)))
            progress.set_postfix(loss=f"{history.train_loss[-1]:.3f}", val=f"{history.validation_loss[-1][1]:.3f}")
        if args.save_every and (done % args.save_every == 0 or done == args.steps):
            save(args.out / f"{name}-{done}.pt", config, stateful, history)

    prompt, generator = text.vocabulary.encode(PROMPT), torch.Generator().manual_seed(args.seed)
    sample = text.vocabulary.decode(model.generate(prompt, 100, 0.8, generator))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Result(name, config, parameters, state_bytes(optimizer), graphs(), history, sample)


# -------------------------------------------------------------------------------------------------------- checkpoints


def run_config(name: str, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides what a run computes; compilation may change when resuming, though it may change bits."""
    return {"optimizer": name, "data": text.digest} | {key: getattr(args, key) for key in (*CONFIG, "dtype")}


def save(path: Path, config: dict[str, Any], stateful: dict[str, Any], history: History) -> None:
    """Batches are a function of seed and step, so the history's length is all of the data order there is to save."""
    checkpoint = {"config": config, "history": vars(history), "rng": torch.get_rng_state()}
    checkpoint |= {key: value.state_dict() for key, value in stateful.items()}
    partial = path.with_suffix(".partial")
    torch.save(checkpoint, partial)
    os.replace(partial, path)  # so that an interrupted save leaves no broken checkpoint


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is not one of `save`'s."""
    try:
        checkpoint = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no such checkpoint: {path}") from None
    except Exception as error:  # torch.load raises many kinds for a file that it does not know
        raise ValueError(f"{path} is not a checkpoint: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != CHECKPOINT_KEYS:
        raise ValueError(f"{path} is not a checkpoint of this script")
    return checkpoint


def restore(checkpoint: dict[str, Any], stateful: dict[str, Any]) -> History:
    for key, value in stateful.items():
        value.load_state_dict(checkpoint[key])
    torch.set_rng_state(checkpoint["rng"])
    return History(**checkpoint["history"])


# ------------------------------------------------------------------------------------------------------------- report


def table(results: Sequence[Result]) -> str:
    """The runs side by side, one column each; differences are to the first."""
    first = results[0]
    rows = [("", *(result.optimizer for result in results))]

    def row(label: str, cell: Callable[[Result], str]) -> None:
        rows.append((label, *(cell(result) for result in results)))

    row("train loss, last 20 steps", lambda run: f"{run.train_loss:.4f}")
    row("validation loss", lambda run: f"{run.validation_loss:.4f}")
    if len(results) > 1:
        row(f"  against {first.optimizer}", lambda run: f"{percent(run.validation_loss, first.validation_loss):+.2f} %")
    row("optimizer state, bytes", lambda run: f"{run.state_bytes:,}")
    row("  per parameter", lambda run: f"{run.state_bytes / run.parameters:.3f}")
    row("first step, with compilation", lambda run: f"{run.history.step_seconds[0]:.1f} s")
    row("step time, median", lambda run: f"{run.step_seconds * 1e3:.0f} ms")
    row("graphs per step", lambda run: run.graphs)
    return aligned(rows)


def percent(value: float, reference: float) -> float:
    return 100 * (value / reference - 1)


def smooth(values: Sequence[float], reach: int = 5) -> list[float]:
    """The mean over each value's neighbourhood, so that the curve does not lag behind."""
    return [statistics.fmean(values[max(0, index - reach) : index + reach + 1]) for index in range(len(values))]


def plot(results: Sequence[Result], path: Path) -> None:
    """The loss curves and, below them where there are several runs, how far each is from the first."""
    first, *others = results
    figure = Figure(figsize=(9, 7 if others else 5), layout="constrained")
    top, *bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1]) if others else [figure.subplots()]
    for index, run in enumerate(results):
        color, line, marker = ("C0", "-", "o") if run is first else (f"C{index}", "--", ".")  # runs overlap: show both
        steps = range(1, len(run.history.train_loss) + 1)
        memory = f"{run.state_bytes / run.parameters:.2f} bytes of optimizer state per parameter"
        top.plot(steps, run.history.train_loss, color=color, alpha=0.15, linewidth=1)
        top.plot(steps, smooth(run.history.train_loss), line, color=color, label=f"{run.optimizer}: training, smoothed")
        top.plot(*zip(*run.history.validation_loss, strict=True), marker, color=color, label=f"validation; {memory}")
    top.set(title=f"A GPT of {first.parameters / 1e6:.1f} M parameters on real text", ylabel="loss, nats per token")
    top.legend()
    top.grid(alpha=0.3)
    for axes in bottom:
        plot_differences(axes, first, others)
    (bottom or [top])[0].set_xlabel("step")
    figure.savefig(path, dpi=120)


def plot_differences(axes: Axes, first: Result, others: Sequence[Result]) -> None:
    steps, reference = zip(*first.history.validation_loss, strict=True)
    for index, run in enumerate(others, start=1):
        losses = [loss for _, loss in run.history.validation_loss]
        axes.plot(steps, list(map(percent, losses, reference)), "o-", color=f"C{index}", label=run.optimizer)
    axes.axhspan(-1, 1, color="gray", alpha=0.15, label="within 1 %")
    axes.axhline(0, color="C0", linewidth=1)
    axes.set_ylabel(f"validation loss\nagainst {first.optimizer}, %")
    axes.legend()
    axes.grid(alpha=0.3)


def write_report(results: Sequence[Result], out: Path) -> None:
    plot(results, out / "loss.png")
    runs = {run.optimizer: vars(run) | {"history": vars(run.history)} for run in results}
    (out / "history.json").write_text(json.dumps(runs, indent=1))
    (out / "table.txt").write_text(table(results) + "\n")


# ------------------------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    result = Parser(description=__doc__.partition("\n")[0])
    add_training_options(result)
    add = result.add_argument
    add("--optimizer", choices=OPTIMIZERS, help=f"train with this one only (default: {BASELINE}, then {CONTENDER})")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the step (the default)")
    add("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    add("--save-every", type=positive_int, metavar="STEPS", help="save checkpoints, OUT/OPTIMIZER-STEP.pt")
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue the run that saved this, given its other arguments")
    return result


def main(argv: Sequence[str] | None = None) -> list[Result]:
    cli = parser()
    args = cli.parse_args(argv)
    try:
        names, text = prepare(args)
    except (ValueError, OSError) as error:
        cli.error(str(error))
    results = [train(name, text, args) for name in names]
    write_report(results, args.out)
    for run in results:
        print(f"\n--- {run.optimizer} continues {PROMPT.decode()!r} ---\n{run.sample}")
    print(f"\n{table(results)}\n\nwritten to {args.out}: loss.png, history.json, table.txt")
    return results


def prepare(args: argparse.Namespace) -> tuple[list[str], Text]:
    """Checks all input before anything is computed or written; raises ValueError or OSError."""
    check_shape(args)
    text = load_text(args.data, args.vocabulary, args.block_size)
    names = [args.optimizer] if args.optimizer else [BASELINE, CONTENDER]
    args.checkpoint = load(args.resume) if args.resume else None
    if args.checkpoint:
        names = names if args.optimizer else [args.checkpoint["config"]["optimizer"]]
        saved, done = args.checkpoint["config"], len(args.checkpoint["history"]["train_loss"])
        check_resumable(args.resume, saved, run_config(names[0], text, args), done)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)  # else a compiled embedding's gradient is summed in any order
    torch.utils.deterministic.fill_uninitialized_memory = False
    args.out.mkdir(parents=True, exist_ok=True)
    return names, text


if __name__ == "__main__":
    main()
