"""Step time: bnbops with 8- and 32-bit states beside torch's fused AdamW, bitsandbytes and torchao.

Verifies every candidate against plain fp32 arithmetic first, then times those very optimizers in turns. With
--optimizers, other families than AdamW (families.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import families
import torch
from measure import (
    Candidate,
    Memory,
    VerificationError,
    count,
    import_peer,
    parser,
    report,
    save,
    take_turns,
    threads,
)
from torch import Tensor

import bnbops.optim

LR, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2
HYPER: dict[str, Any] = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
VERIFIED_STEPS = 3
BASELINE = "torch AdamW, fused"
WIDTH = 4096  # of the one large parameter

# How far the parameters may be from plain fp32 arithmetic after the verified steps (see `distance`): by precision of
# the states, for fp32 and for bf16 parameters (which may round to the other neighbour). One vector of 16 elements that
# is not updated is 0.06 in a row of 4096, and more in a shorter one.
TOLERANCES = {"32-bit": (1e-5, 0.01), "8-bit": (0.02, 0.05), "fp8": (0.03, 0.05), "parameter's": (1e-5, 0.05)}

# Biases, norms, heads, adapters and small convolutions; four in ten get 8-bit states.
SMALL_SHAPES = [
    *[(64,), (256,), (768,), (128, 16), (16, 3, 3, 3), (4, 512)],
    *[(64, 64), (64, 256), (100, 77), (16, 64, 3, 3)],
]


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    states: str  # a key of TOLERANCES

    @property
    def ours(self) -> bool:
        return self.name.startswith("bnbops")


@dataclass(frozen=True)
class Problem:
    """Parameters before the first step, and their gradients in each of the steps to verify."""

    title: str
    params: list[Tensor]
    grads: list[list[Tensor]]

    def to(self, device: torch.device) -> Problem:
        grads = [[grad.to(device) for grad in step] for step in self.grads]
        return Problem(self.title, [param.to(device) for param in self.params], grads)


def contenders() -> list[Contender]:
    return [
        Contender("bnbops AdamW8bit", lambda params: bnbops.optim.AdamW8bit(params, **HYPER), "8-bit"),
        Contender("bnbops AdamW8bit, e4m3", lambda p: bnbops.optim.AdamW8bit(p, **HYPER, state_codec="e4m3"), "fp8"),
        Contender("bnbops AdamW32bit", lambda params: bnbops.optim.AdamW32bit(params, **HYPER), "32-bit"),
        Contender(BASELINE, lambda params: torch.optim.AdamW(params, fused=True, **HYPER), "parameter's"),
    ]


def peer_contenders(names: Iterable[str]) -> list[Contender]:
    modules = {name: module for name in names if (module := import_peer(name))}
    found = []
    if bitsandbytes := modules.get("bitsandbytes"):
        found.append(Contender("bitsandbytes AdamW8bit", lambda p: bitsandbytes.optim.AdamW8bit(p, **HYPER), "8-bit"))
    if torchao := modules.get("torchao.optim"):
        found.append(Contender("torchao AdamW8bit", lambda p: torchao.AdamW8bit(p, **HYPER), "8-bit"))
        found.append(Contender("torchao AdamWFp8", lambda p: torchao.AdamWFp8(p, **HYPER), "fp8"))
    return found


def problem(title: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Problem:
    """Gradients differ by up to ten times in a row, and by up to 10^4 between rows.

    8 bits hold such rows well, so a row that is off has been treated wrongly.
    """
    generator = torch.Generator().manual_seed(0)

    def gradient(shape: tuple[int, ...]) -> Tensor:
        magnitude = 10 ** (torch.rand(shape, generator=generator) - 1)
        rows = [len_ if k == 0 and len(shape) > 1 else 1 for k, len_ in enumerate(shape)]
        row_scale = 10 ** (-4 * torch.rand(rows, generator=generator))
        sign = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1)
        return magnitude.mul_(row_scale).mul_(sign).to(dtype)

    params = [(0.02 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    return Problem(title, params, [[gradient(shape) for shape in shapes] for _ in range(VERIFIED_STEPS)])


def reference(problem: Problem) -> list[Tensor]:
    """The parameters after the verified steps, in plain fp32 arithmetic (Loshchilov & Hutter 2019, algorithm 2)."""
    expected = []
    for i, param in enumerate(problem.params):
        p = param.float()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t, grads in enumerate(problem.grads, start=1):
            g = grads[i].float()
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * v + (1 - BETA2) * g * g
            denominator = v.sqrt() / math.sqrt(1 - BETA2**t) + EPS
            p = p * (1 - LR * WEIGHT_DECAY) - LR / (1 - BETA1**t) * m / denominator
            p = p.to(param.dtype).float()
        expected.append(p)
    return expected


def distance(params: list[Tensor], expected: list[Tensor], start: list[Tensor]) -> float:
    """|param - expected| / |expected - start| (Euclidean norms) of the worst row, or tensor where rows are short."""
    worst = torch.zeros((), device=expected[0].device)
    for actual, wanted, before in zip(params, expected, start, strict=True):
        rows = len(before) if before[0].numel() >= 1024 else 1
        error = (actual.detach().float() - wanted).view(rows, -1).norm(dim=1)
        moved = (wanted - before.float()).view(rows, -1).norm(dim=1)
        worst = torch.maximum(worst, (error / moved).max())  # keeps a NaN
    return worst.item()


def take_steps(make: Callable[[list[Tensor]], torch.optim.Optimizer], problem: Problem) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(param.clone()) for param in problem.params]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = make(params)
    for grads in problem.grads:
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        optimizer.step()
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return optimizer.param_groups[0]["params"]


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All plain tensors in the states, those inside tensor subclasses included."""
    return [
        part
        for param in params_of(optimizer)
        for value in optimizer.state[param].values()
        if isinstance(value, Tensor)
        for part in _parts(value)
    ]


def _parts(tensor: Tensor) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def verified(contender: Contender, problem: Problem, expected: list[Tensor]) -> torch.optim.Optimizer:
    """The contender's optimizer after the verified steps.

    Raises:
        VerificationError: its parameters are off, or (bnbops) depend on the number of threads.
    """
    optimizer = take_steps(contender.make, problem)
    off = distance(params_of(optimizer), expected, problem.params)
    tolerance = TOLERANCES[contender.states][problem.params[0].dtype != torch.float32]
    if not off <= tolerance:
        raise VerificationError(f"{contender.name}: a row is {off:.2g} off, more than {tolerance:g}")
    if contender.ours:
        for n in {1, 2} - {torch.get_num_threads()}:
            with threads(n):
                other = take_steps(contender.make, problem)
            pairs = zip(
                [*params_of(optimizer), *states_of(optimizer)], [*params_of(other), *states_of(other)], strict=True
            )
            if not all(torch.equal(a, b) for a, b in pairs):
                raise VerificationError(f"{contender.name}: {n} threads give other bits than {torch.get_num_threads()}")
    same_bits = ", same bits with 1 and 2 threads" if contender.ours else ""
    print(f"verified {contender.name}: worst row {off:.1e} off (tolerance {tolerance:g}){same_bits}", flush=True)
    return optimizer


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def candidate(contender: Contender, optimizer: torch.optim.Optimizer) -> Candidate:
    """A step must read and write parameters and states, and read gradients."""
    params = params_of(optimizer)
    moved = 2 * size(params) + size(param.grad for param in params) + 2 * size(states_of(optimizer))
    return Candidate(contender.name, optimizer.step, sum(map(Tensor.numel, params)), moved, BASELINE)


def run_section(problem: Problem, contenders: list[Contender], rounds: int, memory: Memory) -> dict[str, Any]:
    print(f"\n# {problem.title}", flush=True)
    problem = problem.to(memory.device)
    expected = reference(problem)
    candidates = [memory.candidate()]
    for contender in contenders:
        try:
            optimizer = verified(contender, problem, expected)
        except VerificationError:
            raise
        except Exception as error:
            if contender.ours or contender.name == BASELINE:
                raise
            print(f"{contender.name} left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        candidates.append(candidate(contender, optimizer))
    del expected
    problem.grads.clear()
    take_turns(candidates, rounds, memory)
    return report(problem.title, f"the speed of {BASELINE}", candidates)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    peers = ["bitsandbytes", "torchao.optim"]
    options = parser(__doc__, peers)
    options.add_argument("--params", type=count, default=count("32Mi"), help="elements of the large parameter")
    options.add_argument(
        "--optimizers", nargs="+", choices=["AdamW", *families.FAMILIES, "all"], default=["AdamW"], help="to time"
    )
    args = options.parse_args(argv)
    if args.quick:
        args.params = min(args.params, 4 * WIDTH)
        args.peers = [peer for peer in args.peers if peer != "torchao.optim"]  # it compiles its steps for a minute
    rounds = args.rounds or (3 if args.quick else 21)
    small_count = 30 if args.quick else 1000
    memory = Memory(count("1Mi" if args.quick else "64Mi"))

    large = [(max(1, args.params // WIDTH), WIDTH)]
    small = [SMALL_SHAPES[i % len(SMALL_SHAPES)] for i in range(small_count)]
    chosen = ["AdamW", *families.FAMILIES] if "all" in args.optimizers else args.optimizers
    others = [name for name in chosen if name != "AdamW"]
    bitsandbytes = import_peer("bitsandbytes") if others and "bitsandbytes" in args.peers else None
    sections = [families.run(name, large[0], rounds, memory, bitsandbytes) for name in others]
    if "AdamW" in chosen:
        sections += adamw_sections(large, small, rounds, memory, args.peers)
    if args.json:
        save(args.json, sections)
    return sections


def adamw_sections(
    large: list[tuple[int, int]], small: list[tuple[int, ...]], rounds: int, memory: Memory, peers: list[str]
) -> Iterator[dict[str, Any]]:
    own, others = contenders(), peer_contenders(peers)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        title = f"AdamW step, one {name} parameter {list(large[0])}"
        yield run_section(problem(title, large, dtype), own + others, rounds, memory)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        title = f"AdamW step, {len(small)} small {name} parameters"
        yield run_section(problem(title, small, dtype), own, 3 * rounds, memory)


if __name__ == "__main__":
    try:
        main()
    except VerificationError as error:
        sys.exit(f"verification failed: {error}")
