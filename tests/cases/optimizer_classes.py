"""Every optimizer class of bnbops.optim by name, and how to build it."""

import re
from typing import Any

from bnbops import optim

CLASSES = [name for name in optim.__all__ if name not in ("Optimizer", "GlobalOptimManager")]
FAMILIES = [name for name in CLASSES if not re.search(r"Paged|bit", name)]
WITH_8BIT = [name for name in FAMILIES if name != "PytorchLARS"]
# Arguments without which a class cannot be built, or does without its state.
_USUAL = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "LARS": {"lr": 1e-3, "momentum": 0.9}}


def family(name: str) -> str:
    """The class without precision and paging."""
    return re.sub(r"Paged|8bit|32bit", "", name)


def fixed_bits(name: str) -> int | None:
    """The precision that a class's name says."""
    return int(found[1]) if (found := re.search(r"(\d+)bit", name)) else None


def build(name: str, parameters: Any, **options: Any) -> optim.Optimizer:
    """An optimizer with momentum where there is such a thing, but for `options`."""
    return getattr(optim, name)(parameters, **{**_USUAL.get(family(name), {}), **options})
