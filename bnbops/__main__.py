"""`python -m bnbops`: what is installed and where, whether it computes right, and how much memory training needs."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

import bnbops
from bnbops import report
from bnbops._library import ISAS
from bnbops.estimate import Bytes, Estimate, estimate
from bnbops.testing import self_check

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def info(args: argparse.Namespace) -> int:
    """Prints versions, the machine and what is missing for what, checks every operator: 1 if one is wrong."""
    say = (lambda _line: None) if args.json else print
    found = report.collect()
    say("\n".join(_lines(found)))
    operators: dict[str, dict[str, Any]] = {}
    for device in ["cpu"] + ["cuda"] * (bnbops.has_cuda and torch.cuda.is_available()):
        say(f"operators on {device}, against plain torch:")
        operators[device] = {}
        for name, count, problems in self_check.run(device):
            operators[device][name] = {"samples": count, "problems": problems}
            state = f"{len(problems)} of {count} samples differ" if problems else f"ok ({count} samples)"
            say("\n      ".join([f"  {name:<32}{state}", *problems]))
    wrong = sum(bool(result["problems"]) for results in operators.values() for result in results.values())
    say(f"operators that are wrong: {wrong}" if wrong else "all operators are right")
    if args.json:
        print(json.dumps({**found, "operators": operators, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def _lines(found: dict[str, Any]) -> list[str]:
    python, torch_, cpu = found["python"], found["torch"], found["cpu"]
    return [
        f"bnbops {found['bnbops']}, torch {torch_['version']}, Python {python['version']}",
        f"needs torch{torch_['needs']} and Python{python['needs']}; {found['platform']}",
        f"instruction set: {cpu['isa']} (environment variable BNBOPS_ISA overrides: {', '.join(ISAS)})",
        f"instruction sets of this machine and build: {', '.join(cpu['available'])}",
        f"threads: {cpu['threads']} (torch.set_num_threads or OMP_NUM_THREADS)",
        *_cuda_lines(found["cuda"]),
        *(f"missing for {sentence}" for sentence in found["missing"]),
    ]


def _cuda_lines(cuda: dict[str, Any]) -> list[str]:
    state = "loaded" if cuda["loaded"] else "none" if cuda["library"] is None else "there, not loaded"
    lines = [f"CUDA library: {state}; CUDA devices: {len(cuda['devices'])}"]
    if cuda["architectures"]:
        lines.append(f"CUDA library built by CUDA {cuda['toolkit']} for {', '.join(cuda['architectures'])}")
    if cuda["driver"]:
        lines.append(f"NVIDIA driver: {cuda['driver']['version']}, runs CUDA {cuda['driver']['cuda']}")
    for i, device in enumerate(cuda["devices"]):
        code = "has code for it" if device["has_code"] else "has no code for it"
        lines.append(f"GPU {i}: {device['name']}, compute capability {device['capability']}: the library {code}")
    return lines


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
    return " | ".join(map(_human, [*asdict(b).values(), b.total]))


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
    is_word = value.isidentifier() and value not in ("True", "False", "None")
    try:
        return name, value if is_word else ast.literal_eval(value)
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
    parser.add_argument("--json", action="store_true", help="print all of it as JSON (docs/troubleshooting.md)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    command = commands.add_parser("info", help="print versions and check every operator (the default)")
    command.set_defaults(run=info)
    # Given before the command, it is the parser's; a default here would take it back.
    command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print all of it as JSON")
    commands.add_parser("library", help="print the path of the operators' shared library").set_defaults(run=library)
    _add_estimate(commands)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
