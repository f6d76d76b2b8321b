"""Finds `bitsandbytes` and its modules in bnbops, and answers for its metadata.

This file imports neither torch nor bnbops: bnbops.pth runs it when Python starts, where the environment variable
BNBOPS_INSTALL_AS_BITSANDBYTES is 1. Such a process loads bnbops when it first imports bitsandbytes, not before.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import CodeType, ModuleType

NAME = "bitsandbytes"
VERSION = "0.50.2"  # the release whose interface bnbops follows
PACKAGE = "bnbops.alias.bitsandbytes"

# bitsandbytes' modules that have another name in bnbops; the others have the same one.
RENAMED = {
    "autograd": "alias.autograd",
    "autograd._functions": "alias.autograd",
    "nn.modules": "nn",
    "optim.optimizer": "alias.optimizer",
    "utils": "alias.utils",
    **{
        f"optim.{family.stem}": f"optim.families.{family.stem}"
        for family in (Path(__file__).parents[1] / "optim" / "families").glob("[!_]*.py")
    },
}
# Those that bnbops does not have, and why.
MISSING = {
    "_ops": "torch.ops.bitsandbytes has its operators all the same",
    "backends": "the kernels are those of torch.ops.bnbops.*",
    "cextension": "there is no ctypes library; the kernels are those of torch.ops.bnbops.*",
    "consts": "it describes bitsandbytes' own files",
    "cuda_specs": "torch.version.cuda and torch.cuda.get_device_capability() tell as much",
    "diagnostics": "use `python -m bnbops`",
}
# Modules of other libraries, which bnbops.alias.completions completes after their import.
COMPLETED = ("accelerate.utils.offload", "transformers.integrations.bitsandbytes")


class Finder(DistributionFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == NAME:
            origin = str(Path(__file__).with_name("bitsandbytes.py"))
            return ModuleSpec(NAME, _SameModule(), origin=origin, is_package=True)
        if fullname.startswith(f"{NAME}."):
            return _submodule(fullname)
        if fullname in COMPLETED:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            found = (finder.find_spec(fullname, path, target) for finder in others)
            return _completed(next(filter(None, found), None))
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        if context is None or context.name is None or context.name.lower() == NAME:
            yield _Distribution()


def ours(fullname: str) -> str:
    """The name in bnbops of a module of bitsandbytes."""
    if fullname == NAME:
        return PACKAGE
    name = fullname.removeprefix(f"{NAME}.")
    return f"bnbops.{RENAMED.get(name, name)}"


def _submodule(fullname: str) -> ModuleSpec | None:
    why = MISSING.get(fullname.split(".")[1])
    if why is not None:
        raise ModuleNotFoundError(f"bnbops, installed as bitsandbytes, has no {fullname}: {why}", name=fullname)
    spec = importlib.util.find_spec(ours(fullname))
    if spec is None:
        return None
    is_package = spec.submodule_search_locations is not None
    return ModuleSpec(fullname, _SameModule(), origin=spec.origin, is_package=is_package)


class _SameModule(Loader):
    """Loads bnbops' module under its own name, and gives it a second one: no module is there twice."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(ours(spec.name))
        spec.loader_state = module.__spec__  # importlib will put `spec` in its place
        return module

    def exec_module(self, module: ModuleType) -> None:
        second, module.__spec__ = module.__spec__, module.__spec__.loader_state
        if second.name == NAME:
            from bnbops.alias import install_as_bitsandbytes

            install_as_bitsandbytes()  # which was not called, where bnbops.pth brought the finder

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m bitsandbytes`."""
        return importlib.util.find_spec(ours(fullname)).loader.get_code(ours(fullname))


def _completed(spec: ModuleSpec | None) -> ModuleSpec | None:
    """`spec`, whose loader runs the module as before, and completes it then."""
    execute = getattr(spec and spec.loader, "exec_module", None)

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if FINDER in sys.meta_path:
            from bnbops.alias import completions

            completions.add(module)

    if execute is not None:
        spec.loader.exec_module = exec_module
    return spec


class _Distribution(Distribution):
    def read_text(self, filename: str) -> str | None:
        texts = {"METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n", "top_level.txt": f"{NAME}\n"}
        return texts.get(filename)

    def locate_file(self, path: str) -> Path:
        return Path(__file__).parent / path


FINDER = Finder()


def install() -> None:
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def uninstall() -> None:
    """Removes the finder, the modules' second names, and what importing by these has set in their parents: those are
    modules from elsewhere; a package of ours has its own ones."""
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)
    names = [name for name in sys.modules if name.partition(".")[0] == NAME]
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent and (own := ours(parent)) != PACKAGE and not ours(name).startswith(f"{own}."):
            vars(sys.modules[own]).pop(child, None)
    for name in names:
        del sys.modules[name]
