"""Saving, loading and copying optimizers."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from bnbops.dtensors import local
from bnbops.facts import Rule
from bnbops.lasting import lasting
from bnbops.optim.checkpoints import interchange, torch_interchange
from bnbops.optim.checkpoints.loading import check_cast, check_state, copied, in_precision, placed_state
from bnbops.optim.core.batch import Batch
from bnbops.optim.core.manager import KNOWN_OPTIONS, GlobalOptimManager
from bnbops.optim.core.overrides import Overrides
from bnbops.optim.core.state import Allocate, absmax_name, wants_8bit
from bnbops.optim.core.watch import Watch
from bnbops.optim.paging.paged import PagedMemory
from bnbops.optim.paging.unified import UnifiedMemory

FORMAT_VERSION = 1
# Group options that are of this process, not of the training run: the live ones stay.
_OWN = ("is_paged",)
_ABSMAX = absmax_name("")
# Those that version 1 had not from the start, and what it did.
_DEFAULTS = {"percentile_clipping": 100, "min_8bit_vector_size": sys.maxsize}


class CheckpointedOptimizer(torch.optim.Optimizer):
    """What `Optimizer` does with state dicts, pickles and copies."""

    _rules: ClassVar[tuple[Rule, ...]]
    _overrides: Overrides
    fused_scaling: bool
    _paged_directory: str | os.PathLike[str] | None
    _paged_memory: PagedMemory | None
    _unified_memory: dict[torch.device, UnifiedMemory]
    _held: list[Batch] | None
    _unmoved: bool
    _watch: Watch

    def _prepare(self) -> None:
        raise NotImplementedError

    def _allocator(self, param: Tensor, config: dict[str, Any]) -> Allocate | None:
        raise NotImplementedError

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """`state_dict()` as bitsandbytes' class of the same name writes it, for its `load_state_dict`.

        Raises:
            ValueError: an option that bitsandbytes' class does not have.
        """
        return interchange.to_bitsandbytes(self)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Loads what `state_dict()` returned, here or in the class of the same name of bitsandbytes or torch.optim.

        Tensors are copied, moved to where their parameter's states belong, and not cast; torch's states get the
        precision that this optimizer's options give them. Those of sharded parameters (DTensors) may be sharded alike
        or otherwise, or whole: every rank then takes its part.

        Args:
            state_dict: see above; it is not changed.
            move_to_device: at once. Otherwise states stay on the device they come from until the next `step()`,
                `init_state()` or `to_gpu()`; those of sharded parameters, and paged ones, are moved all the same.

        Raises:
            ValueError: the state dict does not fit this optimizer. Nothing has changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if interchange.is_bitsandbytes(state_dict):
            state_dict = interchange.from_bitsandbytes(self, state_dict)
        if of_torch := torch_interchange.is_torch(state_dict):
            state_dict = torch_interchange.from_torch(self, state_dict)
        loaded = _matched_states(self, state_dict, any_float=of_torch)
        self._prepare()

        former, self._unified_memory = self._unified_memory, {}
        state: dict[Tensor, Any] = defaultdict(dict)
        for group in self.param_groups:
            for param in group["params"]:
                if param in loaded:
                    config = self._overrides.applied(group, self._overrides.number(param))
                    tensors = in_precision(param, loaded[param], config) if of_torch else loaded[param]
                    state[param] = copied(param, tensors, self._allocator(param, config), move_to_device)
        groups = [_merged_group(*pair) for pair in zip(self.param_groups, state_dict["param_groups"], strict=True)]
        self.__setstate__({"state": state, "param_groups": groups})
        self._unmoved = not move_to_device
        del former  # after its tensors: so their memory is free at once
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def to_gpu(self) -> None:
        """Moves states that `load_state_dict(..., move_to_device=False)` has left elsewhere to their parameters."""
        for param, state in self.state.items():
            device = local(param).device
            state.update({key: x.to(device) for key, x in state.items() if local(x).device != device})
        self._unmoved = False

    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict()` as torch.optim's class of the same name has it, for its `load_state_dict`, in float32.

        The tensors are copies. What `GlobalOptimManager` overrides is no part of it.

        Raises:
            ValueError: there is no such class, or it lacks an option that is in use.
        """
        return torch_interchange.to_torch(self)

    def problem_with(self, param: Tensor, state: Mapping[str, object], any_float: bool = False) -> str | None:
        """Why `load_state_dict` would refuse a parameter's state for its names, shapes or dtypes, or None."""
        return check_state(param, state, self._state_names(), self._optional_states(), any_float=any_float)

    @classmethod
    def _state_names(cls) -> tuple[str, ...]:
        """Of all states that a parameter may have."""
        return tuple(dict.fromkeys(name for rule in cls._rules for name in rule.state_names))

    @classmethod
    def _optional_states(cls) -> tuple[str, ...]:
        """Those that a parameter has only if its options ask for them."""
        return tuple(name for name in cls._state_names() if any(name not in rule.state_names for rule in cls._rules))

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_paged_directory", "fused_scaling")}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # not of load_state_dict
            self._overrides, self._paged_memory, self._unified_memory, self._held = Overrides(), None, {}, None
            self._unmoved = True  # a copy of one whose states are; where none are, it costs a look at each
            GlobalOptimManager.get_instance().watch(self)
            for group in self.param_groups:  # deepcopy and pickle put states into ordinary memory
                for param in group["params"]:
                    if group["is_paged"] and param in self.state:
                        self.state[param] = copied(param, self.state[param], self._allocator(param, group))
        self._watch = Watch()
        self._watch.look(self.state)


def _matched_params(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[int, Tensor]:
    """The parameter for each id of a state dict.

    Raises:
        ValueError: the groups do not fit the optimizer's.
    """
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(f"not an optimizer state dict: {sorted(missing)} missing")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the state dict has {len(saved_groups)} param groups, this optimizer {len(groups)}")
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"param group {i} of the state dict has {len(saved['params'])} parameters, this optimizer's "
                f"{len(group['params'])}"
            )
        version = saved.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"param group {i} of the state dict has format_version {version}; this bnbops reads "
                f"version {FORMAT_VERSION}"
            )
        if keys := (optimizer.defaults.keys() & group.keys()) - {*_OWN, *_DEFAULTS} - saved.keys():
            raise ValueError(f"param group {i} of the state dict lacks {sorted(keys)}; is it of another optimizer?")
        if keys := set(KNOWN_OPTIONS) & saved.keys() - group.keys():
            raise ValueError(
                f"param group {i} of the state dict has {sorted(keys)}, which {type(optimizer).__name__} has not; "
                "is it of another optimizer?"
            )
    ids = chain.from_iterable(saved["params"] for saved in saved_groups)
    params = chain.from_iterable(group["params"] for group in groups)
    return dict(zip(ids, params, strict=True))


def _matched_states(
    optimizer: CheckpointedOptimizer, state_dict: dict[str, Any], any_float: bool
) -> dict[Tensor, dict[str, Tensor]]:
    """The states of a state dict by the optimizer's parameters, sharded as they are.

    Raises:
        ValueError: groups or states do not fit the optimizer.
    """
    by_id = _matched_params(optimizer, state_dict)
    states = {key: state for key, state in state_dict["state"].items() if state}
    if unknown := states.keys() - by_id.keys():
        raise ValueError(f"the state dict has states for parameters that no group holds: {sorted(unknown)}")
    for key, state in states.items():
        if problem := optimizer.problem_with(by_id[key], state, any_float) or check_cast(by_id[key], state):
            raise ValueError(f"state of parameter {key} (shape {list(by_id[key].shape)}): {problem}")
    matched = {by_id[key]: state for key, state in states.items()}
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        if problem := _cast_problem(group, saved, matched):
            raise ValueError(f"param group {i} of the state dict {problem}")
    return {param: placed_state(param, state) for param, state in matched.items()}


def _cast_problem(group: dict[str, Any], saved: dict[str, Any], states: dict[Tensor, dict[str, Tensor]]) -> str | None:
    """Whether torch.distributed.checkpoint has read states of one precision into those of the other, or None.

    It reads into the live states, casting without a word; the options then tell that the states had another precision.
    """
    bits = saved["optim_bits"]
    if bits == group["optim_bits"]:
        return None
    decided = [
        any(key.endswith(_ABSMAX) for key in states[param])
        for param in group["params"]
        if param in states and wants_8bit(param, {**_DEFAULTS, **saved, "optim_bits": 8})
    ]
    if not decided or (bits == 8) in decided:
        return None
    return (
        f"has optim_bits={bits}, but {group['optim_bits']}-bit states: if torch.distributed.checkpoint loaded it, "
        "it has cast them. Load it into an optimizer with the optim_bits it was saved with (load_checkpoint and "
        "SafeLoadPlanner of bnbops.distributed refuse before anything is cast)"
    )


def _merged_group(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved param group with the live parameters, and what schedulers and others have put into the live group.

    A tensor lr keeps its identity: compiled steps hold it.
    """
    own = {key: group[key] for key in ("params", *_OWN)}
    merged = {**group, **_DEFAULTS, **saved, **own}
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(saved["lr"])
        merged["lr"] = group["lr"]
    elif isinstance(saved["lr"], Tensor):
        with lasting():
            merged["lr"] = saved["lr"].clone()
    return merged
