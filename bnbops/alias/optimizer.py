"""`bitsandbytes.optim.optimizer`: the base classes, to test what an optimizer is."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from bnbops.optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdEMAMix, GlobalOptimManager, Lion, Optimizer, RMSprop

__all__ = ["GlobalOptimManager", "MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

Optimizer8bit = Optimizer


class _Kind(Optimizer, metaclass=ABCMeta):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: bnbops' optimizers do not take an update rule's name; derive from one of them "
            "(bnbops.optim.AdamW, ...) or from bnbops.optim.Optimizer"
        )


class Optimizer1State(_Kind):
    """What bitsandbytes derives from the class of this name is an instance of this one."""


class Optimizer2State(_Kind):
    """What bitsandbytes derives from the class of this name is an instance of this one."""


for _family in (Adagrad, Adam, AdamW, AdEMAMix, LAMB, LARS, Lion, RMSprop, SGD):
    (Optimizer2State if len(_family._rules[0].states) > 1 else Optimizer1State).register(_family)


class MockArgs:
    """An object with these attributes: an optimizer's `args`."""

    def __init__(self, initial_data: dict[str, Any]) -> None:
        self.__dict__.update(initial_data)
