"""`python -m bnbops`: what is installed and where, whether it computes right, and how much memory training needs."""

from __future__ import annotations

import argparse
import ast
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import bnbops
from bnbops import self_check
from bnbops._library import ISAS
from bnbops.estimate import Bytes, Estimate, estimate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def info(_args: argparse.Namespace) -> int:
    """Prints versions and the machine, then checks every operator. Returns 1 if one of them is wrong."""
    print(f"bnbops {bnbops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"instruction set: {bnbops.isa()} (environment variable BNBOPS_ISA overrides: {', '.join(ISAS)})")
    print(f"threads: {torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS)")
    print(f"CUDA library: {'loaded' if bnbops.has_cuda else 'none'}; CUDA devices: {torch.cuda.device_count()}")
    devices = ["cpu"] + ["cuda"] * (bnbops.has_cuda and torch.cuda.is_available())
    wrong = sum(_check_operators(device) for device in devices)
    print(f"operators that are wrong: {wrong}" if wrong else "all operators are right")
    return 1 if wrong else 0


def _check_operators(device: str) -> int:
    wrong = 0
    print(f"operators on {device}, against plain torch:")
    for name, count, problems in self_check.run(device):
        print(f"  {name:<32}" + (f"{len(problems)} of {count} samples differ" if problems else f"ok ({count} samples)"))
        for problem in problems:
            print(f"      {problem}")
        wrong += bool(problems)
    return wrong


def library(_args: argparse.Namespace) -> int:
    """Prints the path of the shared library with the operators, for programs without Python."""
    print(bnbops.library_path())
    return 0


def memory(args: argparse.Namespace) -> int:
    """Prints the bytes of weights, gradients and states, a row for each size and optimizer."""
    dtypes = {"dtype": DTYPES[args.dtype], "grad_dtype": DTYPES.get(args.grad_dtype)}
    try:
        estimates = [
            estimate(params, optimizer, shards=args.shards, **dtypes, **dict(args.option))
            for params in args.params
            for optimizer in args.optimizer
        ]
    except (TypeError, ValueError) as error:
        args.refuse(str(error))
    if args.json:
        print(json.dumps([_record(e) for e in estimates], indent=1))
        return 0
    print("Taken for large matrices with rows of a multiple of 256 elements; 1 GB is 10^9 bytes.\n")
    print("| optimizer | parameters | weights | gradients | states | scales | steps | total |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for e in estimates:
        print(f"| {e.optimizer} | {e.parameters:,} | {_cells(e.whole)} |")
        if e.shards > 1:
            print(f"| - each of {e.shards} ranks | | {_cells(e.per_rank)} |")
    return 0


def _record(e: Estimate) -> dict[str, Any]:
    totals = {part: {**asdict(getattr(e, part)), "total": getattr(e, part).total} for part in ("whole", "per_rank")}
    return {**asdict(e), **totals}


def _cells(b: Bytes) -> str:
    return " | ".join(_human(n) for n in (b.weights, b.grads, b.states, b.scales, b.steps, b.total))


def _human(count: int) -> str:
    """A number of bytes with the largest unit that leaves it at least 1."""
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.2f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}" if power else f"{count} B"


def _count(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of parameters such as 7e9, got {text!r}") from None


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE such as momentum=0.9, got {text!r}") from None


def _add_estimate(commands: Any) -> None:
    command = commands.add_parser("estimate", help="how many bytes training needs", description=memory.__doc__)
    command.set_defaults(run=memory, refuse=command.error)
    add = command.add_argument
    add("--params", type=_count, nargs="+", required=True, metavar="N", help="numbers of parameters, such as 7e9")
    add("--optimizer", nargs="+", required=True, metavar="NAME", help="classes of bnbops.optim, in any case")
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights (%(default)s)")
    add("--grad-dtype", choices=DTYPES, help="of the gradients (the weights')")
    add("--shards", type=int, default=1, metavar="N", help="ranks that share all by rows, as FSDP2 does (%(default)s)")
    add("--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="the optimizers' arguments")
    add("--json", action="store_true", help="print exact bytes as JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bnbops", description="8-bit optimizers and quantization for torch")
    parser.set_defaults(run=info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("info", help="print versions and check every operator (the default)").set_defaults(run=info)
    commands.add_parser("library", help="print the path of the operators' shared library").set_defaults(run=library)
    _add_estimate(commands)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
