"""Optimizer states in CUDA's unified memory, whose pages the driver moves to the host when the GPU's runs short."""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from functools import cache

import torch
from torch import Tensor

from bnbops import _library

_ALLOC, _FREE, _SUPPORT = "bnbops_managed_alloc", "bnbops_managed_free", "bnbops_managed_support"
_UNSUPPORTED, _UNPAGED = 0, 1  # what bnbops_managed_support says
_one_allocator = threading.Lock()


class UnifiedMemory:
    """Tensors of a CUDA device in unified memory (`cudaMallocManaged`), as those of bitsandbytes' paged optimizers.

    They are CUDA tensors like any other. Where the GPU's memory runs short, for these or for other tensors, the driver
    moves pages to the host's, and back when a kernel touches them.

    torch's caching allocator gives out the memory, from a pool of its own. What is freed serves later tensors of this
    UnifiedMemory; when it is gone itself, the driver gets free memory back: at once, or, where tensors outlive it, as
    other free memory of torch by `torch.cuda.empty_cache()` or when torch needs it.

    A copy (`copy.deepcopy`, `clone`, pickle) of a tensor is ordinary memory of its device.

    Args:
        device: a CUDA device, with its index.

    Raises:
        NotImplementedError: bnbops has no CUDA kernels; says why.
        ValueError: the device has no unified memory.

    Warns:
        UserWarning: the device's memory is not paged (Windows, WSL), so that nothing is gained.
    """

    def __init__(self, device: torch.device) -> None:
        path = str(_library.cuda_library())
        support = getattr(ctypes.CDLL(path), _SUPPORT)(device.index)
        if support == _UNSUPPORTED:
            raise ValueError(f"is_paged=True needs unified memory, which {device} does not have; use is_paged=False")
        if support == _UNPAGED:
            warnings.warn(
                f"paged optimizer states on {device} stay in the GPU's memory, since this system does not page it "
                "(Windows and WSL do not)",
                stacklevel=2,
            )
        self.device = device
        with _one_allocator, torch.cuda.device(device):
            self._pool = torch.cuda.MemPool(_allocator(path).allocator())

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros on the device.

        Raises:
            torch.OutOfMemoryError: the GPU and the host together have not enough memory. Nothing has changed then.
            RuntimeError: a CUDA graph is being captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "paged optimizer states cannot be made while a CUDA graph is captured; call optimizer.init_state() "
                "before"
            )
        try:
            with torch.cuda.use_mem_pool(self._pool, self.device):
                return torch.zeros(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:  # torch's words are about the GPU's memory alone
            nbytes = math.prod(shape) * dtype.itemsize
            raise torch.OutOfMemoryError(
                f"no room for a paged optimizer state of {nbytes:,} bytes in the unified memory of {self.device}, "
                "which is the GPU's and the host's; free some of either, or use 8-bit states"
            ) from error


@cache
def _allocator(path: str) -> torch.cuda.memory.CUDAPluggableAllocator:
    """The library's functions for torch: one for the process, as pools outlive what uses them. Call it with
    the lock: the cache lets two threads make two, and keeps one."""
    return torch.cuda.memory.CUDAPluggableAllocator(path, _ALLOC, _FREE)
