"""What GlobalOptimManager overrides for an optimizer's parameters, in a form that a compiled graph can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bnbops.optim.core.manager import GlobalOptimManager
from bnbops.optim.core.options import learning_rate, with_vector_size

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

NONE = -1


class Overrides:
    """Distinct overrides, by number, and the number of each parameter that has one.

    Parameters of one number share an operator call. The manager's dictionaries are keyed by identity, so that the
    compiler cannot look into them; these are looked up before a graph runs.
    """

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self.number_of: dict[Tensor, int] = {}

    def look_up(self, optimizer: StatefulOptimizer) -> None:
        """Asks the manager for the overrides of every parameter.

        Raises:
            ValueError: for an option that the optimizer does not have, or with a value that it refuses.
        """
        overrides = GlobalOptimManager.get_instance().overrides()
        values: list[dict[str, Any]] = []
        number_of: dict[Tensor, int] = {}
        for group in optimizer.param_groups if overrides else ():
            for param in group["params"]:
                if not (override := with_vector_size(overrides.get(param, {}))):
                    continue
                if unknown := sorted(override.keys() - group.keys()):
                    raise ValueError(
                        f"GlobalOptimManager overrides {', '.join(unknown)} of a parameter of shape "
                        f"{list(param.shape)}, but {type(optimizer).__name__} has no such options"
                    )
                optimizer._check_options({**group, **override})
                if "lr" in override:
                    learning_rate("lr", override["lr"])
                if override not in values:
                    values.append(override)
                number_of[param] = values.index(override)
        if values != self.values or number_of != self.number_of:  # else a compiled graph keeps the objects it knows
            self.values, self.number_of = values, number_of

    def number(self, param: Tensor) -> int:
        """The number of a parameter's override, or NONE."""
        return self.number_of.get(param, NONE) if self.values else NONE

    def partition(self, params: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """The parameters by number of their override, in order of appearance."""
        if not self.values:
            return [(NONE, params)]
        parts: dict[int, list[Tensor]] = {}
        for param in params:
            parts.setdefault(self.number(param), []).append(param)
        return list(parts.items())

    def applied(self, group: dict[str, Any], number: int) -> dict[str, Any]:
        """The options of a param group with the override of that number."""
        return group if number == NONE else {**group, **self.values[number]}
