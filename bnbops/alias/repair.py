"""Libraries that were imported earlier remember whether there was a bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TypeVar

from bnbops.alias import completions, finder

T = TypeVar("T")

# Functions that remember their answer.
_ASKED = {
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "transformers.utils.import_utils": ("is_bitsandbytes_available", "_package_distribution_mapping"),
}
# Modules that hold bitsandbytes as `bnb`, and what they hold where there is none: None, or nothing at all.
_HOLDERS = {
    "peft.helpers": {"bnb": None},
    "peft.tuners.hira.bnb": {},
    "peft.tuners.lora.bnb": {},
    "peft.tuners.pvera.bnb": {},
    "peft.tuners.randlora.bnb": {},
    "peft.tuners.road.bnb": {},
    "transformers.integrations.bitsandbytes": {},
    "trl.experimental.online_dpo.online_dpo_trainer": {},
    "trl.generation.vllm_generation": {},
}
# Modules that can be imported where there is none, but then lack the classes that are named here.
_CLASSES = {
    "peft.tuners.adalora.bnb": ("SVDLinear8bitLt", "SVDLinear4bit"),
    "peft.tuners.ia3.bnb": ("Linear8bitLt", "Linear4bit"),
}


def announce() -> None:
    """Tells them that there is one."""
    _ask_again()
    for module, names in _loaded(_CLASSES):
        if not all(hasattr(module, name) for name in names):
            importlib.reload(module)
    for module, _ in _loaded(dict.fromkeys(finder.COMPLETED)):
        completions.add(module)


def withdraw() -> None:
    """Tells them that it has gone. There may be a real one, which was shadowed."""
    completions.remove()
    _ask_again()


def _ask_again() -> None:
    for module, names in _loaded(_ASKED):
        for name in names:
            getattr(module, name).cache_clear()
    is_there = importlib.util.find_spec(finder.NAME) is not None
    for module, otherwise in _loaded(_HOLDERS):
        vars(module).pop("bnb", None)
        vars(module).update({"bnb": importlib.import_module(finder.NAME)} if is_there else otherwise)


def _loaded(table: dict[str, T]) -> list[tuple[ModuleType, T]]:
    return [(sys.modules[name], value) for name, value in table.items() if name in sys.modules]
