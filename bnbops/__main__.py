"""`python -m bnbops`: what is installed, and whether it computes what it should on this machine."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import bnbops
from bnbops import self_check


def info(_args: argparse.Namespace) -> int:
    """Prints versions and the machine, then checks every operator. Returns 1 if one of them is wrong."""
    print(f"bnbops {bnbops.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"instruction set: {bnbops.isa()} (environment variable BNBOPS_ISA overrides: baseline, avx2, avx512)")
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
        print(f"  {name:<28}" + (f"{len(problems)} of {count} samples differ" if problems else f"ok ({count} samples)"))
        for problem in problems:
            print(f"      {problem}")
        wrong += bool(problems)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bnbops", description="8-bit optimizers and quantization for torch")
    parser.set_defaults(run=info)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("info", help="print versions and check every operator (the default)").set_defaults(run=info)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
