"""Checkpoints of training on several ranks: torch.distributed.checkpoint (DCP), all or nothing.

`dcp.save` writes over the checkpoint that is there, and `dcp.load` reads into the tensors that train. A process killed
while saving then leaves no checkpoint; a file that cannot be read to its end, half a checkpoint in a model; and 8-bit
codes are cast to floats without a word where an optimizer has 32-bit states. The functions here save beside the former
checkpoint and load into tensors of their own. The files are DCP's, so `dcp.load` reads them, too.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import tensor as dtensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
)

from bnbops.distributed.checkpoint_files import beside, checksum, make_room, put_in_place, read_metadata, verify
from bnbops.distributed.ranks import gathered, share, together
from bnbops.dtensors import is_dtensor
from bnbops.lasting import usual_settings
from bnbops.optim import Optimizer
from bnbops.optim.checkpoints.loading import keeps_blocks, problem_with
from bnbops.optim.core.state import PER_PARAMETER

_STATE = ("optimizer", "state")  # where states are in what is saved
_SHOWN = 5  # names in a message


@usual_settings()
def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str | os.PathLike[str],
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Saves model and optimizer. To be called on every rank, or without a process group.

    The former checkpoint at `path` is replaced when the new one is complete: whenever a process is killed,
    `load_checkpoint` finds one of the two.

    Args:
        model: sharded or not.
        optimizer: of `bnbops.optim`, or one whose states have their parameter's shape or none.
        path: a directory that all ranks see.
        extra: further values, such as a scheduler's state dict, the same on every rank: tensors and plain Python
            values, which `torch.load(weights_only=True)` reads.

    Raises:
        ValueError: there is something else than a checkpoint at `path`.
        RuntimeError: a rank could not write. The former checkpoint is as it was.
    """
    path = Path(path)
    partial, former = beside(path)
    together(lambda: make_room(path, partial))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "extra": _packed(dict(extra or {}))}
    try:
        dcp.save(state, checkpoint_id=partial)
    except CheckpointException as error:
        raise RuntimeError(f"the checkpoint could not be written to '{partial}': {_first(error)}") from error
    parts = gathered(together(lambda: {name: checksum(partial / name) for name in share(os.listdir(partial))}))
    checksums = {name: checksum for part in parts for name, checksum in part.items()}
    together(lambda: put_in_place(path, partial, former, checksums))


@usual_settings()
def load_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads what `save_checkpoint` saved, whatever the number of ranks and the sharding were. On every rank, as saving.

    Everything is read into new tensors and verified first: there has to be room for a second copy of this rank's part.

    Args:
        model: with the names, shapes and dtypes of the saved one, on its device.
        optimizer: of the saved one's class, with parameters in the same param groups. Its options are loaded, too.
        path: the directory.

    Returns:
        The `extra` of `save_checkpoint`.

    Raises:
        ValueError: the checkpoint does not fit. Nothing has changed then, on any rank.
        RuntimeError: it is damaged, or a rank cannot read it. Nothing has changed then, on any rank.
    """
    path = Path(path)
    path = path if path.exists() or not (former := beside(path)[1]).exists() else former
    metadata = together(lambda: read_metadata(path))
    together(lambda: verify(path))
    names = _param_names(model, optimizer)
    state = together(lambda: _targets(model, optimizer, names, metadata))
    try:
        dcp.load(state, checkpoint_id=path, planner=SafeLoadPlanner())
    except CheckpointException as error:
        raise RuntimeError(f"the checkpoint '{path}' cannot be read: {_first(error)}. Nothing was loaded") from error
    with _restored(optimizer):
        together(lambda: _set_optimizer(optimizer, names, state["optimizer"]))
    set_model_state_dict(model, state["model"])
    return torch.load(io.BytesIO(bytes(state["extra"].tolist())), weights_only=True) if "extra" in state else {}


class SafeLoadPlanner(DefaultLoadPlanner):
    """For `dcp.load(..., planner=SafeLoadPlanner())`: casts no tensor, and reads values with `weights_only=True`.

    torch's own planner copies a saved tensor into one of another dtype, 8-bit codes into a 32-bit state for one. Here
    every rank raises before anything is read. (That it reads into the tensors it is given is torch's design: damaged
    files leave them half loaded.)
    """

    def create_local_plan(self) -> LoadPlan:
        saved = self.metadata.state_dict_metadata
        for key, tensor in self.state_dict.items():
            if isinstance(tensor, Tensor) and isinstance(entry := saved.get(key), TensorStorageMetadata):
                _check_dtype(key, entry.properties.dtype, tensor.dtype)
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        set_element(
            self.original_state_dict, self.mappings[read_item.dest_index.fqn], torch.load(value, weights_only=True)
        )


def _check_dtype(key: str, saved: torch.dtype, live: torch.dtype) -> None:
    if saved != live:
        raise ValueError(
            f"'{key}' was saved as {saved} and would be cast to {live}; make model and optimizer as they were when "
            "saved (dtype, optim_bits, state_codec, sharding that keeps 8-bit states)"
        )


# ---- what is loaded --------------------------------------------------------------------------------------------------


def _packed(values: dict[str, Any]) -> Tensor:
    """Bytes that DCP leaves as they are: it turns keys of dictionaries into strings, and drops empty ones."""
    file = io.BytesIO()
    torch.save(values, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8).clone()


def _param_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters' names in state dicts, by param group.

    torch tells them for an optimizer's state dict, for which it would step one without state: it gets another one.
    """
    stand_in = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups])
    stand_in.state[stand_in.param_groups[0]["params"][0]]["known"] = True
    try:
        return [group["params"] for group in get_optimizer_state_dict(model, stand_in)["param_groups"]]
    except KeyError as error:
        raise ValueError("the optimizer has parameters that are not the model's") from error


def _targets(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: list[list[str]], metadata: Metadata
) -> dict[str, Any]:
    """New tensors for all that a checkpoint has, sharded as the model is, in the structure that was saved.

    Raises:
        ValueError: it is of another model or optimizer.
    """
    if {path[0] for path in metadata.planner_data.values()} - {"extra"} != {"model", "optimizer"}:
        raise ValueError("the checkpoint has other parts than 'model', 'optimizer' and 'extra'; load it with dcp.load")
    params = dict(zip(chain(*names), chain(*(group["params"] for group in optimizer.param_groups)), strict=True))
    live = get_model_state_dict(model)
    entries = {metadata.planner_data[key]: _meta(entry) for key, entry in metadata.state_dict_metadata.items()}
    _check_names("the model", {path[1] for path in entries if path[0] == "model"}, live.keys())
    targets: dict[str, Any] = {}
    states: dict[str, dict[str, Tensor | None]] = defaultdict(dict)
    for path, meta in entries.items():
        if path[:2] == _STATE:
            states[path[2]][path[3]] = meta
        else:
            target = live[path[1]] if path[0] == "model" else meta
            set_element(targets, path, _new(path[-1], meta, target) if isinstance(target, Tensor) else None)
    _check_names("the optimizer", states.keys(), params.keys(), all_needed=False)
    for name, state in states.items():
        if isinstance(optimizer, Optimizer) and (problem := problem_with(optimizer, params[name], state)):
            raise ValueError(f"the saved state of '{name}' (shape {list(params[name].shape)}) does not fit: {problem}")
        whole = not keeps_blocks(params[name], state)  # to be decoded
        for key, meta in state.items():
            set_element(targets, (*_STATE, name, key), _new_state(params[name], key, meta, whole))
    return targets


def _meta(entry: object) -> Tensor | None:
    """A saved tensor's shape and dtype; None for another value."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")


def _new(name: str, saved: Tensor | None, live: Tensor) -> Tensor:
    """A tensor like the live one, where what was saved fits it; like what was saved if that is all there is."""
    if saved is not None and ".quant_state." in name:  # a layer's description of itself, longer or shorter
        live = saved
    if saved is None or saved.shape != live.shape:
        found = "no tensor" if saved is None else f"saved with shape {list(saved.shape)}"
        raise ValueError(f"'{name}' was {found}, the model's is {list(live.shape)}")
    _check_dtype(name, saved.dtype, live.dtype)
    return torch.empty_like(live, device="cpu" if live.is_meta else None)


def _new_state(param: Tensor, key: str, saved: Tensor | None, whole: bool) -> Tensor | None:
    """A tensor for a parameter's state, whole or sharded as it is."""
    if saved is None or whole or not is_dtensor(param) or key in PER_PARAMETER:
        return None if saved is None else torch.empty_like(saved, device="cpu")
    mesh, placements = param.device_mesh, param.placements
    return dtensor.empty(*saved.shape, dtype=saved.dtype, device_mesh=mesh, placements=placements)


def _check_names(whose: str, saved: Collection[str], live: Collection[str], all_needed: bool = True) -> None:
    missing, unknown = sorted(set(live) - set(saved)) if all_needed else [], sorted(set(saved) - set(live))
    if missing or unknown:
        raise ValueError(
            f"the checkpoint is not of {whose}: it lacks {missing[:_SHOWN]}, and has {unknown[:_SHOWN]}, which {whose} "
            "has not"
        )


@contextmanager
def _restored(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives an optimizer its states and options back if loading fails, here or on another rank (no room for them)."""
    kept = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    tensors = [
        (group["lr"], group["lr"].clone()) for group in optimizer.param_groups if isinstance(group["lr"], Tensor)
    ]
    try:
        yield
    except BaseException:
        optimizer.__setstate__(kept)
        for lr, value in tensors:
            lr.copy_(value)
        raise


def _set_optimizer(optimizer: torch.optim.Optimizer, names: list[list[str]], state_dict: dict[str, Any]) -> None:
    """Raises ValueError, and changes nothing then, if the options or the param groups do not fit."""
    groups = state_dict["param_groups"]
    if (saved := [group["params"] for group in groups]) != names:
        raise ValueError(f"the checkpoint has param groups of {saved}, this optimizer of {names}; make them alike")
    for i, (group, saved_group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        bits, saved_bits = group.get("optim_bits"), saved_group.get("optim_bits")
        if bits != saved_bits:
            raise ValueError(
                f"param group {i} of the checkpoint has optim_bits={saved_bits}, this optimizer's {bits}: make it with "
                "the optim_bits it was saved with"
            )
    optimizer.load_state_dict({"state": state_dict.get("state", {}), "param_groups": groups})


def _first(error: CheckpointException) -> str:
    """One line of what DCP gathers from the ranks."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"
