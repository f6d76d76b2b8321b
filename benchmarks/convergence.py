"""Does training with 8-bit states reach the loss of training with 32-bit states? Every optimizer, on two small tasks.

    python benchmarks/convergence.py

The two runs of a pair see the same weights, batches and learning rates. Losses are of validation data, in nats, and
means over the seeds; the difference between two seeds tells how much a loss means.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import bnbops

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt import GPT
from text_data import load_text


@dataclass(frozen=True)
class Task:
    """A model, its training batches as a function of seed and step, and the loss on held-out data."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int, int], Tensor]  # of the training batch of (seed, step)
    validate: Callable[[nn.Module], Tensor]
    steps: int


@dataclass(frozen=True)
class Setting:
    """An optimizer with its options, and its peak learning rate by task."""

    optimizer: str  # `<name>8bit` and `<name>32bit` are the classes
    lr: dict[str, float]
    options: dict[str, Any]


SETTINGS = {
    "Adam": Setting("Adam", {"text": 2e-3, "digits": 2e-3}, {}),
    "AdamW": Setting("AdamW", {"text": 2e-3, "digits": 2e-3}, {"weight_decay": 0.1}),
    "AdEMAMix": Setting("AdEMAMix", {"text": 2e-3, "digits": 2e-3}, {}),
    "Lion": Setting("Lion", {"text": 7e-4, "digits": 1e-3}, {"weight_decay": 0.1}),
    "Signum": Setting("Signum", {"text": 7e-4, "digits": 1e-3}, {"weight_decay": 0.1}),
    "SGD": Setting("SGD", {"text": 0.1, "digits": 0.1}, {"momentum": 0.9}),
    "LARS": Setting("LARS", {"text": 0.3, "digits": 0.2}, {"momentum": 0.9}),
    "LAMB": Setting("LAMB", {"text": 2e-2, "digits": 2e-2}, {}),
    "RMSprop": Setting("RMSprop", {"text": 5e-4, "digits": 1e-3}, {}),
    "RMSprop, momentum": Setting("RMSprop", {"text": 1e-4, "digits": 1e-4}, {"momentum": 0.9}),
    "Adagrad": Setting("Adagrad", {"text": 5e-3, "digits": 1e-2}, {}),
}


# --------------------------------------------------------------------------------------------------------------- tasks


def text_task(steps: int, width: int = 64, block_size: int = 32, batch_size: int = 8) -> Task:
    """The example's GPT, with two narrow layers, on the bytes of the standard library's sources."""
    text = load_text(None, 256, block_size)
    starts = torch.linspace(0, len(text.validation) - block_size - 1, 128).long()
    held_out = torch.stack([text.validation[start : start + block_size + 1] for start in starts.tolist()])
    return Task(
        "text",
        lambda: GPT(256, layers=2, width=width, heads=width // 32, block_size=block_size),
        lambda model, seed, step: model.loss(*text.batch("train", seed, step, batch_size, block_size)),
        lambda model: model.loss(held_out[:, :-1], held_out[:, 1:]),
        steps,
    )


def digits_task(steps: int, width: int = 128, batch_size: int = 128) -> Task:
    """An MLP of three layers on scikit-learn's 1797 handwritten digits of 8 x 8 pixels, a fifth of them held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.data).float()[order] / 16
    labels = torch.from_numpy(digits.target).long()[order]
    held_out = len(order) // 5

    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        batch = torch.randint(held_out, len(order), (batch_size,), generator=generator)
        return F.cross_entropy(model(images[batch]), labels[batch])

    def build() -> nn.Module:
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    return Task(
        "digits", build, loss, lambda model: F.cross_entropy(model(images[:held_out]), labels[:held_out]), steps
    )


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """Losses on held-out data before and after training, and the share of state elements that are 8-bit."""

    before: float
    after: float
    quantized: float


def run(task: Task, setting: Setting, bits: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model = task.build()
    cls = getattr(bnbops.optim, f"{setting.optimizer}{bits}bit")
    optimizer = cls(model.parameters(), lr=setting.lr[task.name], **setting.options)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, task.steps))
    before = validate(task, model)
    for step in range(task.steps):
        task.loss(model, seed, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return Run(before, validate(task, model), quantized(optimizer))


def lr_factor(step: int, steps: int) -> float:
    """A linear warm-up over the first tenth, then a cosine down to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


@torch.no_grad()
def validate(task: Task, model: nn.Module) -> float:
    return task.validate(model).item()


def quantized(optimizer: torch.optim.Optimizer) -> float:
    states = [item for state in optimizer.state.values() for item in state.items()]
    sizes = [(t.numel(), t.dtype == torch.uint8) for key, t in states if key != "step" and not key.endswith("_absmax")]
    return sum(size for size, is_8bit in sizes if is_8bit) / sum(size for size, _ in sizes)


@dataclass(frozen=True)
class Comparison:
    """The pairs of runs of one setting on one task, by seed."""

    runs: list[tuple[Run, Run]]  # 32-bit, 8-bit

    def mean(self, column: int) -> float:
        return statistics.fmean(pair[column].after for pair in self.runs)

    @property
    def difference(self) -> float:
        """Of the 8-bit loss, relative to the 32-bit one."""
        return self.mean(1) / self.mean(0) - 1

    @property
    def spread(self) -> float:
        """How far apart the seeds' 32-bit losses are, relative to their mean."""
        losses = [pair[0].after for pair in self.runs]
        return (max(losses) - min(losses)) / self.mean(0)


def compare(task: Task, setting: Setting, seeds: Sequence[int]) -> Comparison:
    return Comparison([(run(task, setting, 32, seed), run(task, setting, 8, seed)) for seed in seeds])


# -------------------------------------------------------------------------------------------------------------- report


def report(task: Task, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Comparison]:
    print(f"\n| {task.name} | lr | 32-bit states | 8-bit states | difference | seeds differ by |", flush=True)
    print("| --- | --: | --: | --: | --: | --: |")
    results = {}
    for name in names:
        setting = SETTINGS[name]
        results[name] = c = compare(task, setting, seeds)
        losses = f"{c.mean(0):.4f} | {c.mean(1):.4f}"
        print(f"| {name} | {setting.lr[task.name]} | {losses} | {c.difference:+.2%} | {c.spread:.1%} |", flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # faster for tensors this small
    for task in (text_task(200), digits_task(200)):
        report(task, args.optimizers, range(args.seeds))


if __name__ == "__main__":
    main()
