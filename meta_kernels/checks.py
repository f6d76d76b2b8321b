"""What the fakes refuse: rows of checks, in the order of the C++ checks (csrc/ops) and with their words.

A check gets the arguments of a call by their names, and the argument that it is about. It says what is wrong with it,
to be read after its name ("must be positive, got 0"), or something false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bnbops._library import defaults, implementations, operator
from bnbops.facts import FLOATS, name_of

Arguments = SimpleNamespace
Problem = str | bool
Check = Callable[[Arguments, Any], Problem]
Row = Callable[..., Iterator[str]]
Count = Callable[[Arguments], int]


# ---- rows ------------------------------------------------------------------------------------------------------


def row(name: str, *checks: Check) -> Row:
    """Checks of one argument; none if it is not given, or the operator does not have it."""

    def problems(a: Arguments, index: str = "") -> Iterator[str]:
        value = getattr(a, name, None)
        found = (check(a, value) for check in checks if value is not None)
        return (f"{name}{index} {problem}" for problem in found if problem)

    return problems


def each(lists: str, *rows: Row) -> Row:
    """Rows for the tensors of lists, which are as long as that called `lists`: to the checks, every list is its i-th
    tensor, and an empty one None."""

    def problems(a: Arguments) -> Iterator[str]:
        for i in range(len(getattr(a, lists))):
            tensors = {key: value[i] if value else None for key, value in vars(a).items() if isinstance(value, list)}
            element = Arguments(**vars(a) | tensors)
            for row in rows:
                yield from row(element, f"[{i}]")

    return problems


def fake(op: str, *rows: Row, result: Callable[[Arguments], Any] = lambda a: None, like: str | None = None) -> None:
    """Registers the fake of an operator: its rows, and what it gives for arguments that pass them.

    `like` is the argument on whose device tensors have to be, the first one by default; of a list, its first tensor.
    """
    names = [argument.name for argument in operator(op)._schema.arguments]
    given = defaults(operator(op))

    def kernel(*args: Any, **kwargs: Any) -> Any:
        a = Arguments(**given | dict(zip(names, args, strict=False)) | kwargs)
        first = getattr(a, like or names[0])
        first = next(iter(first), None) if isinstance(first, list) else first
        a.device = None if first is None else first.device
        for row in rows:
            for problem in row(a):
                raise RuntimeError(f"bnbops::{op.partition('.')[0]}: {problem}")
        return result(a)

    torch.library.register_fake(f"bnbops::{op}", kernel, lib=implementations)


# ---- checks ----------------------------------------------------------------------------------------------------


def must(holds: Callable[[Arguments, Any], bool], words: str) -> Check:
    """What has to hold, and what is said otherwise. There `{x}` is the argument, `{shape}` its shape, `{shapes[name]}`
    that of another, and `{a}` all arguments."""

    def check(a: Arguments, x: Any) -> Problem:
        if holds(a, x):
            return False
        shapes = {name: list(value.shape) for name, value in vars(a).items() if isinstance(value, Tensor)}
        return words.format(a=a, x=x, shape=list(getattr(x, "shape", ())), shapes=shapes)

    return check


positive = must(lambda a, x: x > 0, "must be positive, got {x}")
one_element = must(lambda a, x: x.numel() == 1, "must have one element, got shape {shape}")
contiguous = must(lambda a, x: x.is_contiguous(), "must be contiguous; call .contiguous() first")
not_expanded = must(
    lambda a, x: all(size < 2 or stride != 0 for size, stride in zip(x.shape, x.stride(), strict=True)),
    "is expanded; its elements need memory of their own",
)
device = must(lambda a, x: a.device in (None, x.device), "is on another device than the first tensor")


def readable(a: Arguments, x: Tensor) -> Problem:
    """Numbers that a kernel takes from its device or from the CPU."""
    return x.device.type != "cpu" and device(a, x)


def dtype(*allowed: torch.dtype, words: str | None = None) -> Check:
    """Of a tensor, or of an argument that is a dtype."""
    *firsts, last = map(name_of, allowed)
    words = words or (f"{', '.join(firsts)} or {last}" if firsts else last)

    def check(a: Arguments, value: Tensor | torch.dtype) -> Problem:
        found = value.dtype if isinstance(value, Tensor) else value
        return found not in allowed and f"must be {words}, got {name_of(found)}"

    return check


def dtype_of(name: str) -> Check:
    """That of another argument, a tensor or a dtype."""

    def check(a: Arguments, x: Tensor) -> Problem:
        other = getattr(a, name)
        return dtype(other.dtype if isinstance(other, Tensor) else other)(a, x)

    return check


float32, float64, uint8 = dtype(torch.float32), dtype(torch.float64), dtype(torch.uint8)
int8, int32 = dtype(torch.int8), dtype(torch.int32)
floats = dtype(*FLOATS)
scales = dtype(torch.float32, torch.int32, words="float32, or int32 for the bits of float32")


def shape(sizes: Callable[[Arguments], Sequence[int]], remark: str = "") -> Check:
    def check(a: Arguments, x: Tensor) -> Problem:
        expected, found = list(sizes(a)), list(x.shape)
        return found != expected and f"must have shape {expected}{remark}, got {found}"

    return check


def as_many(needed: Count, words: str) -> Check:
    """Elements of a tensor, or tensors of a list."""

    def check(a: Arguments, x: Tensor | list[Tensor]) -> Problem:
        expected, found = needed(a), x.numel() if isinstance(x, Tensor) else len(x)
        return found != expected and words.format(found=found, needed=expected)

    return check


def one_for_each_block(numel: Count, size: str, words: str) -> Check:
    """Elements of a tensor, one for each block of `size` of `numel` elements."""

    def check(a: Arguments, x: Tensor) -> Problem:
        count, blocksize, found = numel(a), getattr(a, size), x.numel()
        needed = blocks(count, blocksize)
        if found == needed:
            return False
        return f"has {found} elements, but " + words.format(a=a, numel=count, size=blocksize, needed=needed)

    return check


def blocks(numel: int, blocksize: int) -> int:
    """How many there are; the last one may be shorter."""
    return -(numel // -blocksize)
