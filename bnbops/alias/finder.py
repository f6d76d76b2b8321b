"""Finds `bitsandbytes` and its submodules in bnbops, and answers for its metadata.

This file imports neither torch nor bnbops, and runs before `bnbops/__init__.py` where the environment variable
BNBOPS_INSTALL_AS_BITSANDBYTES is set (bnbops.pth): such a process only loads them when it imports bitsandbytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

NAME = "bitsandbytes"
VERSION = "0.50.2"  # the release whose interface bnbops follows

# Modules that bnbops has under another name. Others have the same name in both.
RENAMED = {
    "nn.modules": "nn",
    "autograd": "alias.autograd",
    "autograd._functions": "alias.autograd",
    "optim.optimizer": "alias.optimizer",
    "utils": "alias.utils",
}
MISSING = {
    "_ops": "bnbops' operators are torch.ops.bnbops.*",
    "backends": "bnbops' operators are torch.ops.bnbops.*",
    "cextension": "bnbops has no ctypes library: its operators are torch.ops.bnbops.*",
    "consts": "it describes bitsandbytes' own library files",
    "cuda_specs": "bnbops leaves CUDA's versions to torch.version.cuda",
    "diagnostics": "use `python -m bnbops`",
}

# What to do after a module of another library was loaded, by its name: "module:function" of bnbops, called with it.
AFTER = {"transformers.integrations.bitsandbytes": "bnbops.alias.converters:add"}

_FOLDER = Path(__file__).parent


def renamed(fullname: str) -> str:
    """The name in bnbops of bitsandbytes' submodule."""
    name = fullname.removeprefix(f"{NAME}.")
    return f"bnbops.{RENAMED.get(name, name)}"


class Finder(DistributionFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == NAME:
            # bnbops' folder, too: pkgutil lists its modules.
            return importlib.util.spec_from_file_location(
                NAME, _FOLDER / "package.py", submodule_search_locations=[str(_FOLDER.parent)]
            )
        if fullname in AFTER:
            return self._followed(fullname, path, target)
        if not fullname.startswith(f"{NAME}."):
            return None
        name = fullname.removeprefix(f"{NAME}.")
        if why := MISSING.get(name.partition(".")[0]):
            raise ModuleNotFoundError(f"bnbops, installed as bitsandbytes, has no {fullname}: {why}", name=fullname)
        spec = importlib.util.find_spec(renamed(fullname))
        if spec is None:
            return None
        return ModuleSpec(
            fullname, _SameModule(), origin=spec.origin, is_package=spec.submodule_search_locations is not None
        )

    def _followed(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """Another finder's spec, whose loader does what `AFTER` says."""
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            spec.loader.exec_module = _then(spec.loader.exec_module, AFTER[fullname])
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        if context is None or context.name in (None, NAME):
            yield _Distribution()


class _SameModule(Loader):
    """Gives bnbops' module another name in sys.modules, and nothing else: the module is not loaded twice."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(renamed(spec.name))
        spec.loader_state = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__, module.__loader__ = module.__spec__.loader_state

    def get_code(self, fullname: str) -> object:
        """For `python -m`."""
        return importlib.util.find_spec(renamed(fullname)).loader.get_code(renamed(fullname))


def _then(execute: Callable[[ModuleType], None], function: str) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        if FINDER in sys.meta_path:
            where, _, name = function.partition(":")
            getattr(importlib.import_module(where), name)(module)

    return exec_module


class _Distribution(Distribution):
    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return (
                f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nSummary: bnbops under bitsandbytes' name\n"
            )
        return f"{NAME}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: str) -> Path:
        return _FOLDER / path


FINDER = Finder()


def install() -> None:
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def uninstall() -> None:
    """Removes the finder, all modules' second names, and what their import left in the parents."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    for fullname in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        parent, _, child = fullname.rpartition(".")
        own = getattr(sys.modules.get(parent), "__name__", NAME)
        if own != NAME and f"{own}.{child}" not in sys.modules:
            vars(sys.modules[own]).pop(child, None)
    for fullname in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[fullname]


def is_ours(module: ModuleType) -> bool:
    return getattr(module, "__file__", None) == str(_FOLDER / "package.py")
