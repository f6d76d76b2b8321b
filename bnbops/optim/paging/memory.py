"""Where an optimizer's states are made."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from bnbops.optim.paging.paged import PagedMemory
from bnbops.optim.paging.unified import UnifiedMemory

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # of zeros


class StateMemory:
    """Memory that can be paged out: files for states on the CPU, unified memory for those on a CUDA device.

    A copy (`copy.deepcopy`, pickle) is an empty one for the same directory.

    Args:
        directory: for the files; the system's temporary directory if None.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.directory = directory
        self._files: PagedMemory | None = None
        self._unified: dict[torch.device, UnifiedMemory] = {}

    def __reduce__(self) -> tuple[type[StateMemory], tuple[str | os.PathLike[str] | None]]:
        return type(self), (self.directory,)

    def allocator(self, device: torch.device) -> Allocate:
        """What makes the states of parameters on a device.

        Raises:
            ValueError: nothing is paged there, or the device has no unified memory.
            OSError: no file can be made in the directory.
        """
        if device.type == "cpu":
            if self._files is None:
                self._files = PagedMemory(self.directory)
            return self._files.zeros
        if device.type != "cuda":
            wanted = "parameters on the CPU or a CUDA device"
            raise ValueError(f"is_paged=True needs {wanted}, got one on {device}; use is_paged=False")
        if device not in self._unified:
            self._unified[device] = UnifiedMemory(device)
        return self._unified[device].zeros

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child whose parent has states in files."""
        if self._files is not None:
            self._files.check_process()

    def emptied(self) -> StateMemory:
        """The same files, and none of the unified memory: it is freed with the tensors in it, once this is gone."""
        memory = StateMemory(self.directory)
        memory._files = self._files
        return memory
