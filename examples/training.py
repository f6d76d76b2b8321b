"""What the training scripts share: the step, the learning rate's schedule, and the command line."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]
SHAPE = ("layers", "width", "heads", "block_size")
CONFIG = ("steps", "batch_size", "lr", "seed", "vocabulary", *SHAPE)  # decides what a run computes


def train_step(loss_of: Step, trained: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> Step:
    """Forward, backward, clipping and update in one function."""
    trained = list(trained)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def lr_factor(step: int, steps: int) -> float:
    """A linear warm-up over the first tenth, then a cosine down to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Measured: the bytes of all state tensors, of this process's part where they are sharded."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(local(tensor).nbytes for tensor in tensors)


def check_resumable(path: Path, saved: dict[str, Any], config: dict[str, Any], done: int) -> None:
    """Raises ValueError where a checkpoint cannot be continued with this configuration."""
    differences = [f"{key} {saved.get(key)} is now {new}" for key, new in config.items() if saved.get(key) != new]
    if differences:
        raise ValueError(f"{path} is of another configuration: {', '.join(differences)}")
    if done >= config["steps"]:
        raise ValueError(f"{path} is of a run that finished its {config['steps']} steps")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: labels to the left, everything else to the right, a line below the heads."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line that says what is wrong, without the usage in front."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Data, training and the model's shape."""
    add = parser.add_argument
    backends = torch.compiler.list_backends(exclude_tags=())
    add("--data", type=Path, help="a text file, or a folder of them (default: Python's own standard library)")
    add("--out", type=Path, default=Path("out"), help="the folder that everything is written to (%(default)s)")
    add("--steps", type=positive_int, default=100, help="optimizer steps of a run (%(default)s)")
    add("--batch-size", type=positive_int, default=4, help="windows of text in a step (%(default)s)")
    add("--lr", type=positive_float, default=5e-4, help="the peak of the learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="decides the weights and the order of the text (%(default)s)")
    add("--backend", choices=backends, default="inductor", metavar="NAME", help="torch.compile's backend (%(default)s)")
    for name, default in {"vocabulary": 4096, "layers": 5, "width": 384, "heads": 6, "block-size": 128}.items():
        add(f"--{name}", type=positive_int, default=default, metavar="N", help="the model's (%(default)s)")


def check_shape(args: argparse.Namespace) -> None:
    if args.width % args.heads:
        raise ValueError(f"--width {args.width} is not a multiple of --heads {args.heads}")
