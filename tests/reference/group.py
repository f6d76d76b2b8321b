"""One group of parameters with its optimizer state, as the Adam operator takes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bnbops.functional import create_dynamic_map
from reference.adam import Hyper, decode, flat_absmax, row_absmax, state_absmax, state_normalised
from reference.quantize import nearest_by_midpoints

SIGNED, UNSIGNED = create_dynamic_map(True), create_dynamic_map(False)  # test_codebooks holds their bits


@dataclass
class Group:
    """Lists of tensors, one entry per parameter. fp32 states have empty absmax lists."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avg: list[Tensor] = field(default_factory=list)
    exp_avg_sq: list[Tensor] = field(default_factory=list)
    exp_avg_absmax: list[Tensor] = field(default_factory=list)
    exp_avg_sq_absmax: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def lists(self) -> dict[str, list[Tensor]]:
        """The op's list arguments, by name and in order."""
        return dict(vars(self))

    def map(self, f: Callable[[Tensor], Tensor]) -> "Group":
        """A group of `f(tensor)`."""
        return Group(**{name: [f(x) for x in tensors] for name, tensors in self.lists().items()})

    def clone(self) -> "Group":
        """A copy that shares no memory (and keeps strides)."""
        return self.map(lambda x: x.clone(memory_format=torch.preserve_format))

    def with_grads(self, grads: Sequence[Tensor]) -> "Group":
        """The same tensors with other gradients."""
        return replace(self, grads=list(grads))

    def step(self, h: Hyper, **scaling: Tensor) -> None:
        """Runs the operator."""
        torch.ops.bnbops.adam_step_(*self.lists().values(), **op_options(h), **scaling)

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        """The values of parameter `i`'s states."""
        m, v = self.exp_avg[i], self.exp_avg_sq[i]
        if not self.exp_avg_absmax:
            return m, v
        return decode(m, self.exp_avg_absmax[i], SIGNED), decode(v, self.exp_avg_sq_absmax[i], UNSIGNED)


def op_options(h: Hyper) -> dict:
    """The op's keyword arguments."""
    return {
        "lr": torch.tensor(h.lr, dtype=torch.float64),
        "beta1": h.beta1,
        "beta2": h.beta2,
        "eps": h.eps,
        "weight_decay": h.weight_decay,
        "maximize": h.maximize,
    }


def random_group(
    shapes: Sequence[tuple[int, ...]],
    *,
    bits: int,
    layout: str = "rows",
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    steps: Sequence[int] = (7,),
    seed: int = 0,
) -> Group:
    """A group in the middle of training: moments over many decades, `steps` (repeated) so far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        decades = 10 ** (-3 * torch.rand(shape, generator=generator))
        return torch.randn(shape, generator=generator) * decades * scale

    group = Group()
    for i, shape in enumerate(shapes):
        group.params.append(normal(shape, 1.0).to(dtype))
        group.grads.append(normal(shape, 0.1).to(grad_dtype or dtype))
        group.steps.append(torch.tensor(float(steps[i % len(steps)])))
        append_state(group, normal(shape, 0.03), normal(shape, 0.05).square(), bits, layout)
    return group


def append_state(group: Group, m: Tensor, v: Tensor, bits: int, layout: str) -> None:
    """Adds the states of one parameter: fp32, or 8-bit codes with absmax by "rows" or "flat"."""
    if bits == 32:
        group.exp_avg.append(m)
        group.exp_avg_sq.append(v)
        return
    empty = row_absmax(m.shape) if layout == "rows" else flat_absmax(m.shape)
    group.exp_avg.append(nearest_by_midpoints(state_normalised(m, empty), SIGNED))
    group.exp_avg_sq.append(nearest_by_midpoints(state_normalised(v, empty), UNSIGNED))
    group.exp_avg_absmax.append(state_absmax(m, empty))
    group.exp_avg_sq_absmax.append(state_absmax(v, empty))
