"""sdist, wheel and install, as a user gets them: built from scratch and imported without the source tree."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bnbops

for name in ("auditwheel", "pathspec"):
    pytest.importorskip(name, reason=f"{name} comes with `pip install bnbops[release]`")

import release.install  # noqa: E402
import release.sdist  # noqa: E402
import release.wheel  # noqa: E402

ROOT = Path(__file__).parents[2]
LIBRARY = "bnbops/lib/libbnbops_cpu.so"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None, check: bool = True) -> str:
    """Output and errors of a command."""
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def import_bnbops(python: Path, cwd: Path, *path: Path) -> str:
    """What happens on `import bnbops`."""
    script = "import bnbops; print('imported', bnbops.__file__)"
    return run(python, "-c", script, cwd=cwd, env={"PYTHONPATH": ":".join(map(str, path))}, check=False)


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that was built from it, for the CPU alone (make test-cuda-link builds one
    with CUDA kernels). Without optimization, which takes most of the time: the library that all other tests run with
    has it."""
    if not (ROOT / ".git").exists():
        pytest.skip("archives are built and compared in the repository, this is an sdist")
    folder = tmp_path_factory.mktemp("build-of-bnbops")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SKBUILD_CMAKE_DEFINE", "BNBOPS_CUDA=OFF;CMAKE_CXX_FLAGS_RELEASE=-O0")
        release.wheel.build(release.sdist.build(folder), folder)
    return folder


@pytest.fixture(scope="module")
def wheel(build) -> Path:
    (path,) = build.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def new_python(tmp_path_factory) -> Callable[[str], Path]:
    """Makes virtual environments that have torch and what it needs, but no bnbops, editable or not: a .pth line adds
    a folder to the path, without its own .pth files, behind the environment's."""

    def create(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        return folder / "bin" / "python"

    return create


@pytest.fixture(scope="module")
def installed(wheel, new_python) -> tuple[Path, Path]:
    """The Python of an environment that the wheel is installed in, and its site-packages."""
    python = new_python("installed")
    pip(python, "install", "--no-index", "--no-deps", wheel)
    return python, site_packages_of(python)


def pip(python: Path, *arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=python.parent)


def site_packages_of(python: Path) -> Path:
    (folder,) = python.parents[1].glob("lib/python*/site-packages")
    return folder


def test_sdist_has_what_is_committed(build):
    """But for what pyproject.toml leaves out, which keeps it small. The sources of the CUDA library are in it, too."""
    (path,) = build.glob("*.tar.gz")
    belongs = release.sdist.belongs()
    assert belongs >= {"pyproject.toml", "README.md", "LICENSE", "csrc/cuda/optimizer.cu", "tests/golden/README.md"}
    assert not [name for name in belongs if name.startswith((".ci", "tests/golden/opt_"))]
    release.sdist.check(path, belongs)


def test_sdist_is_the_same_again(build, tmp_path):
    (path,) = build.glob("*.tar.gz")
    assert release.sdist.build(tmp_path).read_bytes() == path.read_bytes()


def test_wheel_is_for_any_python_3_on_older_systems(wheel):
    release.wheel.check_name(wheel, bnbops.__version__)


def test_wheel_has_everything_and_nothing_else(wheel):
    assert release.wheel.check_contents(wheel, release.sdist.belongs()) is False  # without CUDA kernels
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = f"bnbops-{bnbops.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"bnbops", "bnbops.pth", metadata}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_library_needs_torch_and_the_system_alone(wheel):
    """And holds no path of the build: pip unpacks an sdist into a folder of its own."""
    release.wheel.check_libraries(wheel)


def test_optimized_library_does_so_too(tmp_path):
    """It calls other functions of the system than the one of the wheel here. The wheel's own was looked at when it got
    its name."""
    tag = f"py3-none-linux_{platform.machine()}"
    path = tmp_path / f"bnbops-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(bnbops.library_path(), LIBRARY)
        archive.writestr("bnbops-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr("bnbops-1.0.dist-info/RECORD", f"{LIBRARY},,\n")
    assert release.wheel.name_platform(path, tmp_path).exists()
    release.wheel.check_libraries(path)


def test_library_holds_no_path_of_torch(wheel):
    """Of its headers, that is."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(LIBRARY)
    assert not [path for path in (ROOT, Path(torch.__file__).parent) if str(path).encode() in content]


def test_imports_where_it_was_installed(installed, tmp_path):
    python, site_packages = installed
    assert f"imported {site_packages / 'bnbops' / '__init__.py'}" in import_bnbops(python, tmp_path)


def test_self_check_passes_where_it_was_installed(installed, tmp_path):
    said = release.install.check_installed(installed[0], tmp_path)
    assert said.startswith(f"bnbops {bnbops.__version__}, torch {torch.__version__}")


def test_self_check_where_it_was_not_installed(new_python, tmp_path):
    with pytest.raises(release.Fault, match="No module named bnbops"):
        release.install.check_installed(new_python("empty"), tmp_path)


AS_BITSANDBYTES = {"BNBOPS_INSTALL_AS_BITSANDBYTES": "1"}


def test_environment_variable_gives_processes_a_bitsandbytes(installed, tmp_path):
    """Such as one that gets an optimizer's class by its name there."""
    unpickle = "import pickle; print(pickle.loads(b'cbitsandbytes.optim.adamw\\nAdamW8bit\\n.'))"
    said = run(installed[0], "-c", unpickle, cwd=tmp_path, env=AS_BITSANDBYTES)
    assert said == "<class 'bitsandbytes.optim.adamw.AdamW8bit'>\n"
    assert "all operators are right" in run(installed[0], "-m", "bitsandbytes", cwd=tmp_path, env=AS_BITSANDBYTES)
    assert "No module named 'bitsandbytes'" in run(installed[0], "-c", unpickle, cwd=tmp_path, env={}, check=False)


def test_start_of_python_loads_nothing(installed, tmp_path):
    """Of bnbops, that is, but for the finder where the variable is set."""
    script = "import sys; print(*sorted({'bnbops.alias.finder', 'bnbops', 'torch'} & {*sys.modules}))"
    assert run(installed[0], "-c", script, cwd=tmp_path, env={}) == "\n"
    assert run(installed[0], "-c", script, cwd=tmp_path, env=AS_BITSANDBYTES) == "bnbops.alias.finder\n"


def test_pip_removes_all_that_it_installed(wheel, new_python):
    python = new_python("removed")
    before = {*site_packages_of(python).iterdir()}
    pip(python, "install", "--no-index", "--no-deps", wheel)
    assert site_packages_of(python) / "bnbops.pth" in {*site_packages_of(python).iterdir()} - before
    pip(python, "uninstall", "--yes", "bnbops")
    assert {*site_packages_of(python).iterdir()} == before


# ---- with or without CUDA kernels ------------------------------------------------------------------------------

NO_NVCC = {"CUDACXX": "/nowhere/nvcc"}


def configure(folder: Path, **environment: str) -> str:
    """What CMake says; `folder` then tells what would be built and installed."""
    define = [f"-DPython_EXECUTABLE={sys.executable}"]
    define += [f"-D{name}={environment.pop(name)}" for name in sorted(environment) if name.startswith("BNBOPS_")]
    command = ["cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *define]
    return run(*command, cwd=ROOT, env=with_scripts() | environment, check=False)


def with_scripts() -> dict[str, str]:
    """The environment, with cmake and ninja that may be installed beside Python."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def would_install(folder: Path) -> set[str]:
    scripts = "".join(path.read_text() for path in folder.rglob("cmake_install.cmake"))
    return set(re.findall(r'bnbops/lib" TYPE SHARED_LIBRARY FILES "[^"]*/(\S+)"', scripts))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc (the CUDA toolkit) is not installed")
def test_nvcc_brings_cuda_kernels(tmp_path):
    """And the library will tell for which GPUs, and by which nvcc."""
    said = configure(tmp_path, CUDAARCHS="90-real;100")
    assert would_install(tmp_path) == {"libbnbops_cpu.so", "libbnbops_cuda.so"}, said
    architectures = set(re.findall(r"arch=[^ \"]+", (tmp_path / "build.ninja").read_text()))
    assert architectures == {"arch=compute_90,code=[sm_90]", "arch=compute_100,code=[compute_100,sm_100]"}
    library = tmp_path / "CMakeFiles" / "bnbops_cuda.so"
    (command,) = (
        line for line in (tmp_path / "build.ninja").read_text().splitlines() if "BNBOPS_CUDA_TOOLKIT=" in line
    )
    defines = command.partition("DEFINES = ")[2].replace('\\"', '"')
    library.write_text(defines)
    assert re.search(r'BNBOPS_CUDA_TOOLKIT="1\d\.\d+', defines) and 'BNBOPS_CUDA_ARCHITECTURES="90-real,100"' in defines


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ("75 80 86 87 89 90 100 103 110 120 121", "80-real;86-real;89-real;90-real;100-real;120-real;120-virtual"),
        ("50 75 80 86 87 89 90", "80-real;86-real;89-real;90-real;90-virtual"),  # CUDA 12.0
    ],
)
def test_default_architectures_are_those_that_nvcc_knows(known, chosen, tmp_path):
    nvcc, script = tmp_path / "nvcc", tmp_path / "script.cmake"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && printf "sm_%s\\n" {known}\n')
    nvcc.chmod(0o755)
    script.write_text(f'include({ROOT}/csrc/cuda/architectures.cmake)\nmessage("${{CMAKE_CUDA_ARCHITECTURES}}")\n')
    said = run("cmake", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-P", script, cwd=tmp_path, env=with_scripts())
    assert said.strip() == chosen


def test_without_nvcc_there_are_no_cuda_kernels(tmp_path):
    said = configure(tmp_path, **NO_NVCC)
    assert "No nvcc: bnbops without CUDA kernels" in said
    assert would_install(tmp_path) == {"libbnbops_cpu.so"}


def test_nvcc_may_be_demanded(tmp_path):
    said = " ".join(configure(tmp_path, BNBOPS_CUDA="ON", **NO_NVCC).split())
    assert "BNBOPS_CUDA is ON, but there is no nvcc that works: install the CUDA toolkit" in said
    assert not (tmp_path / "build.ninja").exists()


def test_nvcc_may_be_left_alone(tmp_path):
    said = configure(tmp_path, BNBOPS_CUDA="OFF")
    assert "CUDA" not in said
    assert would_install(tmp_path) == {"libbnbops_cpu.so"}
