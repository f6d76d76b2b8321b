"""Run by test_cusim.py in processes with a sanitizer: a kernel under torch, right and with bugs."""

import os

import pytest
import torch

from cases.backends import SANITIZER
from cuda_on_cpu import library


@pytest.fixture(scope="module")
def shift():
    torch.ops.load_library(library.build(os.environ[SANITIZER], "libcusim_selftest_torch.so"))
    return torch.ops.cusim_selftest.shift


def check(shift, *bugs) -> None:
    x = torch.arange(1000.0)
    assert torch.equal(shift(x, *bugs), x.where(x % 64 == 0, x - 1))


def test_right(shift):
    check(shift, 0, False)
    with pytest.raises(RuntimeError, match="contiguous"):
        shift(torch.ones(4, 4).t(), 0, False)
    with pytest.raises(RuntimeError, match="launch failed"):
        shift(torch.ones(0), 0, False)


def test_beyond_the_end(shift):
    check(shift, 1, False)


def test_race(shift):
    """The result is right, as threads take turns from the first to the last."""
    check(shift, 0, True)
