"""bnbops with torch.distributed."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOME = {  # of public names; imported on first use, as torch.distributed takes a second
    "SafeLoadPlanner": "checkpoint",
    "Traffic": "communication",
    "data_parallel": "simple_fsdp",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "traffic": "communication",
}
__all__ = list(_HOME)
_DTENSOR = "torch.distributed.tensor"


def _register() -> None:
    from bnbops.distributed import sharding

    sharding.register()


class _AfterDTensor(importlib.abc.MetaPathFinder):
    """Registers the operators' sharding rules when DTensors come into being: their import takes longer than all of
    bnbops', and programs on one device do without."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _DTENSOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _DTENSOR in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterDTensor())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"bnbops.distributed.{_HOME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
