"""csrc/rules.h and csrc/codecs.h under nvcc: they compile for GPUs, and every operation in them is the CPU's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "nvcc" / "rules_and_codecs.cu"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc (the CUDA toolkit) is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the generated header."""
    path = tmp_path_factory.mktemp("nvcc")
    header = subprocess.run(
        [sys.executable, ROOT / "bnbops" / "codebooks.py", "--header"], check=True, capture_output=True
    )
    (path / "codebooks.h").write_bytes(header.stdout)
    return path


def compile_for(arch: str, kind: str, folder: Path) -> tuple[Path, str]:
    """The output file, and what the compiler said. No contraction, as on the CPU."""
    output = folder / f"{arch}.{kind}"
    flags = ["-std=c++17", "-fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v,-warn-spills"]
    command = [NVCC, f"-arch={arch}", f"-{kind}", *flags, f"-I{folder}", f"-I{ROOT / 'csrc'}", "-o", output, SOURCE]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return output, done.stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles_without_warnings_or_spills(arch, folder):
    _, said = compile_for(arch, "cubin", folder)
    assert "warning" not in said.lower()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= 4 and set(spills) == {("0", "0")}  # the rules, two dynamic maps, any codebook
    assert set(re.findall(r"(\d+) bytes stack frame", said)) == {"0"}


def test_arithmetic_rounds_as_on_the_cpu(folder):
    """fused_multiply_add is one instruction; division and square root are correctly rounded; denormals are kept."""
    path, _ = compile_for("sm_80", "ptx", folder)
    (adam,) = re.findall(r"\.entry \S*update\S*Adam.*?\n\}", path.read_text(), re.DOTALL)
    operations = re.findall(r"\s((?:fma|mul|add|sub|div|sqrt|rcp)\.[\w.]*f32)\s", adam)
    assert {op: operations.count(op) for op in sorted(set(operations))} == {
        "div.rn.f32": 1,
        "fma.rn.f32": 4,
        "mul.rn.f32": 4,
        "sqrt.rn.f32": 1,
    }
