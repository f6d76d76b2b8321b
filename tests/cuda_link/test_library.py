"""The CUDA library as it is installed: it loads under a torch with CUDA, without a GPU, and has a kernel for every
operator."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnbops
from bnbops._library import device_operators

LIBRARY = Path(bnbops.library_path()).with_name("libbnbops_cuda.so")


def output_of(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_this_is_the_installed_package():
    assert bnbops.has_cuda and torch.version.cuda is not None
    assert Path(bnbops.__file__).parents[1] == LIBRARY.parents[2]


@pytest.mark.parametrize("name", device_operators())
def test_every_operator_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bnbops::{name}", "CUDA")


def test_library_needs_torch_and_the_system_alone(tmp_path):
    """The CUDA runtime is inside: torch may bring another one."""
    dynamic = output_of("readelf", "--dynamic", "--wide", LIBRARY, cwd=tmp_path)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    allowed = r"libtorch\.so|libtorch_cpu\.so|libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux.*"
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_library_asks_torch_for_its_stable_interface_alone(tmp_path):
    """All that is undefined is the system's or versioned, but for C functions of libtorch's stable ABI."""
    undefined = output_of("nm", "--dynamic", "--undefined-only", LIBRARY, cwd=tmp_path).splitlines()
    names = [line.split()[-1] for line in undefined]
    unversioned = [name for name in names if "@" not in name]
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert [name for name in unversioned if not re.match("aoti_torch_|torch_", name) and name not in weak] == []
    assert "aoti_torch_get_current_cuda_stream" in names


def test_nothing_but_registration_is_exported(tmp_path):
    """No symbol that could meet another library's, but those of unified memory."""
    defined = output_of("nm", "--dynamic", "--defined-only", "--demangle", LIBRARY, cwd=tmp_path).splitlines()
    names = [line.split(maxsplit=2)[-1] for line in defined]
    exported = [name for name in names if "bnbops" in name or name.startswith("cuda")]
    assert sorted(exported) == ["bnbops_managed_alloc", "bnbops_managed_free", "bnbops_managed_support"]


def test_self_check_passes_on_the_cpu(tmp_path):
    said = output_of(sys.executable, "-m", "bnbops", cwd=tmp_path)
    assert said.startswith(f"bnbops {bnbops.__version__}, torch {torch.__version__}")
    assert "CUDA library: loaded" in said and "all operators are right" in said
