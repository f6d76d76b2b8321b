"""Arguments of the optimizers: their ranges, those that bitsandbytes takes from `args`, and those common to all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any, TypedDict

from torch import Tensor

from bnbops.facts import CODECS, DEFAULT_CODEC, UNCODED, Option, Rule

Check = Callable[[str, Any], None]  # (name, value); raises ValueError


class NotGiven(int):
    """An argument's default that can be told from the same number given by a caller."""


MIN_8BIT_SIZE = NotGiven(4096)
_MIN_8BIT_VECTOR_SIZE = 65_536  # above any bias or norm of real models


def require(ok: bool, message: str) -> None:
    """Raises ValueError with `message` unless `ok`."""
    if not ok:
        raise ValueError(message)


def must_be(wanted: str, ok: Callable[[Any], bool]) -> Check:
    """The check that an option is what is wanted."""

    def check(name: str, value: Any) -> None:
        require(ok(value), f"{name} must be {wanted}, got {value!r}")

    return check


non_negative = must_be("finite and not negative", lambda x: isinstance(x, Real) and 0 <= float(x) < math.inf)
schedule_length = must_be("None or an int", lambda x: x is None or (isinstance(x, int) and x >= 0))
_size = must_be("an int and not negative", lambda x: isinstance(x, int) and x >= 0)
COMMON_CHECKS: dict[str, Check] = {
    "optim_bits": must_be("8 or 32", lambda x: x in (8, 32)),
    "min_8bit_size": _size,
    "min_8bit_vector_size": _size,
    "percentile_clipping": must_be("an int from 0 to 100 (off)", lambda x: isinstance(x, int) and 0 <= x <= 100),
}


def _decay_rates(rates: list[Option]) -> Check:
    """For `betas`: a sequence of numbers, one for each of the operator's."""

    def check(name: str, value: Any) -> None:
        ok = isinstance(value, tuple | list) and len(value) == len(rates)
        require(ok, f"{name} must be {len(rates)} numbers, got {value!r}")
        for i, (rate, beta) in enumerate(zip(rates, value, strict=True)):
            rate.check(f"{name}[{i}]", beta)

    return check


def _codecs(states: list[str]) -> Check:
    """For `state_codec`: a codec of all states, or a mapping of some of them to codecs."""

    def check(name: str, value: Any) -> None:
        by_state = isinstance(value, Mapping)
        if unknown := [state for state in value if state not in states] if by_state else []:
            raise ValueError(f"{name} has a codec for {unknown}, but the states are {', '.join(states) or 'none'}")
        for codec in value.values() if by_state else [value]:
            require(
                isinstance(codec, str) and (codec in CODECS or codec == UNCODED),
                f"{name} must be one of {', '.join(map(repr, [*CODECS, UNCODED]))}, or a mapping of states' names to "
                f"these, got {value!r}",
            )

    return check


def checks_of(rules: Collection[Rule]) -> dict[str, Check]:
    """The checks of a family's options that its operators take; "beta1", ... are together in `betas`."""
    checks: dict[str, Check] = {}
    for rule in rules:
        if rates := [option for option in rule.options if option.name.startswith("beta")]:
            checks["betas"] = _decay_rates(rates)
        numbers = [option for option in rule.options if option not in rates and option.type != "bool"]
        checks |= {option.name: option.check for option in numbers}
    return {**checks, "state_codec": _codecs(list(dict.fromkeys(name for rule in rules for name in rule.state_names)))}


def numbers_of(rule: Rule, group: Mapping[str, Any]) -> dict[str, Any]:
    """What an operator takes, from a param group's options."""
    values = {**group, **{f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), start=1)}}
    return {option.name: values[option.name] for option in rule.options}


def learning_rate(name: str, value: Any) -> None:
    require(not isinstance(value, Tensor) or value.numel() == 1, f"a tensor {name} must have one element")
    non_negative(name, value.item() if isinstance(value, Tensor) else value)


def with_vector_size(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a param group or an override, in which `min_8bit_size` is for vectors, too: bitsandbytes' rule."""
    given = {"min_8bit_vector_size": options["min_8bit_size"]} if "min_8bit_size" in options else {}
    return {**given, **options}


def as_numbers(betas: Any) -> Any:
    """`betas` as plain numbers, also from tensors or a command line's string like "(0.9, 0.999)".

    Raises:
        ValueError: a string of something else.
    """
    if isinstance(betas, tuple | list):
        return tuple(beta.item() if isinstance(beta, Tensor) and beta.numel() == 1 else beta for beta in betas)
    if not isinstance(betas, str):
        return betas
    try:
        return tuple(float(beta) for beta in betas.strip().strip("()[]").split(","))
    except ValueError:
        raise ValueError(f"betas must be numbers, such as (0.9, 0.999), got {betas!r}") from None


def as_codecs(value: Any) -> Any:
    """`state_codec` as a param group holds it: a mapping is a dict of its own, an empty one the default."""
    return (dict(value) or DEFAULT_CODEC) if isinstance(value, Mapping) else value


def check_unsupported(name: str, **flags: bool) -> None:
    """Refuses arguments of bitsandbytes' signatures that are there only to say that they are off.

    Raises:
        ValueError: one of them is set.
    """
    for flag, value in flags.items():
        require(not value, f"{name} does not support {flag}={value!r}")


def common_defaults(
    name: str, defaults: Mapping[str, Any], args: Any, block_wise: bool, given: Mapping[str, Any]
) -> dict[str, Any]:
    """A family's defaults and those common to all, replaced by what `args` has (bitsandbytes' `args` argument).

    Raises:
        ValueError: something that is not supported, or `args` has none of the attributes.
    """
    values = {**given, "block_wise": block_wise, "skip_zeros": False, "max_unorm": defaults.get("max_unorm", 0.0)}
    from_args = {key: getattr(args, key) for key in values if hasattr(args, key)}
    require(
        args is None or bool(from_args),
        f"args must have at least one of the attributes {', '.join(values)}; {type(args).__name__} has none",
    )
    values |= from_args
    require(values.pop("block_wise"), f"{name} quantizes in blocks only; block_wise=False is not supported")
    check_unsupported(name, skip_zeros=values.pop("skip_zeros"))
    if "max_unorm" not in defaults:
        check_unsupported(name, max_unorm=values.pop("max_unorm"))
    if isinstance(values["min_8bit_size"], NotGiven):
        values |= {"min_8bit_size": int(values["min_8bit_size"]), "min_8bit_vector_size": _MIN_8BIT_VECTOR_SIZE}
    return {**defaults, **with_vector_size(values)}


class CommonKeywords(TypedDict, total=False):
    """Keyword-only arguments of every class, behind those of bitsandbytes' signature."""

    percentile_clipping: int
    state_codec: str | Mapping[str, str]
    block_wise: bool
    maximize: bool
    paged_directory: str | os.PathLike[str] | None


class CommonAndPaged(CommonKeywords, total=False):
    """Those of the classes whose bitsandbytes namesakes cannot be paged."""

    is_paged: bool
