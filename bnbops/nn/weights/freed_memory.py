"""Memory of float weights that are gone: malloc keeps it, while a model is quantized one weight after the other."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

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
