"""Compiles .cu files for the CPU, against cusim/ instead of the CUDA toolkit."""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"
COMPILER = os.environ.get("CXX", "g++")

# No contraction: fused operations are explicit. No strict aliasing: CUDA code reads floats as vectors of integers.
# Hidden symbols: two libraries in a process are two devices.
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-DCUSIM"),
]

SANITIZERS = {
    None: [],
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def compile_for_cpu(
    name: str,
    sources: Sequence[Path],
    sanitizer: str | None = None,
    include: Sequence[Path] = (HERE,),
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> Path:
    """`name` made from `sources`: a program, or a library if `flags` say -shared.

    Lies in a folder named for what went into it, so nothing is compiled twice; `include` holds the headers that count.
    """
    command = [COMPILER, *FLAGS, *SANITIZERS[sanitizer], *flags, *(f"-I{folder}" for folder in include)]
    headers = [path for folder in include for path in folder.rglob("*.h")]
    digest = hashlib.sha256(repr((command, libraries)).encode())
    for path in sorted({*sources, *headers}):
        digest.update(str(path).encode() + path.read_bytes())
    folder = BUILD / f"{sanitizer or 'plain'}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / name
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist share one build
        if not output.exists():
            compile_all(command, sources, libraries, output)
    return output


def compile_all(command: Sequence[str], sources: Sequence[Path], libraries: Sequence[str], output: Path) -> None:
    """Compiles one by one, so that the compiler's message is about one file, and links."""
    objects = [output.parent / f"{path.stem}.o" for path in sources]
    for source, compiled in zip(sources, objects, strict=True):
        run([*command, "-c", "-x", "c++", source, "-o", compiled])
    unfinished = output.with_suffix(".unfinished")
    run([*command, *objects, *libraries, "-o", unfinished])
    unfinished.rename(output)


def run(command: Sequence[str | Path]) -> None:
    """Runs a compiler; says what it said if it fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
