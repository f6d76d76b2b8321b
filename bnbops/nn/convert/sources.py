"""Named tensors of a mapping or of files, one at a time, so that they need not be in memory together."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbops.nn.weights.memory import empty

_SAFETENSORS_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}


class Source(NamedTuple):
    """A tensor to be had by `read(transient)`, with `transient` as in `empty`. Nobody else holds it if `fresh`."""

    shape: tuple[int, ...]
    read: Callable[[bool], Tensor]
    fresh: bool


def open_state(state: Mapping[str, Tensor] | str | os.PathLike[str]) -> dict[str, Source]:
    """The tensors of a state dict, by name.

    Args:
        state: name to tensor; or the path of a safetensors file, of the JSON index of a sharded one, or of a file by
            `torch.save`, which is mapped into memory.

    Raises:
        FileNotFoundError: no such file, or one that the index names.
        ValueError: a file that is none of those, is damaged, or holds something else than tensors by name.
        TypeError: neither a path nor a mapping of tensors.
    """
    if isinstance(state, Mapping):
        return _of_mapping(state, "state")
    if not isinstance(state, str | os.PathLike):
        raise TypeError(f"state must be a mapping from name to tensor, or a path, got {type(state).__name__}")
    path = Path(state)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass its safetensors file, or the .safetensors.index.json of several")
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if path.suffix == ".json":
        return _of_index(path)
    return _of_mapping(_load(path), str(path))


def _of_mapping(state: Mapping[str, Any], what: str) -> dict[str, Source]:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{what} must hold tensors, but {name!r} is a {type(value).__name__}; if the state dict is an item of "
                "it, load the file, with mmap=True, and pass that item"
            )
    return {name: Source(tuple(each.shape), lambda _, each=each: each.detach(), False) for name, each in state.items()}


def _load(path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises many kinds for a file that it does not know
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    return state


def _of_index(path: Path) -> dict[str, Source]:
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        files = {file: _of_safetensors(path.parent / file) for file in dict.fromkeys(places.values())}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the index of a sharded safetensors file: {error!r}") from error
    if missing := [name for name, file in places.items() if name not in files[file]]:
        raise ValueError(f"{path} says that {missing[0]} is in {places[missing[0]]}, which does not have it")
    return {name: files[file][name] for name, file in places.items()}


def _of_safetensors(path: Path) -> dict[str, Source]:
    """By the file's header: 8 bytes, the length of a JSON text with dtypes, shapes and offsets; then that; the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 0 < length <= size - 8 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {name: _safetensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a safetensors file, or its header is damaged: {error!r}") from error


def _safetensor(path: Path, name: str, entry: dict[str, Any], start: int, size: int) -> Source:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: {name} is of dtype {entry['dtype']}, which is not supported")
    dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize or not 0 <= begin <= end <= size - start:
        raise ValueError(f"{path} is damaged or cut short: {name} is said to be in bytes {begin} to {end} of its data")

    def read(transient: bool) -> Tensor:
        # Not mapped: what is read through a map counts as this process' memory until the system wants it back.
        tensor = empty(shape, dtype, transient)
        if tensor.nbytes:
            with path.open("rb") as file:
                file.seek(start + begin)
                count = file.readinto((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            if count != tensor.nbytes:
                raise OSError(f"{path} became shorter while {name} was read")
        return tensor

    return Source(shape, read, fresh=True)
