"""Where tensors are, and programs in processes of their own, for the tests of paged states."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def mapped(directory: Path) -> list[str]:
    """Ranges of addresses that files of a directory are mapped to."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[0] for line in lines if f" {directory}/" in line]


def is_paged(tensor: Tensor, directory: Path) -> bool:
    """Whether a tensor's bytes are in a file of a directory."""
    ends = [[int(end, 16) for end in span.split("-")] for span in mapped(directory)]
    return any(start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end for start, end in ends)


def run(code: str, *arguments: object, status: int = 0) -> str:
    """What a Python program prints in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == status, result.stderr
    return result.stdout


def in_a_fork(call: Callable[[], object]) -> str:
    """What `call` returns or raises in a forked child, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(call())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


class RecordedMemory:
    """Stands in for UnifiedMemory on fake CUDA tensors, which have no memory: it remembers what it gave out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.given: list[Tensor] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.given.append(torch.zeros(shape, dtype=dtype, device=self.device))
        return self.given[-1]

    def gave(self, tensor: Tensor) -> bool:
        return any(tensor is x for x in self.given)
