"""What makes the classes: constructors from their signatures, and the classes whose name says a precision or "Paged"
from their family's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from bnbops.optim.core.optimizer import Optimizer
from bnbops.optim.core.options import CommonAndPaged, check_unsupported

T = TypeVar("T", bound=Optimizer)

Init = TypeVar("Init", bound=Callable[..., None])

_COMMON = inspect.signature(Optimizer.__init__).parameters
_FLAGS = ("amsgrad", "centered")  # in bitsandbytes' signatures only to say that they are off


def declared(init: Init) -> Init:
    """A constructor whose signature says all: what `Optimizer` does not take are the family's options.

    Its last argument, `**keywords: Unpack[CommonKeywords]`, becomes just these: `help()` shows them, and others are
    refused.

    Args:
        init: an `__init__` without a body.
    """
    signature = inspect.signature(init)
    *own, _ = signature.parameters.values()
    further = [_COMMON[name] for name in _COMMON if name in CommonAndPaged.__annotations__]
    further = [x.replace(kind=x.KEYWORD_ONLY) for x in further if x.name not in signature.parameters]
    signature = signature.replace(parameters=[*own, *further])

    @wraps(init)
    def construct(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - signature.parameters.keys():
            raise TypeError(f"{init.__qualname__}() got an unexpected keyword argument '{name}'")
        init(self, *args, **kwargs)  # says what is missing
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        check_unsupported(type(self).__name__, **{name: given[name] for name in _FLAGS if name in given})
        options = {name: value for name, value in given.items() if name not in (*_COMMON, *_FLAGS)}
        Optimizer.__init__(defaults=options, **{name: value for name, value in given.items() if name in _COMMON})

    construct.__signature__ = signature  # type: ignore[attr-defined]  # what inspect looks for
    return cast(Init, construct)


def variant(
    family: type[T], *, bits: int | None = None, paged: bool = False, without: tuple[str, ...] = (), **defaults: Any
) -> type[T]:
    """`family` with `optim_bits` or `is_paged` fixed, as the subclass `[Paged]Family[8bit|32bit]`.

    Args:
        family: a class of its own module, which is to hold the result under its name.
        bits: 8 or 32.
        paged: whether states are in paged memory.
        without: arguments that bitsandbytes' class does not have. An argument that it has although it is fixed may
            only repeat what is fixed, or its default.
        defaults: arguments with another default than the family's.
    """
    name = f"{'Paged' if paged else ''}{family.__name__}{f'{bits}bit' if bits else ''}"
    inherited = inspect.signature(family.__init__)
    signature = inherited.replace(
        parameters=[
            parameter.replace(default=defaults.get(parameter.name, parameter.default))
            for parameter in inherited.parameters.values()
            if parameter.name not in without
        ]
    )

    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        if bits:
            asked, default = given.get("optim_bits", bits), defaults.get("optim_bits", 32)
            if asked not in (bits, default):
                raise ValueError(f"{name} always has {bits}-bit states, got optim_bits={asked}")
            given["optim_bits"] = bits
        if paged:
            given["is_paged"] = True
        del given["self"]
        family.__init__(self, **given)

    __init__.__signature__ = signature  # type: ignore[attr-defined]  # what inspect looks for
    __init__.__qualname__ = f"{name}.__init__"
    __init__.__module__ = family.__module__
    return type(
        name,
        (family,),
        {
            "__init__": __init__,
            "__doc__": _doc(family, signature, bits, paged),
            "__module__": family.__module__,
            "__qualname__": name,
        },
    )


def _doc(family: type[Optimizer], signature: inspect.Signature, bits: int | None, paged: bool) -> str:
    what = [f"{bits}-bit states"] * bool(bits) + ["states that can be paged out"] * paged
    fixed = ["optim_bits"] * bool(bits) + ["is_paged"] * paged
    kept = [f"`{name}`" for name in fixed if name in signature.parameters]
    for_show = f"; {' and '.join(kept)} {'are' if len(kept) > 1 else 'is'} there for bitsandbytes' signature only"
    return f"`{family.__name__}` with {', '.join(what)}. The arguments are the same{for_show if kept else ''}."
