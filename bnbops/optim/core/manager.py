"""Options for single parameters, in whatever optimizer holds them (bitsandbytes' GlobalOptimManager)."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from bnbops.facts import RULES
from bnbops.optim.core.options import learning_rate, with_vector_size

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

# What a param group may hold, over all optimizers: the operators' options, and those that are Python's.
_OF_RULES = {option.name for rule in RULES.values() for option in rule.options if not option.name.startswith("beta")}
_OF_PYTHON = {
    "betas", "initial_accumulator_value", "is_paged", "lr", "max_unorm", "maximize", "min_8bit_size",
    "min_8bit_vector_size", "optim_bits", "percentile_clipping", "state_codec", "trust_clip",
}  # fmt: skip
KNOWN_OPTIONS = tuple(sorted(_OF_RULES | _OF_PYTHON))
# Those that count only when a parameter's state is built.
STATE_OPTIONS = frozenset(
    {"initial_accumulator_value", "is_paged", "min_8bit_size", "min_8bit_vector_size", "optim_bits", "state_codec"}
)


_NONE = -1  # the number of no override


class GlobalOptimManager:
    """Overrides options of param groups for single parameters, in every optimizer that holds them.

    There is one manager, `GlobalOptimManager.get_instance()`. An override belongs to the parameter itself, not to a
    copy of it; a module override belongs to whatever parameter the module has under that name. Neither keeps anything
    alive. Options of a parameter take precedence over those of its module, later ones over earlier ones. Threads may
    override options, make modules that do, and step optimizers at the same time.

    Example::

        manager = bnbops.optim.GlobalOptimManager.get_instance()
        manager.override_config(model.head.weight, "optim_bits", 32)
        optimizer = bnbops.optim.AdamW8bit(model.parameters())
    """

    _instance: GlobalOptimManager | None = None
    _lock = threading.RLock()  # of writers; readers copy what is there (`_living`)
    _optimizers: WeakSet[torch.optim.Optimizer]  # asked whether an override comes too late

    def __init__(self) -> None:
        raise RuntimeError("there is one GlobalOptimManager; get it with GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager."""
        if cls._instance is None:
            with cls._lock:
                if cls._instance is None:
                    instance = cls.__new__(cls)
                    instance._optimizers = WeakSet()
                    instance.initialize()
                    cls._instance = instance  # complete: threads look at it without the lock
        return cls._instance

    def initialize(self) -> None:
        """Forgets every override, those of `bnbops.nn`'s embeddings included. States that exist stay as they are."""
        with self._lock:
            self._parameters = WeakTensorKeyDictionary()  # parameter -> options
            self._modules = WeakIdKeyDictionary()  # module -> parameter name -> options

    def register_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Does nothing but check `params`: bitsandbytes notes positions here, overrides follow the parameter itself.

        Args:
            params: parameters or param groups, as an optimizer takes them.

        Raises:
            TypeError: something else than parameters.
        """
        for entry in params:
            _tensors(entry["params"] if isinstance(entry, dict) else entry)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Overrides options of parameters: either `key` with `value`, or all of `key_value_dict`.

        It takes effect from the next step on, but for options that count when a state is built. Schedulers do not
        change it. torch cannot cast or move a DTensor in place any more once it is here, as it is weakly referenced:
        call `module.to()` before, or use `register_module_override`.

        Args:
            parameters: one parameter, or several of any shape and dtype.
            key: a key of param groups, such as "optim_bits" or "lr".
            value: its value for these parameters.
            key_value_dict: several keys and their values.

        Raises:
            TypeError: `parameters` are not tensors.
            ValueError: an option that no optimizer has, or neither or both of `key` and `key_value_dict`.

        Warns:
            UserWarning: an optimizer has built the state that the override is about.
        """
        if (key is None) == (key_value_dict is None):
            raise ValueError("give either key and value, or key_value_dict")
        if key is not None and value is None:
            raise ValueError(f"no value for {key!r}; to override it with None, use key_value_dict={{{key!r}: None}}")
        config: Mapping[str, Any] = (key_value_dict or {}) if key is None else {key: value}
        _check_known(config)
        tensors = _tensors(parameters)
        for param in tensors:
            self._warn_if_late(param, config)
        with self._lock:
            for param in tensors:
                self._parameters[param] = {**self._parameters.get(param, {}), **config}

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Overrides options of the parameter that a module has under a name when an optimizer builds its state.

        So the override holds for the parameter that `module.to()`, a tied weight or FSDP's sharding put there.

        Args:
            module: any module.
            param_name: name of one of its own parameters, such as "weight".
            config: option names and values.

        Raises:
            TypeError: `module` is not a module.
            ValueError: it has no parameter of that name, or no optimizer has such an option.

        Warns:
            UserWarning: an optimizer has built the state that the override is about.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if param_name not in module._parameters:
            raise ValueError(
                f"{type(module).__name__} has no parameter '{param_name}' of its own, only {sorted(module._parameters)}"
            )
        _check_known(config)
        if (param := module._parameters[param_name]) is not None:
            self._warn_if_late(param, config)
        self.add_module_override(module, param_name, config)

    def add_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """`register_module_override` without its checks and its warning, for modules that register themselves."""
        with self._lock:
            overrides = self._modules.get(module, {})
            self._modules[module] = {**overrides, param_name: {**overrides.get(param_name, {}), **config}}

    def overrides(self) -> dict[Tensor, dict[str, Any]]:
        """The parameters that have overrides now, and the options that take the place of their param group's."""
        merged: dict[Tensor, dict[str, Any]] = {}
        for module, names in _living(self._modules):
            for name, config in names.items():
                # Not getattr: a parametrization would compute a tensor, even with collectives, instead of finding one.
                if (param := module._parameters.get(name)) is not None:
                    merged.setdefault(param, {}).update(config)
        for param, config in _living(self._parameters):
            merged.setdefault(param, {}).update(config)
        return merged

    def overrides_for(self, param: Tensor) -> dict[str, Any]:
        """`overrides()` of one parameter; empty if there are none."""
        return self.overrides().get(param, {})

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Remembers an optimizer, as long as it lives, to warn of overrides that come too late for it."""
        with self._lock:
            self._optimizers.add(optimizer)

    def _warn_if_late(self, param: Tensor, config: Mapping[str, Any]) -> None:
        late = sorted(STATE_OPTIONS & config.keys())
        references = list(self._optimizers.data)  # type: ignore[attr-defined]  # as in _living; not in the stub
        optimizers = [optimizer for reference in references if (optimizer := reference()) is not None]
        names = sorted({type(optimizer).__name__ for optimizer in optimizers if optimizer.state.get(param)})
        if late and names:
            warnings.warn(
                f"{', '.join(names)} has already built the state of a parameter of shape {list(param.shape)}: "
                f"overriding {', '.join(late)} comes too late there and holds for other optimizers only. Override "
                "before optimizer.init_state() and the first step().",
                stacklevel=3,
            )


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
        """The number of a parameter's override, or _NONE."""
        return self.number_of.get(param, _NONE) if self.values else _NONE

    def partition(self, params: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
        """The parameters by number of their override, in order of appearance."""
        if not self.values:
            return [(_NONE, params)]
        parts: dict[int, list[Tensor]] = {}
        for param in params:
            parts.setdefault(self.number(param), []).append(param)
        return list(parts.items())

    def applied(self, group: dict[str, Any], number: int) -> dict[str, Any]:
        """The options of a param group with the override of that number."""
        return group if number == _NONE else {**group, **self.values[number]}


def _living(weak: WeakIdKeyDictionary) -> list[tuple[Any, dict[str, Any]]]:
    """The entries at this moment. Iterating over the dictionary itself fails when another thread, or the garbage
    collector in one, changes it."""
    return [(key, value) for reference, value in list(weak.data.items()) if (key := reference()) is not None]


def _tensors(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected parameters, as model.parameters() gives them, found {type(tensor).__name__}")
    return tensors


def _check_known(config: Mapping[str, Any]) -> None:
    if unknown := sorted(map(str, config.keys() - set(KNOWN_OPTIONS))):
        raise ValueError(f"no optimizer has the options {unknown}; known are {', '.join(KNOWN_OPTIONS)}")
