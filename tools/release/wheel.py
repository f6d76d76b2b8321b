"""The wheel: one for every Python 3 and every torch that pyproject.toml allows."""

from __future__ import annotations

import platform
import re
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from elftools.elf.elffile import ELFFile

from release import Fault, build_environment, run

# As old a system as torch's own wheels run on.
PLATFORM = f"manylinux_2_28_{platform.machine()}"
NEEDED = r"libtorch\.so|libtorch_cpu\.so|libstdc\+\+\.so\.6|libm\.so\.6|libgcc_s\.so\.1|libc\.so\.6|ld-linux.*"
LIBRARIES = ("bnbops/lib/libbnbops_cpu.so", "bnbops/lib/libbnbops_cuda.so")


def build(source: Path, out: Path) -> Path:
    """Builds a folder or an sdist from scratch, and writes a wheel of `PLATFORM` into the folder `out`. The variables
    SKBUILD_CMAKE_DEFINE and CUDAARCHS say what is built (docs/cuda.md).

    Raises:
        Fault: it does not build, or needs a newer system than `PLATFORM`.
    """
    with TemporaryDirectory() as folder:
        options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
        run(sys.executable, "-m", "pip", "wheel", *options, source, env=build_environment())
        (built,) = Path(folder).glob("*.whl")
        return name_platform(built, out)


def name_platform(wheel: Path, out: Path) -> Path:
    """`wheel`, which is for this system, as one of `PLATFORM` in the folder `out`: the same but for its tag. auditwheel
    looks at each symbol that it needs of the system. Nothing is put into it: torch brings libtorch.

    Raises:
        Fault: it needs a newer system; says which versions of what.
    """
    options = ["--plat", PLATFORM, "--only-plat", "--exclude", "libtorch*.so", "--wheel-dir", out]
    try:
        run(sys.executable, "-m", "auditwheel", "repair", *options, wheel, env=build_environment())
    except Fault as fault:
        needs = run(sys.executable, "-m", "auditwheel", "show", wheel)
        raise Fault(f"the wheel is not one for {PLATFORM}: {fault}\n{needs.strip()}") from None
    (path,) = out.glob(f"{wheel.name.rsplit('-', 1)[0]}-{PLATFORM}.whl")
    return path


def check_name(path: Path, version: str) -> None:
    """It is of this version, and its tag says any Python 3 on `PLATFORM`, inside, too."""
    expected = f"bnbops-{version}-py3-none-{PLATFORM}.whl"
    if path.name != expected:
        raise Fault(f"the wheel is {path.name}, it should be {expected}")
    tags = re.findall(r"^Tag: (.+)$", _metadata(path, "WHEEL"), re.MULTILINE)
    if tags != [f"py3-none-{PLATFORM}"]:
        raise Fault(f"{path.name}: its WHEEL file has the tags {tags}")


def check_contents(path: Path, sources: set[str]) -> bool:
    """It has what is in `bnbops/` and `meta_kernels/` among the names `sources`, the CPU's library, and besides at most
    CUDA's. Returns whether it has that."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}
    expected = {name for name in sources if name.startswith("bnbops/")}
    expected |= {f"bnbops/{name}" for name in sources if name.startswith("meta_kernels/")}
    expected |= {"bnbops.pth", LIBRARIES[0]}
    if missing := sorted(expected - names):
        raise Fault(f"{path.name} lacks {', '.join(missing[:5])}")
    if extra := sorted(names - expected - {LIBRARIES[1]}):
        raise Fault(f"{path.name} has what does not belong there: {', '.join(extra[:5])}")
    return LIBRARIES[1] in names


def check_libraries(path: Path) -> None:
    """Its libraries need torch and the system alone, wherever these are, and name no file of the build."""
    with zipfile.ZipFile(path) as archive, TemporaryDirectory() as folder:
        for name in {*LIBRARIES} & {*archive.namelist()}:
            check_library(Path(archive.extract(name, folder)))


def check_library(path: Path) -> None:
    """One of `check_libraries`."""
    with path.open("rb") as file:
        tags = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
    wrong = [tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED" and not re.fullmatch(NEEDED, tag.needed)]
    if wrong:
        raise Fault(f"{path.name} needs {', '.join(wrong)}, which neither torch nor the system brings")
    if any(tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH") for tag in tags):
        raise Fault(f"{path.name} has a search path for libraries (RPATH), which is one of this machine")
    if files := re.findall(rb"(?<=\0)/[ -~]+\.(?:cpp|cuh?|hp*|py|so)(?=\0)", path.read_bytes()):
        raise Fault(f"{path.name} names files of this machine: {', '.join(name.decode() for name in files[:3])}")


def _metadata(path: Path, name: str) -> str:
    with zipfile.ZipFile(path) as archive:
        (file,) = [entry for entry in archive.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{name}", entry)]
        return archive.read(file).decode()
