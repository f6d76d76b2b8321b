"""Loading state dicts: what fits an optimizer, and what becomes of its states and options."""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbops.facts import DEFAULT_CODEC
from bnbops.lasting import lasting
from bnbops.optim.checkpoints import interchange, torch_interchange
from bnbops.optim.checkpoints.loading import check_cast, copied, in_precision, placed_state, problem_with
from bnbops.optim.core.codec import codec_of
from bnbops.optim.core.manager import KNOWN_OPTIONS
from bnbops.optim.core.options import as_codecs
from bnbops.optim.core.state import names_of, wanted_codecs

if TYPE_CHECKING:
    from bnbops.optim.core.stateful import StatefulOptimizer

FORMAT_VERSION = 1
# Group options that are of this process, not of the training run: the live ones stay.
_OWN = ("is_paged",)
# Those that version 1 had not from the start, and what it did.
_DEFAULTS = {"percentile_clipping": 100, "min_8bit_vector_size": sys.maxsize, "state_codec": DEFAULT_CODEC}


def load(optimizer: StatefulOptimizer, state_dict: dict[str, Any], move_to_device: bool) -> None:
    """`StatefulOptimizer.load_state_dict`."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    _check_groups(optimizer, state_dict)
    if interchange.is_bitsandbytes(state_dict):
        state_dict = interchange.from_bitsandbytes(optimizer, state_dict)
    if of_torch := torch_interchange.is_torch(state_dict):
        state_dict = torch_interchange.from_torch(optimizer, state_dict)
    loaded = _matched_states(optimizer, state_dict, any_float=of_torch)
    optimizer._prepare()

    former, optimizer._memory = optimizer._memory, optimizer._memory.emptied()
    state: dict[Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param in loaded:
                config = optimizer._overrides.applied(group, optimizer._overrides.number(param))
                tensors = in_precision(param, loaded[param], config) if of_torch else loaded[param]
                state[param] = copied(param, tensors, optimizer._allocator(param, config), move_to_device)
    groups = [_merged_group(*pair) for pair in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)]
    optimizer.__setstate__({"state": state, "param_groups": groups})
    optimizer._unmoved = not move_to_device
    del former  # after its tensors: so their memory is free at once
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _check_groups(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Raises ValueError if something is no state dict, or of other numbers of parameters."""
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(f"not an optimizer state dict: {sorted(missing)} missing")
    both = state_dict["param_groups"], optimizer.param_groups
    found, expected = ([len(group["params"]) for group in groups] for groups in both)
    if found != expected:
        raise ValueError(f"the state dict has param groups of {found} parameters, this optimizer of {expected}")


def _matched_params(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[int, Tensor]:
    """The parameter for each id of a state dict.

    Raises:
        ValueError: the groups' options do not fit the optimizer's.
    """
    groups, saved_groups, name = optimizer.param_groups, state_dict["param_groups"], type(optimizer).__name__
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        here, version = f"param group {i} of the state dict", saved.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{here} has format_version {version}; this bnbops reads version {FORMAT_VERSION}")
        if keys := (optimizer.defaults.keys() & group.keys()) - {*_OWN, *_DEFAULTS} - saved.keys():
            raise ValueError(f"{here} lacks {sorted(keys)}; is it of another optimizer?")
        if keys := set(KNOWN_OPTIONS) & saved.keys() - group.keys():
            raise ValueError(f"{here} has {sorted(keys)}, which {name} has not; is it of another optimizer?")
    ids = chain.from_iterable(saved["params"] for saved in saved_groups)
    params = chain.from_iterable(group["params"] for group in groups)
    return dict(zip(ids, params, strict=True))


def _matched_states(
    optimizer: StatefulOptimizer, state_dict: dict[str, Any], any_float: bool
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
        if problem := problem_with(optimizer, by_id[key], state, any_float) or check_cast(by_id[key], state):
            raise ValueError(f"state of parameter {key} (shape {list(by_id[key].shape)}): {problem}")
    matched = {by_id[key]: state for key, state in states.items()}
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"], strict=True)):
        if problem := _cast_problem(group, saved, matched):
            raise ValueError(f"param group {i} of the state dict {problem}")
    return {param: placed_state(param, state) for param, state in matched.items()}


def _cast_problem(group: dict[str, Any], saved: dict[str, Any], states: dict[Tensor, dict[str, Tensor]]) -> str | None:
    """Whether torch.distributed.checkpoint has read codes of one codec into states of another, or None.

    It reads into the live states, casting without a word; the options then tell that the states were other ones.
    """
    saved = {**_DEFAULTS, **saved}
    differing = [key for key in ("optim_bits", "state_codec") if saved[key] != group[key]]
    if not differing:
        return None
    fits = []
    for param in group["params"]:
        state = states.get(param, {})
        there, here = (wanted_codecs(param, options, names_of(state)) for options in (saved, group))
        fits += [codec_of(state, name) == codec for name, codec in there.items() if codec != here[name]]
    if not fits or any(fits):
        return None
    has, but = (", ".join(f"{key}={options[key]}" for key in differing) for options in (saved, group))
    return (
        f"has {has}, but states as {but} makes them: if torch.distributed.checkpoint loaded it, it has cast them. Load "
        f"it into an optimizer with the {' and '.join(differing)} it was saved with (load_checkpoint and "
        "SafeLoadPlanner of bnbops.distributed refuse before anything is cast)"
    )


def _merged_group(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A saved param group with the live parameters, and what schedulers and others have put into the live group.

    A tensor lr keeps its identity: compiled steps hold it.
    """
    own = {key: group[key] for key in ("params", *_OWN)}
    merged = {**group, **_DEFAULTS, **saved, **own}
    merged["state_codec"] = as_codecs(merged["state_codec"])
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(saved["lr"])
        merged["lr"] = group["lr"]
    elif isinstance(saved["lr"], Tensor):
        with lasting():
            merged["lr"] = saved["lr"].clone()
    return merged
