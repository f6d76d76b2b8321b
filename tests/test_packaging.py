"""sdist, wheel and install, as a user gets them: built from scratch and imported without the source tree."""

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

ROOT = Path(__file__).parents[1]
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
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("build-of-bnbops")
    run(
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        folder,
        ROOT,
        cwd=folder,
    )
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "--quiet"]
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder)
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
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=wheel.parent)
    (site_packages,) = python.parents[1].glob("lib/python*/site-packages")
    return python, site_packages


def test_wheel_is_for_any_python_3(wheel):
    assert re.fullmatch(rf"bnbops-{re.escape(bnbops.__version__)}-py3-none-\w+\.whl", wheel.name)


def test_wheel_has_everything_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {name.split("/")[0] for name in names} == {"bnbops", f"bnbops-{bnbops.__version__}.dist-info"}
    sources = {f"bnbops/{path.relative_to(ROOT / 'bnbops')}" for path in (ROOT / "bnbops").rglob("*.py")}
    sources |= {f"bnbops/meta_kernels/{path.name}" for path in (ROOT / "meta_kernels").glob("*.py")}
    assert {name for name in names if name.startswith("bnbops/")} == {*sources, LIBRARY}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) reads what a library needs")
def test_library_needs_torch_and_the_system_alone(installed):
    _, site_packages = installed
    dynamic = run("readelf", "--dynamic", "--wide", site_packages / LIBRARY, cwd=site_packages)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    allowed = r"libtorch\.so|libtorch_cpu\.so|libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux.*"
    assert "libtorch_cpu.so" in needed
    assert all(re.fullmatch(allowed, name) for name in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_library_holds_no_path_of_the_build(installed, build):
    """Neither of the build's folders (pip unpacks an sdist into one of its own) nor of torch's headers."""
    content = (installed[1] / LIBRARY).read_bytes()
    assert re.findall(rb"(?<=\0)/[\w.+-]+/[ -~]*(?=\0)", content) == []
    here = [ROOT, build, Path(torch.__file__).parent]
    assert not [path for path in here if str(path).encode() in content]


def test_imports_where_it_was_installed(installed, tmp_path):
    python, site_packages = installed
    assert f"imported {site_packages / 'bnbops' / '__init__.py'}" in import_bnbops(python, tmp_path)


def test_self_check_passes_where_it_was_installed(installed, tmp_path):
    output = run(installed[0], "-m", "bnbops", cwd=tmp_path, env={})
    assert output.startswith(f"bnbops {bnbops.__version__}, torch {torch.__version__}")
    assert "all operators are right" in output


# ---- what a broken installation says ---------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> Path:
    """The package's Python files, without a library."""
    ignore = shutil.ignore_patterns("__pycache__", "lib")
    shutil.copytree(ROOT / "bnbops", tmp_path / "bnbops", ignore=ignore)
    shutil.copytree(ROOT / "meta_kernels", tmp_path / "bnbops" / "meta_kernels", ignore=ignore)
    return tmp_path


def test_import_without_a_library_says_what_to_do(sources, new_python):
    output = import_bnbops(new_python("bare"), sources, sources)
    assert "ImportError: bnbops is not built: libbnbops_cpu is missing." in output
    assert "pip install ." in output and str(sources / "bnbops" / "lib") in output


def test_import_of_a_library_that_does_not_load_says_why(sources, new_python):
    (sources / LIBRARY).parent.mkdir()
    (sources / LIBRARY).write_bytes(b"not a library")
    output = import_bnbops(new_python("bare"), sources, sources)
    assert f"does not load under torch {torch.__version__} (bnbops needs torch >= 2.13)" in output
