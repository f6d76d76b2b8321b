"""What public classes are called while bnbops is installed as bitsandbytes: some libraries look for "bitsandbytes" in
a class's name (Transformers' Trainer, for the 8-bit optimizers whose embeddings it then keeps in 32 bits)."""

from __future__ import annotations

from contextlib import ExitStack

from bnbops import functional, nn, optim
from bnbops.alias import autograd, optimizer

_undo = ExitStack()


def rename() -> None:
    """Names that pickles find: modules that are bitsandbytes', too, as far as it has the class."""
    layers = dict.fromkeys(_classes(nn), "bitsandbytes.nn.modules")
    optimizers = {
        family: family.__module__.replace("bnbops.optim.families", "bitsandbytes.optim") for family in _classes(optim)
    }
    bases = dict.fromkeys(_classes(optimizer), "bitsandbytes.optim.optimizer")
    others = {
        functional.QuantState: "bitsandbytes.functional",
        autograd.MatmulLtState: "bitsandbytes.autograd._functions",
    }
    for value, module in (layers | optimizers | bases | others).items():
        _undo.callback(setattr, value, "__module__", value.__module__)
        value.__module__ = module


def restore() -> None:
    _undo.close()


def _classes(module: object) -> list[type]:
    return [value for value in map(vars(module).get, module.__all__) if isinstance(value, type)]
