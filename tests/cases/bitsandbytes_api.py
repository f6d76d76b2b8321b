"""bitsandbytes' public interface: its names and signatures, recorded in golden/bitsandbytes_api.json.

Run in an environment that has bitsandbytes, this file prints the record anew:

    python tests/cases/bitsandbytes_api.py > tests/golden/bitsandbytes_api.json
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

RECORD = Path(__file__).parents[1] / "golden" / "bitsandbytes_api.json"
PACKAGE = "bitsandbytes"
_NOT_RECORDED = ("__main__", "backends")  # these are kernels for single devices, behind the operators


class Parameter(NamedTuple):
    name: str
    kind: str  # "positional", "keyword", "*" or "**"
    default: str | None  # as Python text


def text_of(function: Any) -> str:
    """The signature as Python text without annotations, such as "(A, out=None, *, blocksize=64)"."""
    parameters = [
        p.replace(annotation=p.empty, default=_Text(p.default) if p.default is not p.empty else p.empty)
        for p in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


class _Text:
    """A default whose repr is the same in every process."""

    def __init__(self, value: Any) -> None:
        plain = value is None or isinstance(value, bool | int | float | str | tuple)
        self.text = repr(value) if plain or type(value).__module__ == "torch" else f"<{type(value).__name__}>"

    def __repr__(self) -> str:
        return self.text if not self.text.startswith("<") else repr(self.text)


def parameters_of(text: str) -> list[Parameter]:
    """The parameters of such a text."""
    arguments = ast.parse(f"def f{text}: pass").body[0].args  # type: ignore[attr-defined]
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [(a, "positional", d) for a, d in zip(positional, defaults, strict=True)]
    pairs += [(arguments.vararg, "*", None)] if arguments.vararg else []
    pairs += [(a, "keyword", d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    pairs += [(arguments.kwarg, "**", None)] if arguments.kwarg else []
    return [Parameter(a.arg, kind, None if d is None else ast.unparse(d)) for a, kind, d in pairs]


def constructors(package: str) -> dict[str, list[Parameter]]:
    """Of the classes that a package of bitsandbytes has, as recorded."""
    recorded = json.loads(RECORD.read_text())["modules"]
    homes = {name: where.removeprefix("= ").rpartition(".")[0] for name, where in recorded[package].items()}
    return {name: parameters_of(recorded[home][name]["()"]) for name, home in homes.items()}


def _members(cls: type) -> dict[str, str]:
    """A class' signature, its bases in bitsandbytes, and what it adds to theirs."""
    bases = [f"{base.__module__}.{base.__name__}" for base in cls.__bases__ if _is_own(base)]
    own = {name: _member(value) for name, value in sorted(vars(cls).items()) if not name.startswith("_")}
    return {"()": text_of(cls)} | ({"bases": " ".join(bases)} if bases else {}) | own


def _is_own(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] == PACKAGE


def _member(value: Any) -> str:
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {text_of(value.__func__)}"
    if inspect.isfunction(value):
        return text_of(value)
    return "property" if isinstance(value, property) else "value"


def modules() -> Iterator[ModuleType]:
    """All of bitsandbytes' public modules that can be imported."""
    package = importlib.import_module(PACKAGE)
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if found.name.split(".")[1] in _NOT_RECORDED:
            continue
        if Path(getattr(found.module_finder.find_spec(found.name), "origin", "")).suffix == ".py":
            yield importlib.import_module(found.name)


def _described(module: ModuleType) -> dict[str, Any]:
    """A module's own names; a package's, also those that come from its modules."""
    found: dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        home = getattr(value, "__module__", "")
        if name.startswith("_"):
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            if home == module.__name__:
                found[name] = _members(value) if inspect.isclass(value) else text_of(value)
            elif _is_own(value) and hasattr(module, "__path__"):
                found[name] = f"= {home}.{value.__qualname__}"
        elif isinstance(value, bool | int | float | str | tuple | list | set | dict):
            found[name] = "value"
    return found


def record() -> dict[str, Any]:
    package = importlib.import_module(PACKAGE)
    return {
        "source": f"names and signatures of bitsandbytes {package.__version__}, by tests/cases/bitsandbytes_api.py",
        "modules": {module.__name__: _described(module) for module in modules()},
    }


if __name__ == "__main__":
    print(json.dumps(record(), indent=1))
