"""Every optimizer's step on one fp32 parameter, for optim_step.py --optimizers: bnbops, torch and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from measure import Candidate, Memory, VerificationError, report, take_turns
from torch import Tensor

import bnbops.optim

STEPS = 3  # verified
TOLERANCE_32BIT = 1e-5  # of the distance gone, against torch
TOLERANCE_8BIT = 0.05  # against 32-bit states
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Family:
    """Options for bnbops and bitsandbytes, and torch's own optimizer of that kind, if there is one."""

    options: dict[str, Any] = field(default_factory=dict)
    torch: tuple[str, dict[str, Any]] | None = None  # class and options


FAMILIES = {
    "Adam": Family({"lr": 1e-3}, ("Adam", {"lr": 1e-3, "fused": True})),
    "SGD": Family({"lr": 1e-3, "momentum": 0.9}, ("SGD", {"lr": 1e-3, "momentum": 0.9, "fused": True})),
    "Lion": Family({"lr": 1e-4}),
    "RMSprop": Family({"lr": 1e-3}, ("RMSprop", {"lr": 1e-3, "foreach": True})),
    "Adagrad": Family({"lr": 1e-2}, ("Adagrad", {"lr": 1e-2, "fused": True})),
    "LAMB": Family({"lr": 1e-3}),
    "LARS": Family({"lr": 1e-1, "momentum": 0.9}),
    "AdEMAMix": Family({"lr": 1e-3}),
}


def makers(name: str, bitsandbytes: ModuleType | None) -> dict[str, Make]:
    """Contenders by name, the baseline last: torch's, or bitsandbytes' where torch has none."""
    family = FAMILIES[name]

    def of(cls: type, options: dict[str, Any]) -> Make:
        return lambda params: cls(params, **options)

    result = {
        f"bnbops {name}{bits}bit": of(getattr(bnbops.optim, f"{name}{bits}bit"), family.options) for bits in (8, 32)
    }
    if bitsandbytes:
        result[f"bitsandbytes {name}8bit"] = of(getattr(bitsandbytes.optim, f"{name}8bit"), family.options)
    if family.torch:
        cls, options = family.torch
        result[f"torch {cls}, {'fused' if 'fused' in options else 'foreach'}"] = of(getattr(torch.optim, cls), options)
    return result


def stepped(make: Make, param: Tensor, grads: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer after the verified steps on a copy of `param`."""
    copy = torch.nn.Parameter(param.clone())
    optimizer = make([copy])
    for grad in grads:
        copy.grad = grad.clone()
        optimizer.step()
    return optimizer


def verify(name: str, optimizers: dict[str, torch.optim.Optimizer], start: Tensor) -> None:
    """8-bit against 32-bit states, and 32-bit ones against torch.

    Raises:
        VerificationError: they went apart.
    """

    def param(key: str) -> Tensor:
        return optimizers[key].param_groups[0]["params"][0].detach()

    def check(key: str, reference: str, tolerance: float) -> None:
        off = ((param(key) - param(reference)).norm() / (param(reference) - start).norm()).item()
        if not off <= tolerance:
            raise VerificationError(f"{key} is {off:.2g} off {reference}, more than {tolerance:g}")
        print(f"verified {key}: {off:.1e} off {reference} (tolerance {tolerance:g})", flush=True)

    check(f"bnbops {name}8bit", f"bnbops {name}32bit", TOLERANCE_8BIT)
    if torch_name := next((key for key in optimizers if key.startswith("torch")), None):
        check(f"bnbops {name}32bit", torch_name, TOLERANCE_32BIT)


def moved(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step cannot avoid: parameter and states read and written, gradient read."""
    param = optimizer.param_groups[0]["params"][0]
    states = [value for value in optimizer.state[param].values() if isinstance(value, Tensor) and value.numel() > 256]
    read_and_written = sum(tensor.numel() * tensor.element_size() for tensor in [param, *states])
    return 2 * read_and_written + param.grad.numel() * param.grad.element_size()


def run(
    name: str, shape: tuple[int, int], rounds: int, memory: Memory, bitsandbytes: ModuleType | None
) -> dict[str, Any]:
    """Verifies and times one family."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(shape, generator=generator)
    # magnitudes within a factor of ten and no sign changes: 8 bits hold such rows well
    grads = [10 ** (torch.rand(shape, generator=generator) - 1) * start.sign() * 1e-2 for _ in range(STEPS)]
    title = f"{name} step, one fp32 parameter {list(shape)}"
    print(f"\n# {title}", flush=True)
    made = makers(name, bitsandbytes)
    optimizers = {key: stepped(make, start, grads) for key, make in made.items()}
    verify(name, optimizers, start)
    del grads
    baseline = list(made)[-1] if len(made) > 2 else f"bnbops {name}32bit"
    candidates = [memory.candidate()] + [
        Candidate(key, optimizer.step, start.numel(), moved(optimizer), baseline)
        for key, optimizer in optimizers.items()
    ]
    take_turns(candidates, rounds, memory)
    return report(title, f"the speed of {baseline}", candidates)
