"""Libraries that were imported earlier remember whether there is a bitsandbytes."""

from __future__ import annotations

import importlib
import sys

_ANSWERS = ("transformers.utils.import_utils", "peft.import_utils", "accelerate.utils.imports", "trl.import_utils")
_IMPORTERS = ("transformers.integrations.bitsandbytes",)  # whose global `bnb` is missing


def announce() -> None:
    _forget_answers()
    for name in _IMPORTERS:
        if name in sys.modules:
            vars(sys.modules[name]).setdefault("bnb", importlib.import_module("bitsandbytes"))


def withdraw() -> None:
    _forget_answers()
    for name in _IMPORTERS:
        if name in sys.modules:
            vars(sys.modules[name]).pop("bnb", None)


def _forget_answers() -> None:
    for module in filter(None, map(sys.modules.get, _ANSWERS)):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()
