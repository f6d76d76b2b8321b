"""What `import bnbops` says where something is missing, too old or of another kind: one sentence that tells what to do.

Each import is in a process whose path has the package's Python files, without a library, and what the test puts beside
them.
"""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnbops
from bnbops import versions

ROOT = Path(__file__).parents[2]
SITE_PACKAGES = Path(torch.__file__).parents[1]
TOML = (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def folder(tmp_path) -> Path:
    """The sources, and what pip writes beside them."""
    ignore = shutil.ignore_patterns("__pycache__", "lib", "meta_kernels")
    shutil.copytree(ROOT / "bnbops", tmp_path / "bnbops", ignore=ignore)
    shutil.copytree(ROOT / "meta_kernels", tmp_path / "bnbops" / "meta_kernels", ignore=ignore)
    info = tmp_path / "bnbops-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(importlib.metadata.distribution("bnbops").read_text("METADATA"))
    return tmp_path


def import_error(folder: Path, *path: Path, before: str = "") -> str:
    """Of `import bnbops`; `before` runs first. No site-packages but what `path` names: an editable bnbops would win."""
    script = f"import sys\nsys.path[:0] = {[str(folder), *map(str, path)]}\n{before}\nimport bnbops"
    done = subprocess.run([sys.executable, "-S", "-c", script], text=True, capture_output=True, cwd=folder)
    assert done.returncode == 1
    *_, kind_and_message = done.stderr.strip().splitlines()
    kind, _, message = kind_and_message.partition(": ")
    assert kind == "ImportError", done.stderr
    return message


def put_library(folder: Path, content: bytes | Path) -> None:
    library = folder / "bnbops" / "lib" / "libbnbops_cpu.so"
    library.parent.mkdir()
    library.write_bytes(content) if isinstance(content, bytes) else shutil.copy(content, library)


def put_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")


def test_versions_are_those_of_the_project_file():
    assert f'dependencies = ["torch>={versions.OLDEST_TORCH}"]' in TOML
    assert f'requires-python = ">={versions.OLDEST_PYTHON}"' in TOML
    assert f'version = "{bnbops.__version__}"' in TOML


def test_sources_that_are_not_installed(folder):
    shutil.rmtree(folder / "bnbops-0.1.0.dist-info")
    said = import_error(folder)
    assert said.startswith("bnbops is not installed, only its sources are here: run `pip install .`")


def test_no_torch(folder):
    wanted = "bnbops needs torch 2.10 or later, which is not installed: pip install 'torch>=2.10'"
    assert import_error(folder) == wanted


def test_a_torch_that_lacks_something_itself_says_so(folder):
    put_torch(folder, "2.13.0")
    (folder / "torch" / "__init__.py").write_text("import sympy_that_is_not_there")
    script = f"import sys\nsys.path.insert(0, {str(folder)!r})\nimport bnbops"
    done = subprocess.run([sys.executable, "-S", "-c", script], text=True, capture_output=True)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'sympy_that_is_not_there'\n")


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.1", "2.9.0.dev20250901"])
def test_an_old_torch(folder, version):
    put_torch(folder, version)
    wanted = f"bnbops needs torch 2.10 or later, this is torch {version}: pip install 'torch>=2.10'"
    assert import_error(folder) == wanted


def test_an_old_python(folder):
    before = "import platform; platform.python_version = lambda: '3.9.18'"
    assert import_error(folder, before=before) == "bnbops needs Python 3.10 or later, this is Python 3.9.18"


def test_no_library(folder):
    said = import_error(folder, SITE_PACKAGES)
    assert said.startswith("bnbops is not built: libbnbops_cpu is missing. Install it with `pip install .`")
    assert said.endswith(f"Looked in: {folder}/bnbops/lib")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_another_system(folder, system):
    before = f"import torch; sys.platform = {system!r}"
    wanted = f"bnbops runs on Linux, this is {system}: on Windows, use WSL; elsewhere, a container"
    assert import_error(folder, SITE_PACKAGES, before=before) == wanted


def test_another_systems_build(tmp_path):
    """Here, it goes on to compile; FreeBSD's compiler would, too."""
    command = ["cmake", "-S", ROOT / "csrc", "-B", tmp_path, "-DCMAKE_SYSTEM_NAME=FreeBSD", "-DBNBOPS_CUDA=OFF"]
    done = subprocess.run([*command, f"-DPython_EXECUTABLE={sys.executable}"], text=True, capture_output=True)
    assert done.returncode != 0
    assert "bnbops builds on Linux, this is FreeBSD" in " ".join(done.stderr.split())


@pytest.mark.parametrize("content", [b"not a library", b"\x7fELF" + bytes(4096)], ids=["text", "damaged"])
def test_a_library_that_is_none(folder, content):
    put_library(folder, content)
    said = import_error(folder, SITE_PACKAGES)
    advice = (
        "it is damaged, or for another kind of machine: build it on this machine, by `pip install .` in its sources"
    )
    assert said.startswith(f"libbnbops_cpu.so does not load under torch {torch.__version__}: {advice} (")


NEWER = {
    "libstdc++": ("libstdc++.so.6", "GLIBCXX_9.9.9", "GLIBCXX_9.9.9"),
    "glibc": ("libm.so.6", "GLIBC_9.99", "GLIBC_9.99"),
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("name", NEWER)
def test_a_library_from_a_newer_system(folder, tmp_path, name):
    """Linked against a system's library of which this machine has an older one."""
    soname, version, said_version = NEWER[name]
    (tmp_path / "version.map").write_text(f"{version} {{ newer; }};\n")
    (tmp_path / "newer.c").write_text("int newer(void) { return 1; }\n")
    (tmp_path / "user.c").write_text("int newer(void); int user(void) { return newer(); }\n")
    stub, library = tmp_path / soname, tmp_path / "libuser.so"
    link = ["cc", "-shared", "-fPIC", "-nostdlib"]
    for command in (
        [*link, "-Wl,--version-script=version.map", f"-Wl,-soname={soname}", "-o", stub, "newer.c"],
        [*link, "-o", library, "user.c", stub],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    put_library(folder, library)
    stub.unlink()
    said = import_error(folder, SITE_PACKAGES)
    advice = f"this system's {name} is older than the one it was built with, so build it on this machine"
    assert advice in said and said_version in said
