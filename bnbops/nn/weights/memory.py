"""Memory of float weights that go: malloc would keep it, while a model is quantized one weight after the other."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**20  # bytes


def give_back(nbytes: int) -> None:
    """Lets the system have what weights of so many bytes have left on the CPU; not worth the time if that is little.

    glibc would keep it, as a hole that a tensor of the same size does not fit into once that is to be aligned; so in
    the end all float weights have had memory of their own.
    """
    if nbytes >= _LARGE and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], dtype: torch.dtype, transient: bool) -> Tensor:
    """An uninitialised tensor. A transient one returns its memory to the system when it is gone, past malloc."""
    size = math.prod(shape) * dtype.itemsize
    if not transient or size == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's default is
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


def as_float16(weight: Tensor) -> Tensor:
    """What int8 weights are quantized from; a copy of a weight on the CPU is a transient one."""
    if weight.is_cpu and weight.dtype != torch.float16:
        return empty(weight.shape, torch.float16, transient=True).copy_(weight)
    return weight.to(torch.float16)
