"""The other benchmarks on a GPU: AdamW steps, quantization, and layers with 4- and 8-bit weights.

Beside torch's fused AdamW, dense layers, and bitsandbytes and torchao where installed. Everything is verified first, on
the GPU. Times are the device's. Without a GPU it says so, measures nothing, and its exit code is 0.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from typing import Any

import linear
import optim_step
import quantize
import quantize_4bit
import torch
from measure import Memory, VerificationError, count, import_peer, parser, save

SECTIONS = ("steps", "blockwise", "4bit", "linear")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__, ["bitsandbytes", "torchao"])
    options.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to time")
    options.add_argument("--params", type=count, default=count("128Mi"), help="elements of the large parameter")
    options.add_argument("--elements", type=count, default=count("128Mi"), help="to quantize")
    options.add_argument("--features", type=count, nargs=2, metavar=("OUT", "IN"), default=[8192, 8192], help="sizes")
    options.add_argument("--rows", type=count, nargs="+", default=[1, 4, 16, 256], help="of a layer's input")
    options.add_argument("--dtype", choices=linear.DTYPES, default="bf16", help="of a layer's input")
    options.add_argument("--nested", action="store_true", help="4-bit scales are quantized, too")
    args = options.parse_args(argv)
    if args.quick:
        args.params, args.elements = min(args.params, 2**14), min(args.elements, 2**14)
        args.features, args.rows = [256, 256], sorted({min(rows, 8) for rows in args.rows})
        args.peers = [peer for peer in args.peers if peer != "torchao"]  # it compiles its steps for a minute
    args.rounds = args.rounds or (3 if args.quick else 51)
    args.parts = ("forward", "backward", "int8")
    return args


def run(args: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """The tables, as they come."""
    memory = Memory(count("1Mi" if args.quick else "128Mi"), device)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its layers would warn in each call
    peers = {name: module for name in args.peers if (module := import_peer(name))}
    bitsandbytes = {name: module for name, module in peers.items() if name == "bitsandbytes"}
    if "steps" in args.sections:
        large = [(max(1, args.params // optim_step.WIDTH), optim_step.WIDTH)]
        small = [optim_step.SMALL_SHAPES[i % len(optim_step.SMALL_SHAPES)] for i in range(30 if args.quick else 1000)]
        optimizers = [{"torchao": "torchao.optim"}.get(name, name) for name in peers]
        yield from optim_step.adamw_sections(large, small, args.rounds, memory, optimizers)
    if "blockwise" in args.sections:
        yield from quantize.run(quantize.whole_blocks(args.elements), args.rounds, memory, bitsandbytes)
    if "4bit" in args.sections:
        yield from quantize_4bit.run(args.elements, args.rounds, memory, bitsandbytes.get("bitsandbytes"))
    if "linear" in args.sections:
        yield from linear.product_sections(args, args.rounds, memory, peers)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argv)
    if not torch.cuda.is_available():
        print("no GPU: there is no CUDA device, or this torch is without CUDA; nothing was measured")
        return []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    sections = list(run(args, "cuda"))
    if args.json:
        save(args.json, sections)
    return sections


if __name__ == "__main__":
    try:
        main()
    except VerificationError as error:
        sys.exit(f"verification failed: {error}")
