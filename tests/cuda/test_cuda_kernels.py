"""Every kernel that ships runs, each instance of a template one of its own, and gives what plain torch does.

The calls are those of `python -m bnbops`, which so runs every kernel on a GPU, too. Instances are told apart by their
addresses. tests/cuda/test_cuda_static.py makes sure that nvcc makes the same ones.
"""

import os
import subprocess

import pytest
import torch

from bnbops.functional import dequantize_4bit, quantize_nf4
from bnbops.testing import self_check
from cases import backends
from cuda_on_cpu import library
from cuda_on_cpu.kernels import Kernels


@pytest.fixture
def kernels() -> Kernels:
    """Those of the simulated library, none of which has run as far as they know."""
    backends.simulated()
    found = Kernels(library.build(os.environ.get(backends.SANITIZER)))
    found.take_launched()
    return found


def test_the_self_check_runs_every_kernel(kernels):
    with backends.use("cuda_on_cpu"):
        assert [problem for _, _, problems in self_check.run() for problem in problems] == []
    launched = kernels.take_launched()
    unreached = [name for address, name in kernels.names.items() if address not in launched]
    assert unreached == [], "add samples to bnbops/testing/samples.py that reach them"
    assert launched == kernels.names.keys(), "a kernel whose name does not end in _kernel"


def test_just_what_ran_is_known(kernels):
    """This page's own test."""
    with backends.use("cuda_on_cpu"):
        packed, state = quantize_nf4(torch.ones(64))
        assert {kernels.names[address] for address in kernels.take_launched()} == {
            "quantize_4bit_kernel<8, (Nibbles)1>"
        }
        dequantize_4bit(packed, state)
    assert {kernels.names[address] for address in kernels.take_launched()} == {"look_up_kernel<(Nibbles)1>"}
    assert kernels.take_launched() == set()


def test_no_warp_reads_what_was_never_written():
    """Records that are copied by words have no byte, padding included, that the kernel before left as it was."""
    done = subprocess.run([library.build(product="cuda_records")], text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
