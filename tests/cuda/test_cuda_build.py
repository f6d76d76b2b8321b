"""What a library of CUDA kernels says of itself: which nvcc built it, and which GPUs it has code for."""

import shutil
import subprocess
from pathlib import Path

import pytest

from bnbops.cuda_build import CudaBuild, of_library

ROOT = Path(__file__).parents[2]
WHEEL = ("80-real", "86-real", "89-real", "90-real", "100-real", "120-real", "120-virtual")

CODE = [
    (WHEEL, (8, 0), True),
    (WHEEL, (8, 7), True),  # machine code of 8.6
    (WHEEL, (9, 0), True),
    (WHEEL, (10, 3), True),
    (WHEEL, (12, 1), True),
    (WHEEL, (13, 0), True),  # by PTX of 12.0
    (WHEEL, (7, 5), False),
    (WHEEL, (11, 0), False),  # older than the PTX, and none of the generations
    (("90-real",), (9, 0), True),
    (("90-real",), (10, 0), False),
    (("90-real",), (8, 9), False),
    (("86-real",), (8, 0), False),
    (("90-virtual",), (9, 0), True),
    (("90-virtual",), (12, 0), True),
    (("90-virtual",), (8, 9), False),
    (("90",), (10, 0), True),  # both kinds
    (("90a-real",), (9, 0), True),
    (("90a-real",), (9, 1), False),
    (("90a-virtual",), (10, 0), False),
    (("100f-real",), (10, 3), True),
    (("100f-virtual",), (12, 0), False),
]


@pytest.mark.parametrize(("architectures", "capability", "has_code"), CODE)
def test_gpus_with_code(architectures, capability, has_code):
    assert CudaBuild("13.0.88", architectures).has_code_for(capability) is has_code


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        (WHEEL, "8.0, 8.6, 8.9, 9.0, 10.0, 12.0, and later ones by PTX of 12.0"),
        (("90-real",), "9.0"),
        (("90a-real", "100"), "9.0a, 10.0, and later ones by PTX of 10.0"),
    ],
)
def test_architectures_for_people(architectures, said):
    assert CudaBuild("13.0.88", architectures).capabilities == said


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("options", [["-O0"], ["-O3", "-fvisibility=hidden", "-s"]], ids=" ".join)
def test_a_library_tells(tmp_path, options):
    library, source = tmp_path / "libbnbops_cuda.so", ROOT / "csrc" / "cuda" / "build.cpp"
    defines = ['-DBNBOPS_CUDA_TOOLKIT="13.0.88"', '-DBNBOPS_CUDA_ARCHITECTURES="90a-real,100"']
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-Wall", "-Werror", *options, *defines, "-o", library, source], check=True
    )
    assert of_library(library) == CudaBuild("13.0.88", ("90a-real", "100"))


def test_a_library_that_does_not(tmp_path):
    library = tmp_path / "libbnbops_cuda.so"
    library.write_bytes(b"\x7fELF" + bytes(100) + b"bnbops-cuda-build toolkit=13.0.88")
    assert of_library(library) is None
