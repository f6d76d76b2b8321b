"""The files of a checkpoint: a folder that takes the place of the former one when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from bnbops.distributed.ranks import rank, share

_CHECKSUMS = "checksums.json"
_CHUNK = 2**24


def beside(path: Path) -> tuple[Path, Path]:
    """Where a checkpoint is while it is not complete, and where the former one goes for a moment."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")


def make_room(path: Path, partial: Path) -> None:
    if rank() != 0:
        return
    if path.exists() and not (path / ".metadata").exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"'{path}' is no checkpoint and would be replaced by one; save to another path, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)


def put_in_place(path: Path, partial: Path, former: Path, checksums: dict[str, int]) -> None:
    if rank() != 0:
        return
    with open(partial / _CHECKSUMS, "w") as file:
        json.dump(checksums, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():  # else `former` may be the only checkpoint, if a process was killed just here
        shutil.rmtree(former, ignore_errors=True)
        path.rename(former)
    partial.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def verify(path: Path) -> None:
    """Reads this rank's share of the files, as torch does not notice changed bytes. `dcp.save` left no checksums."""
    if not (sums := path / _CHECKSUMS).exists():
        return
    expected = json.loads(sums.read_text())
    for name in share(expected):
        if not (path / name).exists():
            raise RuntimeError(f"the checkpoint '{path}' lacks its file '{name}'; load another one")
        if checksum(path / name) != expected[name]:
            raise RuntimeError(f"the checkpoint '{path}' is damaged: '{name}' is not as it was saved; load another one")


def read_metadata(path: Path) -> Metadata:
    """DCP's table of contents: a pickle, so it must come from someone who is trusted."""
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except FileNotFoundError as error:
        raise RuntimeError(
            f"'{path}' is no checkpoint, or an incomplete one: it has no file '.metadata', which is written last"
        ) from error
    except Exception as error:
        raise RuntimeError(f"the checkpoint '{path}' is damaged: '.metadata' cannot be read ({error})") from error
