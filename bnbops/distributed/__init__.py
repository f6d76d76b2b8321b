"""bnbops with torch.distributed."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
    if name == "data_parallel":  # on first use: it brings in DTensor
        from bnbops.distributed.simple_fsdp import data_parallel

        return data_parallel
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
