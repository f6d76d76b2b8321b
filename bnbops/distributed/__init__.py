"""bnbops with torch.distributed."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from bnbops.versions import torch_is

_HOME = {  # of public names; imported on first use, as torch.distributed takes a second
    "SafeLoadPlanner": "checkpoint",
    "Traffic": "communication",
    "data_parallel": "simple_fsdp",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "traffic": "communication",
}
__all__ = list(_HOME)


class _After(importlib.abc.MetaPathFinder):
    """Does something when a module of torch's has been imported. That import takes longer than all of bnbops', and
    programs on one device do without."""

    def __init__(self, module: str, action: Callable[[], None]) -> None:
        self._module, self._action = module, action

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._action()

            spec.loader.exec_module = exec_module
        return spec


def _after(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _After(module, action))


_after("torch.distributed.tensor", lambda: import_module("bnbops.distributed.sharding").register())
if not torch_is("2.13"):
    from bnbops.distributed import older_torch

    _after("torch.distributed.tensor", older_torch.let_parameters_detach)
    _after("torch.distributed.fsdp._fully_shard._fsdp_param", older_torch.let_integers_be_sharded)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"bnbops.distributed.{_HOME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
