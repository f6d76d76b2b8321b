"""Compiles the kernel files as the build does, for one architecture each, and keeps what the compiler says.

The commands are CMake's own for the library: only the architectures differ, and the code for the host, a third of the
work, is left out. What is compiled once stays in build/,
under a name made of the contents of all that it depends on; other processes wait for it.
"""

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "cuda_static"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))


@cache
def nvdisasm() -> str | None:
    """The disassembler: of the CUDA toolkit, or of the package nvidia-cuda-nvdisasm."""
    try:
        for file in files("nvidia-cuda-nvdisasm") or []:
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return str(file.locate())
    except PackageNotFoundError:
        pass
    return shutil.which("nvdisasm")


MISSING = ", ".join(name for name, tool in (("nvcc", NVCC), ("nvdisasm", nvdisasm())) if tool is None)


@dataclass(frozen=True)
class Compiled:
    source: Path
    arch: str
    files: Path  # the folder of the output

    @property
    def ptx(self) -> str:
        return (self.files / "kernels.ptx").read_text()

    @property
    def log(self) -> str:
        """What the compiler said, with the resources of every kernel."""
        return (self.files / "log").read_text()

    @property
    def sass(self) -> str:
        """The instructions, with their source lines."""
        return gzip.decompress((self.files / "kernels.sass.gz").read_bytes()).decode()


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What it printed; an error if it failed."""
    scripts = Path(sys.executable).parent  # cmake and ninja may be installed beside Python
    env = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


@cache
def commands() -> dict[Path, list[str]]:
    """CMake's command for every kernel file, less the architectures and the output."""
    options = ["-DBNBOPS_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    folder = FOLDER / "cmake"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(FOLDER / "cmake.lock"):
        run("cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", *options)
        run("cmake", "--build", folder, "--target", "codebooks")
    found = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            words = shlex.split(entry["command"])
            del words[words.index("-c") :]
            device = [word for word in words if not word.startswith("--generate-code")]
            found[Path(entry["file"])] = [*device, "-cubin"]
    return found


def key(source: Path, command: list[str]) -> str:
    """Of the file and all project headers in it, the command and the compiler."""
    folders = [Path(word.removeprefix("-I")) for word in command if word.startswith("-I")]
    contents = {}

    def visit(file: Path) -> None:
        if file not in contents:
            contents[file] = text = file.read_text()
            for name in re.findall(r'^#include "(.*)"', text, re.MULTILINE):
                for folder in folders:
                    if (folder / name).exists():
                        visit(folder / name)

    visit(source)
    parts = [run(NVCC, "--version"), nvdisasm(), *command, *contents.values()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compile_for(arch: str, source: Path, command: list[str], options: tuple[str, ...] = ("-lineinfo",)) -> Compiled:
    """`options` beside the build's own: by default source lines, which do not change the code."""
    command = [*command, f"-arch={arch}", *options]
    name = f"{source.stem}-{arch}{''.join(options)}"
    output = FOLDER / f"{name}.{key(source, command)}"
    with FileLock(FOLDER / f"{name}.lock"):
        if not output.exists():
            for old in FOLDER.glob(f"{name}.*/"):
                shutil.rmtree(old)
            _compile(source, command, output)
    return Compiled(source, arch, output)


def _compile(source: Path, command: list[str], output: Path) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        keep, cubin = ["-keep", "-keep-dir", folder], folder / "kernels.cubin"
        log = run(*command, *keep, "-Xptxas=-v", source, "-o", cubin, cwd=folder)
        sass = run(nvdisasm(), "-c", "-gi", cubin)
        result = folder / "result"
        result.mkdir()
        (result / "log").write_text(log)
        (result / "kernels.ptx").write_bytes((folder / f"{source.stem}.ptx").read_bytes())
        (result / "kernels.sass.gz").write_bytes(gzip.compress(sass.encode(), 1))
        result.rename(output)


@cache
def compile_all() -> list[Compiled]:
    """Every kernel file for every architecture."""
    jobs = [(arch, source, command) for source, command in commands().items() for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: compile_for(*job), jobs))
