"""Reading and changing states by their values: `Optimizer.reset_state`, `dequantized_state` and `set_state`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbops.dtensors import is_dtensor, local
from bnbops.facts import STATES
from bnbops.optim.checkpoints.loading import placed
from bnbops.optim.core.codec import codecs_of, decoded, fill, fill_some, scale_keys, write
from bnbops.optim.core.state import PER_PARAMETER, like, names_of

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

_NOT_NEGATIVE = {name for name, state in STATES.items() if state.role.divisor} | PER_PARAMETER.keys()


@torch.no_grad()
def dequantized(optimizer: StatefulOptimizer, param: Tensor) -> dict[str, Tensor]:
    """`StatefulOptimizer.dequantized_state`."""
    _group_of(optimizer, param)
    state = optimizer.state.get(param, {})
    coded = codecs_of(state)

    def copy(name: str) -> Tensor:
        if name not in coded:
            return state[name].detach().clone()
        values = decoded(state, name)
        return like(param, values, param.shape) if is_dtensor(param) else values

    scales = scale_keys(state)
    return {name: copy(name) for name in state if name not in scales}


# ---- set -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def set_values(optimizer: StatefulOptimizer, param: Tensor, values: Mapping[str, Any]) -> None:
    """`StatefulOptimizer.set_state`."""
    group = _group_of(optimizer, param)
    optimizer._prepare()
    plan = optimizer._plan(group, optimizer._overrides.number(param))
    present = optimizer.state.get(param, {})
    known = [name for name in dict.fromkeys([*plan.needed, *present]) if name not in scale_keys(present)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(
            f"a parameter of shape {list(param.shape)} has no states {unknown}; with its options "
            f"{type(optimizer).__name__} keeps {', '.join(known)}"
        )
    checked = {name: _checked(param, name, value) for name, value in values.items()}
    state = optimizer._state_of(param, plan)
    for name, value in checked.items():
        write(state, name, value)
    optimizer._watch.look({param: state})


def _checked(param: Tensor, name: str, value: Any) -> Tensor:
    """This rank's part of a value for a state, float32 on the parameter's device.

    Raises:
        ValueError: it does not fit.
    """
    shape = PER_PARAMETER.get(name, tuple(param.shape))
    what = f"'{name}' of a parameter of shape {list(param.shape)}"
    if isinstance(value, Real) and not isinstance(value, bool) and shape == ():
        value = torch.tensor(float(value), dtype=torch.float32, device=local(param).device)
    if not isinstance(value, Tensor) or not (value.is_floating_point() or shape == ()):
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must be a floating-point tensor, got {found}")
    if tuple(value.shape) != shape and not (name == "step" and value.numel() == 1):
        raise ValueError(f"{what} must have shape {list(shape)}, got {list(value.shape)}")
    value = local(placed(param, name, value.detach())).to(local(param).device, torch.float32)
    smallest = 0.0 if name in _NOT_NEGATIVE else -math.inf
    largest = math.inf if name == "gnorm_vec" else torch.finfo(torch.float32).max
    if not bool(((value >= smallest) & (value.abs() <= largest)).all()):
        wanted = "finite" if smallest < 0 else "not negative" if largest == math.inf else "finite and not negative"
        raise ValueError(f"{what} must be {wanted}")
    if name == "step" and value != value.round():
        raise ValueError(f"{what} must be a whole number, got {value.item()}")
    return value.contiguous()


# ---- reset -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reset(
    optimizer: StatefulOptimizer, params: Tensor | Iterable[Tensor] | None, mask: Tensor | Iterable[Tensor] | None
) -> None:
    """`StatefulOptimizer.reset_state`."""
    if params is None:
        if mask is not None:
            raise ValueError("a mask needs the parameter that it is for: reset_state(param, mask)")
        params = [param for group in optimizer.param_groups for param in group["params"]]
    params = [params] if isinstance(params, Tensor) else list(params)
    masks = [mask] * len(params) if mask is None or isinstance(mask, Tensor) else list(mask)
    if len(masks) != len(params):
        raise ValueError(f"{len(params)} parameters need as many masks, got {len(masks)}")
    groups = [_group_of(optimizer, param) for param in params]
    parts = [None if mask is None else _part(param, mask) for param, mask in zip(params, masks, strict=True)]
    optimizer._prepare()
    for param, group, part in zip(params, groups, parts, strict=True):
        state = optimizer.state.get(param)
        if not state:
            continue
        initial = optimizer._initial(optimizer._overrides.applied(group, optimizer._overrides.number(param)))
        for name in names_of(state):
            if part is None:
                fill(state, name, initial.get(name, 0.0))
            else:
                fill_some(state, name, initial.get(name, 0.0), part)
        for name in PER_PARAMETER.keys() & state.keys() if part is None else ():
            state[name].fill_(0 if name == "step" else math.inf)
        optimizer._watch.look({param: state})


def _part(param: Tensor, mask: Tensor) -> Tensor:
    """This rank's part of a mask, of the shape of the parameter's.

    Raises:
        ValueError: it does not fit.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a mask must be a bool tensor, True where the state is to begin anew, got {found}")
    try:
        if mask.shape != param.shape:
            mask = mask.expand(param.shape).contiguous()
    except RuntimeError:
        raise ValueError(
            f"a mask of shape {list(mask.shape)} does not broadcast to its parameter's {list(param.shape)}"
        ) from None
    return local(placed(param, "mask", mask)).to(local(param).device)


def _group_of(optimizer: StatefulOptimizer, param: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(param is other for other in group["params"]):
            return group
    found = f"one of shape {list(param.shape)}" if isinstance(param, Tensor) else type(param).__name__
    raise ValueError(f"{type(optimizer).__name__} does not hold this parameter, {found}")
