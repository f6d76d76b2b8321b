"""Makes the bundle:

    PYTHONPATH=tests python -m gpu_bundle.make --wheel WHEEL --out build/gpu-bundle

The wheel of bnbops, the simulator for dry runs, tests with their golden files, benchmarks, and wheels of what the tests
need that a machine with torch and numpy lacks: for this machine's kind of processor and any Python from 3.10 on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch

from bnbops.cuda_build import CudaBuild, of_library
from cuda_on_cpu import library
from gpu_bundle.record import as_json

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60 * 2**20  # bytes
# What pytest needs comes by name: pip would take what it needs on this Python, not on the oldest one.
WHEELS = (
    *("pytest", "iniconfig", "packaging", "pluggy", "pygments", "exceptiongroup", "tomli"),
    *("expecttest", "safetensors"),
)
CUDA_LIBRARY = "bnbops/lib/libbnbops_cuda.so"


class Refused(Exception):
    """There can be no bundle; says why."""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Refused(f"{' '.join(map(str, command))} failed:\n{done.stdout.strip()}")
    return done.stdout


def download(folder: Path, *names: str) -> None:
    oldest = ["--python-version", "3.10", "--implementation", "cp", "--abi", "cp310", "--abi", "abi3", "--abi", "none"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run(*pip, "--only-binary=:all:", *oldest, "--dest", folder, *names)


def build_of(wheel: Path) -> CudaBuild:
    """What the wheel's CUDA library says of itself."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        if CUDA_LIBRARY not in archive.namelist():
            raise Refused(f"{wheel.name} has no CUDA kernels: build it with -C cmake.define.BNBOPS_CUDA=ON")
        build = of_library(Path(archive.extract(CUDA_LIBRARY, folder)))
    if build is None:
        raise Refused(f"{wheel.name}: its CUDA library does not say what built it, and for which GPUs; build it again")
    return build


def sanitizer(folder: Path, version: str) -> str | None:
    """compute-sanitizer, which a machine with torch alone has not, for drivers of the toolkit's major version; None if
    it is not to be had: wheels before that of CUDA 13.4 lack the program's helpers and run nothing."""
    major = int(version.partition(".")[0])
    if major < 13:
        print(f"without compute-sanitizer: there is no wheel of it for CUDA {major}", file=sys.stderr)
        return None
    try:
        download(folder, f"nvidia-cuda-sanitizer-api>={max(13.4, major)},<{major + 1}")
    except Refused as error:
        print(f"without compute-sanitizer: {error}", file=sys.stderr)
        return None
    (wheel,) = folder.glob("nvidia_cuda_sanitizer_api-*.whl")
    return wheel.name.split("-")[1]


def commit() -> str:
    try:
        changed = " with changes" if run("git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no") else ""
        return run("git", "-C", ROOT, "rev-parse", "--short=12", "HEAD").strip() + changed
    except (Refused, OSError):
        return "unknown"


def make(wheel: Path, out: Path) -> None:
    build = build_of(wheel)
    shutil.rmtree(out, ignore_errors=True)
    (out / "wheels").mkdir(parents=True)
    shutil.copy2(wheel, out / "wheels")
    no_caches = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, out / name, ignore=no_caches)
    for name in ("pyproject.toml", "LICENSE"):  # pytest's configuration
        shutil.copy2(ROOT / name, out)
    shutil.copy2(ROOT / "tests" / "gpu_bundle" / "run.sh", out)
    shutil.copy2(library.build(), out / "simulator.so")
    download(out / "wheels", *WHEELS)
    described = {
        "bnbops": wheel.name.split("-")[1],
        "commit": commit(),
        "architectures": list(build.architectures),
        "CUDA toolkit": build.toolkit,
        "compute-sanitizer": sanitizer(out / "wheels", build.toolkit),
        "built with torch": torch.__version__,
    }
    (out / "bundle.json").write_text(as_json(described))


def pack(out: Path) -> tuple[int, Path]:
    """The bundle's size in bytes, and the archive made of it.

    Raises:
        Refused: it is too large.
    """
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > LIMIT:
        raise Refused(f"{out} has {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}")
    archive = out.with_name(out.name + ".tar.gz")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        path = Path(folder) / archive.name
        with tarfile.open(path, "w:gz") as tar:
            tar.add(out, out.name, filter=of_nobody)
        path.replace(archive)
    return size, archive


def of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names of who made it."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_bundle.make", description="Makes the bundle for a machine with a GPU.")
    parser.add_argument("--wheel", type=Path, required=True, help="of bnbops, with CUDA kernels")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder, which is made anew")
    args = parser.parse_args()
    try:
        make(args.wheel, args.out)
        size, archive = pack(args.out)
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out}: {size / 2**20:.1f} MiB; {archive}: {archive.stat().st_size / 2**20:.1f} MiB")
    print(json.dumps(json.loads((args.out / "bundle.json").read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
