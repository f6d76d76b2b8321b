"""One group of parameters with its optimizer state, as the operator of a rule takes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnbops import facts
from reference.rules import RULES
from reference.states import CODEBOOKS, decode, encode, flat_absmax, row_absmax

CODEBOOK_OF = {name: CODEBOOKS[state.role.signed] for name, state in facts.STATES.items()}
NOT_NEGATIVE = {"exp_avg_sq", "square_avg", "sum"}  # states that are sums of squares


@dataclass
class Group:
    """Lists of tensors, one entry per parameter; states and their scales by name. fp32 states have empty absmax lists.

    `rule` is the operator's name without "_step_", a row of `rules.RULES`.
    """

    rule: str
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    absmax: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in RULES[self.rule].states:
            self.states.setdefault(name, [])
            self.absmax.setdefault(name, [])

    def lists(self) -> dict[str, list[Tensor]]:
        """The operator's list arguments, by name and in order."""
        scales = {f"{name}_absmax": tensors for name, tensors in self.absmax.items()}
        return {"params": self.params, "grads": self.grads, **self.states, **scales, "steps": self.steps}

    def map(self, f: Callable[[Tensor], Tensor]) -> "Group":
        """A group of `f(tensor)`."""
        lists = {name: [f(x) for x in tensors] for name, tensors in self.lists().items()}
        return Group(
            self.rule,
            states={name: lists[name] for name in self.states},
            absmax={name: lists[f"{name}_absmax"] for name in self.absmax},
            **{name: lists[name] for name in ("params", "grads", "steps")},
        )

    def clone(self) -> "Group":
        """A copy that shares no memory (and keeps strides)."""
        return self.map(lambda x: x.clone(memory_format=torch.preserve_format))

    def with_grads(self, grads: Sequence[Tensor]) -> "Group":
        """The same tensors with other gradients."""
        return replace(self, grads=list(grads))

    def step(self, options: dict[str, Any] | None = None, /, **scaling: bool | Tensor) -> None:
        """Runs the operator with the rule's usual options, or these."""
        RULES[self.rule].operator(*self.lists().values(), **op_options(options or RULES[self.rule].options), **scaling)

    def half_steps(self, options: dict[str, Any] | None = None, /, **scaling: bool | Tensor) -> list[Tensor]:
        """The same by its halves; returns the directions between them."""
        options, rule = op_options(options or RULES[self.rule].options), facts.RULES[self.rule]
        directions = [torch.full(p.shape, -1.0) for p in self.params]
        params, grads, *others = self.lists().values()
        trust = {"trust": scaling.pop("trust")} if "trust" in scaling else {}
        of_gradient = trust if rule.trust == "gradient" else {}
        operator = getattr(torch.ops.bnbops, rule.direction)
        operator(params, grads, directions, *others, **options, **scaling, **of_gradient)
        operator = getattr(torch.ops.bnbops, rule.apply)
        operator(params, directions, self.steps, **options, **({} if of_gradient else trust))
        return directions

    def with_fp32(self, *names: str) -> "Group":
        """The same tensors, but that the states of these names are fp32."""
        group = replace(self, states=dict(self.states), absmax=dict(self.absmax))
        place = list(self.states).index
        for name in names:
            group.states[name] = [self.state_values(i)[place(name)] for i in range(len(self.params))]
            group.absmax[name] = []
        return group

    def append_state(self, values: dict[str, Tensor], bits: int, layout: str) -> None:
        """Adds the states of one parameter: fp32, or 8-bit codes with absmax by "rows" or "flat"."""
        for name, x in values.items():
            if bits == 8:
                empty = row_absmax(x.shape) if layout == "rows" else flat_absmax(x.shape)
                x, absmax = encode(x, empty, CODEBOOKS[RULES[self.rule].states[name]])
                self.absmax[name].append(absmax)
            self.states[name].append(x)

    def state_values(self, i: int) -> list[Tensor]:
        """Parameter `i`'s states in fp32."""
        return [
            decode(tensors[i], self.absmax[name][i], CODEBOOKS[RULES[self.rule].states[name]])
            if self.absmax[name]
            else tensors[i]
            for name, tensors in self.states.items()
        ]


def op_options(options: dict[str, Any]) -> dict[str, Any]:
    """An operator's keyword arguments: as the rules take them, but `lr` is a tensor."""
    return options | {"lr": torch.tensor(options["lr"], dtype=torch.float64)}


def random_group(
    rule: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    bits: int,
    layout: str = "rows",
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    steps: Sequence[int] = (7,),
    seed: int = 0,
) -> Group:
    """A group in the middle of training: states over many decades, `steps` (repeated) so far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        decades = 10 ** (-3 * torch.rand(shape, generator=generator))
        return torch.randn(shape, generator=generator) * decades * scale

    group = Group(rule)
    for i, shape in enumerate(shapes):
        group.params.append(normal(shape, 1.0).to(dtype))
        group.grads.append(normal(shape, 0.1).to(grad_dtype or dtype))
        group.steps.append(torch.tensor(float(steps[i % len(steps)])))
        values = {name: normal(shape, 0.05) for name in RULES[rule].states}
        values = {name: x.square() if name in NOT_NEGATIVE else x for name, x in values.items()}
        group.append_state(values, bits, layout)
    return group


def fresh_group(
    rule: str, shapes: Sequence[tuple[int, ...]], *, bits: int, layout: str = "rows", dtype: torch.dtype = torch.float32
) -> Group:
    """Random parameters before their first step, with zero gradients."""
    group = random_group(rule, shapes, bits=32, dtype=dtype)
    fresh = Group(rule, group.params, [torch.zeros_like(p) for p in group.params])
    for shape in shapes:
        fresh.append_state({name: torch.zeros(shape) for name in RULES[rule].states}, bits, layout)
        fresh.steps.append(torch.zeros(()))
    return fresh
