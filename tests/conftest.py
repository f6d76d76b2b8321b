"""Fixtures shared by the tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
_MARGIN = 67  # elements around a guarded tensor; odd, so that no vector boundary is met by chance


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests are single-threaded unless they say otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden() -> Callable[[str], dict]:
    """Loads a golden file by name."""

    def load(name: str) -> dict:
        path = GOLDEN / name
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)

    return load


@pytest.fixture
def guard() -> Iterator[Callable[[Tensor], Tensor]]:
    """Moves a tensor into the middle of a larger, misaligned buffer, whose other bytes no test may change."""
    margins: list[Tensor] = []

    def place(x: Tensor) -> Tensor:
        buffer = torch.empty(x.numel() + 2 * _MARGIN, dtype=x.dtype)
        buffer.view(torch.uint8).fill_(0xA5)
        margins.extend([buffer[:_MARGIN], buffer[_MARGIN + x.numel() :]])
        return buffer[_MARGIN : _MARGIN + x.numel()].view(x.shape).copy_(x)

    yield place
    for margin in margins:
        assert (margin.view(torch.uint8) == 0xA5).all(), "bytes beside a tensor were written"
