"""Fakes of the optimizer steps: one for all of them, since their schemas are made alike."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from bnbops.facts import RULES, STATE_BLOCK, Rule

from .checks import (
    check,
    check_contiguous,
    check_device,
    check_dtype,
    check_float,
    check_one_element,
    name_of,
)


def _check_lengths(
    op: str, params: list[Tensor], lists: dict[str, list[Tensor]], states: list[str], quantized: bool
) -> None:
    in_order = ["grads", "steps", *chain.from_iterable((name, f"{name}_absmax") for name in states)]
    for name in in_order:
        tensors = lists[name]
        is_absmax = name.endswith("_absmax")
        if is_absmax and not quantized and not tensors:
            continue
        remark = " (one each for 8-bit states, none at all for float32 states)" if is_absmax else ""
        check(
            len(tensors) == len(params),
            f"{op}: {name} has {len(tensors)} tensors for {len(params)} params{remark}",
        )


def _check_absmax(what: str, absmax: Tensor, param: Tensor) -> None:
    check_dtype(what, absmax, torch.float32)
    check_device(what, absmax, param)
    check_contiguous(what, absmax)
    rows = param.shape[0] if param.dim() else 1
    per_row = -((param.numel() // rows if rows else 0) // -STATE_BLOCK)
    flat = -(param.numel() // -STATE_BLOCK)
    by_rows = absmax.dim() == 2 and absmax.shape[0] == rows and (absmax.shape[1] == per_row or param.numel() == 0)
    check(
        by_rows or (absmax.dim() == 1 and absmax.shape[0] == flat),
        f"{what} has shape {list(absmax.shape)}, but params of shape {list(param.shape)} need [{rows}, {per_row}] "
        f"(blocks of {STATE_BLOCK} in each row) or [{flat}] (flat blocks)",
    )


def _is_quantized(lists: dict[str, list[Tensor]]) -> bool:
    return any(tensors for name, tensors in lists.items() if name.endswith("_absmax"))


def _check_param(op: str, i: int, params: list[Tensor], lists: dict[str, list[Tensor]], states: list[str]) -> None:
    param, grad, step = params[i], lists["grads"][i], lists["steps"][i]

    def check_shape(what: str, tensor: Tensor) -> None:
        message = f"{what} has shape {list(tensor.shape)}, but its parameter has {list(param.shape)}"
        check(tensor.shape == param.shape, message)

    what = f"{op}: params[{i}]"
    check_float(what, param)
    check_device(what, param, params[0])
    check_contiguous(what, param)
    what = f"{op}: grads[{i}]"
    expected = f"{name_of(param.dtype)} (its parameter's dtype) or float32"
    check(grad.dtype in (param.dtype, torch.float32), f"{what} must be {expected}, got {name_of(grad.dtype)}")
    check_device(what, grad, param)
    check_shape(what, grad)
    quantized = _is_quantized(lists)
    for name in states:
        state, what = lists[name][i], f"{op}: {name}[{i}]"
        check_dtype(what, state, torch.uint8 if quantized else torch.float32)
        check_device(what, state, param)
        check_contiguous(what, state)
        check_shape(what, state)
        if quantized:
            absmax, what = lists[f"{name}_absmax"][i], f"{op}: {name}_absmax[{i}]"
            _check_absmax(what, absmax, param)
            check(
                absmax.dim() == lists[f"{states[0]}_absmax"][i].dim(),
                f"{what} is laid out by rows and another by flat blocks; use one layout for all states of a parameter",
            )
    what = f"{op}: steps[{i}]"
    check_dtype(what, step, torch.float32)
    check_one_element(what, step)
    check_device(what, step, param)


def _check_options(op: str, options: Tensor, count: int) -> None:
    what = f"{op}: options"
    check_dtype(what, options, torch.float64)
    check_contiguous(what, options)
    check(options.device.type == "cpu", f"{what} must be on the CPU")
    check(
        options.dim() == 1 and options.numel() == count,
        f"{what} must have shape [{count}], one number for each option in the schema's order, got "
        f"{list(options.shape)}",
    )


def _check_scalars(op: str, params: list[Tensor], lr: Tensor, scalars: dict[str, Tensor | None]) -> None:
    check(lr.dtype in (torch.float32, torch.float64), f"{op}: lr must be float32 or float64, got {name_of(lr.dtype)}")
    check_one_element(f"{op}: lr", lr)
    for name in ("grad_scale", "found_inf"):
        if (tensor := scalars.get(name)) is not None:
            check_dtype(f"{op}: {name}", tensor, torch.float32)
            check_one_element(f"{op}: {name}", tensor)
    for name in ("clip", "trust"):
        if (tensor := scalars.get(name)) is not None:
            check_dtype(f"{op}: {name}", tensor, torch.float32)
            check_contiguous(f"{op}: {name}", tensor)
            check(
                tensor.dim() == 1 and tensor.numel() == len(params),
                f"{op}: {name} must have shape [{len(params)}], one number for each parameter, got "
                f"{list(tensor.shape)}",
            )
    for name, tensor in {"lr": lr, **scalars}.items():
        if tensor is not None and params and (name in ("clip", "trust") or tensor.device.type != "cpu"):
            check_device(f"{op}: {name}", tensor, params[0])


_SCALARS = ("grad_scale", "found_inf", "clip", "trust")


def _register(op: str, rule: Rule, result: Callable[[list[Tensor]], Tensor | None]) -> None:
    """A fake for an operator with a rule's arguments, which returns `result(params)`."""
    states = list(rule.state_names)
    names = ["grads", *states, *(f"{state}_absmax" for state in states), "steps"]

    def fake(params, *args, lr, options=None, **scalars):
        lists = dict(zip(names, args, strict=True))
        _check_lengths(op, params, lists, states, _is_quantized(lists))
        for i in range(len(params)):
            _check_param(op, i, params, lists, states)
        _check_scalars(op, params, lr, {name: scalars.get(name) for name in _SCALARS})
        if options is not None:
            _check_options(op, options, len(rule.options))
        return result(params)

    torch.library.register_fake(f"bnbops::{op}", fake)


_library = torch.library.Library("bnbops", "IMPL")


def _norms(params: list[Tensor]) -> Tensor:
    return torch.empty(len(params), dtype=torch.float64, device=params[0].device if params else "cpu")


for _rule in RULES.values():
    _register(_rule.step, _rule, lambda params: None)
    if _rule.direction_norm:
        _register(_rule.squared_norms, _rule, _norms)
        _library.impl(_rule.squared_norms, torch.library.fallthrough_kernel, "Autograd")  # not differentiable
