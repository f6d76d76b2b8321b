"""How memory, communication and a step's overhead grow with ranks, parameters and tensors.

The first two are told from shapes, as tests hold them against real ranks (tests/distributed/test_traffic.py); the
overhead is measured. docs/scaling.md has the tables.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import Candidate, Memory, VerificationError, save, table, take_turns, threads
from torch import Tensor, nn

import bnbops
from bnbops.distributed import traffic
from bnbops.estimate import estimate

PARTS = ("paper", "overhead")
RANKS = (8, 64, 256, 1024)
TENSORS = (10, 100, 1000, 10_000)
COMPILED, FUSED_DTENSORS = (
    100,
    1000,
)  # at most: compiling takes long for more, and torch's first step with DTensors does
GB = 1e9

# ---- on paper --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama:
    """Shapes of a model; `key_width` is that of keys and values."""

    layers: int
    width: int
    key_width: int
    hidden: int
    vocabulary: int


# Touvron et al., "Llama 2" (arXiv:2307.09288); Grattafiori et al., "The Llama 3 Herd of Models" (arXiv:2407.21783)
MODELS = {
    "7B": Llama(32, 4096, 4096, 11008, 32000),
    "70B": Llama(80, 8192, 1024, 28672, 32000),
    "405B": Llama(126, 16384, 1024, 53248, 128256),
}


class Nf4(nn.Module):
    """The tensors of a frozen NF4 weight: codes, and a scale for 64 of them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // 2, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(outputs, inputs // 64, dtype=torch.int32), requires_grad=False)


def llama(shapes: Llama, frozen: bool = False) -> tuple[nn.Module, list[nn.Module]]:
    """A model's parameters on the meta device, bf16, and its blocks. Frozen, products have NF4 weights with LoRA
    adapters of rank 16 beside each, and nothing else is trained."""
    width, keys, hidden = shapes.width, shapes.key_width, shapes.hidden
    pairs = [(width, width), (width, keys), (width, keys), (width, width), (width, hidden), (width, hidden)]

    def product(inputs: int, outputs: int) -> nn.Module:
        if not frozen:
            return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
        down = nn.Linear(inputs, 16, bias=False, dtype=torch.bfloat16)
        return nn.ModuleList([Nf4(inputs, outputs), down, nn.Linear(16, outputs, bias=False, dtype=torch.bfloat16)])

    with torch.device("meta"):
        blocks = []
        for _ in range(shapes.layers):
            norms = [nn.RMSNorm(width, dtype=torch.bfloat16).requires_grad_(not frozen) for _ in range(2)]
            blocks.append(nn.ModuleList([*(product(*pair) for pair in [*pairs, (hidden, width)]), *norms]))
        ends = [nn.Embedding(shapes.vocabulary, width, dtype=torch.bfloat16), nn.RMSNorm(width, dtype=torch.bfloat16)]
        ends.append(nn.Linear(width, shapes.vocabulary, bias=False, dtype=torch.bfloat16))
        model = nn.ModuleList([*blocks, *(end.requires_grad_(not frozen) for end in ends)])
    return model, blocks


def paper(name: str, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """A model's rows: what is trained, how, and on how many ranks."""
    rows = []
    kinds = [("all", "AdamW32bit", False), ("all", "AdamW8bit", False), ("LoRA on NF4", "AdamW8bit", True)]
    for trained, optimizer, frozen in kinds:
        model, blocks = llama(MODELS[name], frozen)
        for count in ranks:
            held = estimate(model, optimizer, shards=count).per_rank
            sent = traffic(model, blocks, count)
            rows.append(
                {
                    "model": f"{name}, {trained}, {optimizer}",
                    "ranks": count,
                    "weights": held.weights / GB,
                    "gradients": held.grads / GB,
                    "states": (held.states + held.scales) / GB,
                    "counts, kB": held.steps / 1e3,
                    "largest unit": sent.unsharded / GB,
                    "gathered": sent.gathered / GB,
                    "scattered": sent.scattered / GB,
                    "collectives": sent.collectives,
                }
            )
    return rows


PAPER = {
    "model": "{}",
    "ranks": "{}",
    **dict.fromkeys(["weights", "gradients", "states"], "{:.3f}"),
    "counts, kB": "{:.1f}",
    **dict.fromkeys(["largest unit", "gathered", "scattered"], "{:.2f}"),
    "collectives": "{}",
}

# ---- overhead --------------------------------------------------------------------------------------------------

SHAPE = (1, 256)  # one block: what a step computes is next to nothing
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def params(count: int, mesh: Any = None) -> list[nn.Parameter]:
    """Parameters with gradients, as DTensors if there is a mesh."""
    made = []
    for i in range(count):
        pair = [torch.full(SHAPE, 0.1), torch.full(SHAPE, 0.01 * (1 + i % 7))]
        if mesh is not None:
            from torch.distributed.tensor import DTensor, Shard

            pair = [DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in pair]
        made.append(nn.Parameter(pair[0]))
        made[-1].grad = pair[1]
    return made


def eight_bit(params: list[Tensor]) -> torch.optim.Optimizer:
    return bnbops.optim.AdamW8bit(params, lr=1e-3, min_8bit_size=1)


def fused(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def step_of(make: Make, params: list[nn.Parameter], compiled: bool = False) -> Callable[[], object]:
    """A step that has been taken once."""
    optimizer = make(params)
    step = bnbops.compiled_train_step(optimizer.step, optimizer) if compiled else optimizer.step
    step()
    return step


def whole(param: Tensor) -> Tensor:
    return param.detach().full_tensor() if hasattr(param, "full_tensor") else param.detach()


def overhead(count: int, rounds: int, mesh: Any = None, compiled: int = COMPILED) -> list[dict[str, Any]]:
    """Microseconds of a step over `count` tiny tensors, per step and per tensor; also over DTensors if there is a mesh,
    and compiled for at most so many of them.

    Raises:
        VerificationError: the candidates do not agree.
    """
    plain = {"bnbops AdamW8bit": eight_bit, "torch AdamW, fused": fused}
    made: dict[str, tuple[Callable[[], object], list[nn.Parameter]]] = {}
    for name, make in plain.items():
        for suffix, on in (("", None), (", DTensors", mesh))[: 1 if mesh is None else 2]:
            if on is not None and make is fused and count > FUSED_DTENSORS:
                continue
            tensors = params(count, on)
            made[name + suffix] = step_of(make, tensors), tensors
    if count <= compiled:
        tensors = params(count)
        made["bnbops AdamW8bit, compiled"] = step_of(eight_bit, tensors, compiled=True), tensors
    expected = torch.cat([whole(param) for param in made["torch AdamW, fused"][1]])
    for name, (_, tensors) in made.items():
        off = (torch.cat([whole(param) for param in tensors]) - expected).abs().max().item()
        if not off <= 1e-6:
            raise VerificationError(f"{name} is {off:.2g} off torch's AdamW after a step of 1e-3")
    memory = Memory(4096)  # caches stay warm: it is the host's work that counts
    candidates = [Candidate(name, step, count * SHAPE[1], 1) for name, (step, _) in made.items()]
    take_turns(candidates, rounds, memory)
    rows = []
    for candidate in candidates:
        median = statistics.median(candidate.seconds.values())
        rows.append({"step": candidate.name, "tensors": count, "us": median * 1e6, "us/tensor": median * 1e6 / count})
    return rows


OVERHEAD = {"step": "{}", "tensors": "{}", "us": "{:.0f}", "us/tensor": "{:.2f}"}


# ---- command line ----------------------------------------------------------------------------------------------


def one_rank() -> Any:
    """A mesh of this process alone."""
    from torch.distributed import HashStore, init_device_mesh, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command line; returns the sections."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="on paper")
    options.add_argument("--rounds", type=int, default=15, help="turns of each candidate (%(default)s)")
    options.add_argument("--quick", action="store_true", help="few tensors: shows that it works, measures nothing")
    options.add_argument("--json", metavar="FILE", help="also write all figures to FILE")
    args = options.parse_args(argv)
    sections = []

    def report(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
        print(f"\n## {title}\n\n{table(rows, columns)}", flush=True)
        sections.append({"title": title, "rows": rows})

    if "paper" in args.parts:
        rows = [row for name in args.models for row in paper(name, RANKS)]
        report("Bytes of a rank, in GB, bf16 weights and gradients", rows, PAPER)
    if "overhead" in args.parts:
        mesh, counts = one_rank(), TENSORS[:1] if args.quick else TENSORS
        with threads(1):  # the host's work has one, too
            rows = [row for count in counts for row in overhead(count, args.rounds, mesh)]
        report(f"Overhead of a step over tensors of {SHAPE[1]} elements", rows, OVERHEAD)
        torch.distributed.destroy_process_group()
    if args.json:
        save(args.json, sections)
    return sections


if __name__ == "__main__":
    main()
