"""torch.optim's checkpoints: reading them, and writing ones that torch's optimizers go on with.

torch keeps a state in its parameter's dtype, under the names that it has here. Beside options that mean the same, its
param groups say which of its implementations runs ("foreach", "fused", ...), and have flags for algorithms that there
are not here.

Source: torch/optim/*.py of 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbops.optim.checkpoints.loading import check_complete
from bnbops.optim.core.options import as_numbers

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

_IMPLEMENTATION = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
_DECOUPLED = "decoupled_weight_decay"


@dataclass(frozen=True)
class _Counterpart:
    """torch's classes with an update rule of ours."""

    classes: str
    options: tuple[str, ...]  # that both have, beside lr, weight_decay and maximize
    lacks: tuple[str, ...] = ()  # of _IMPLEMENTATION
    off: tuple[str, ...] = ()  # flags that have to be
    counts: bool = True  # has a "step"
    extra: Mapping[str, Any] = field(default_factory=dict)  # what else is written


_COUNTERPARTS = {
    "adam": _Counterpart("Adam and AdamW", ("betas", "eps"), off=("amsgrad",), extra={_DECOUPLED: True}),
    "momentum": _Counterpart("SGD", ("momentum", "dampening", "nesterov"), lacks=("capturable",), counts=False),
    "rmsprop": _Counterpart("RMSprop", ("alpha", "eps", "momentum"), lacks=("fused",), off=("centered",)),
    "adagrad": _Counterpart("Adagrad", ("lr_decay", "eps", "initial_accumulator_value"), lacks=("capturable",)),
}
_COMMON = ("lr", "weight_decay", "maximize")


def is_torch(state_dict: dict[str, Any]) -> bool:
    """Whether a state dict is one of torch.optim's optimizers (not whether it fits any of ours)."""
    groups = state_dict.get("param_groups") or ()
    ours = {"format_version", "optim_bits"}
    return bool(groups) and all("maximize" in group and not ours & group.keys() for group in groups)


def from_torch(optimizer: StatefulOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of torch's class of the same name, as that of `optimizer` with 32-bit states, but for their dtypes.

    Options that torch does not have (optim_bits, percentile_clipping, ...) stay those of `optimizer`. Tensors may
    have any floating-point dtype, and be DTensors.

    Raises:
        ValueError: it is of another optimizer, or cannot be continued: amsgrad, centered, a weight decay that Adam adds
            to the gradient.
    """
    counterpart, saved_groups = _counterpart(optimizer), state_dict["param_groups"]
    groups = [
        _read_group(optimizer, counterpart, i, *pair)
        for i, pair in enumerate(zip(optimizer.param_groups, saved_groups, strict=True))
    ]
    states = {key: _read_state(counterpart, state) for key, state in state_dict["state"].items()}
    return {**state_dict, "state": states, "param_groups": groups}


def to_torch(optimizer: StatefulOptimizer) -> dict[str, Any]:
    """The optimizer's state dict for `load_state_dict` of torch's class of the same name.

    Returns:
        State dict of plain numbers and of tensors of its own: states in float32, DTensors if their parameters are.

    Raises:
        ValueError: torch has no such optimizer, an option that it does not have, or a state that is incomplete.
    """
    counterpart, state_dict = _counterpart(optimizer), optimizer.state_dict()
    states, groups = {}, []
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        groups.append(_write_group(optimizer, counterpart, i, group, saved["params"]))
        names = optimizer._rule(group).state_names
        for key, param in zip(saved["params"], group["params"], strict=True):
            state = optimizer.dequantized_state(param)
            if not state or (not counterpart.counts and state["step"] == 0):  # SGD's first buffer is the gradient
                continue
            check_complete(key, param, state, names)
            if written := _write_state(counterpart, state):
                states[key] = written
    return {"state": states, "param_groups": groups}


def _counterpart(optimizer: StatefulOptimizer) -> _Counterpart:
    if (name := optimizer._rules[0].name) not in _COUNTERPARTS:
        raise ValueError(f"{type(optimizer).__name__} has no counterpart in torch.optim to exchange state dicts with")
    return _COUNTERPARTS[name]


def _read_group(
    optimizer: StatefulOptimizer, counterpart: _Counterpart, i: int, group: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """Our group with the saved options, and whatever else a user or a scheduler put into the saved group."""
    here, known = f"param group {i} of the torch state dict", (*_COMMON, *counterpart.options)
    ours = type(optimizer).__name__
    if missing := [key for key in (*known, *counterpart.off) if key not in saved]:
        raise ValueError(
            f"{here} lacks {missing}; {ours} loads those of torch.optim's {counterpart.classes}: is it of "
            "another optimizer?"
        )
    for key in counterpart.off:
        if saved[key]:
            raise ValueError(f"{here} has {key}={saved[key]}, which {ours} does not support")
    if _DECOUPLED in counterpart.extra and saved["weight_decay"] and not saved.get(_DECOUPLED):
        raise ValueError(
            f"{here} has weight_decay={saved['weight_decay']}, which torch.optim.Adam adds to the gradient; "
            f"{ours} decouples it, as AdamW does. To go on so, set {_DECOUPLED!r} of the saved group to "
            "True (older versions of torch do not write it for AdamW either), or its 'weight_decay' to 0"
        )
    options = {key: as_numbers(saved[key]) if key == "betas" else saved[key] for key in known}
    extra = saved.keys() - optimizer.defaults.keys() - {*_IMPLEMENTATION, *counterpart.off, *counterpart.extra}
    return {**group, **{key: saved[key] for key in extra}, **options, "params": saved["params"]}


def _read_state(counterpart: _Counterpart, state: Mapping[str, Any]) -> dict[str, Any]:
    """Ours, but for dtypes."""
    read = {key: x for key, x in state.items() if x is not None}  # SGD's buffer before its first step
    if isinstance(step := read.get("step"), Real):
        read["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    if read and not counterpart.counts:
        read["step"] = torch.tensor(1.0, dtype=torch.float32, device="cpu")  # it matters only whether it is the first
    return read


def _write_group(
    optimizer: StatefulOptimizer, counterpart: _Counterpart, i: int, group: dict[str, Any], ids: list[int]
) -> dict[str, Any]:
    if group["percentile_clipping"] != 100:
        raise ValueError(
            f"param group {i} has percentile_clipping={group['percentile_clipping']}; torch.optim's "
            f"{counterpart.classes} would go on without"
        )
    written = {key: group[key] for key in (*_COMMON, *counterpart.options)}
    written |= {"lr": float(group["lr"]), **dict.fromkeys(counterpart.off, False), **counterpart.extra}
    written |= {key: value for key, value in _IMPLEMENTATION.items() if key not in counterpart.lacks}
    extra = group.keys() - optimizer.defaults.keys() - {"params"}
    return {**written, **{key: group[key] for key in extra}, "params": ids}


def _write_state(counterpart: _Counterpart, state: dict[str, Tensor]) -> dict[str, Tensor]:
    written = {key: x for key, x in state.items() if key != "gnorm_vec"}
    step = written.pop("step").reshape(()).cpu()  # where torch has it, unless it is "capturable" or "fused"
    return {"step": step, **written} if counterpart.counts else written
