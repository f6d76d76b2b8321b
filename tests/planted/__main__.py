"""Plants each fault of faults.py into a copy of the repository, and tells whether the tests notice:

    PYTHONPATH=tests python -m planted [--only WORD ...]

The copy, its build and a log of every run stay in build/planted. The exit status is not 0 if a fault went unnoticed, or
could not be planted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from planted.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "build" / "planted"
TREE, ENVIRONMENT = SCRATCH / "tree", SCRATCH / "venv"
PYTHON = ENVIRONMENT / "bin" / "python"
COMPILED, SIMULATED = "csrc", "csrc/cuda"  # the latter by the tests that simulate it
PASSED, FAILED = 0, 1  # exit status of pytest


class NotPlanted(Exception):
    """Says why."""


def copy_tree() -> None:
    """What git knows or would take, as it is now. Files that are as they were keep their times, and their objects."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for path in [path for path in TREE.rglob("*") if path.is_file()]:
        name = str(path.relative_to(TREE))
        if name not in names and not name.startswith("build/"):
            path.unlink()
    for name in names:
        source, target = ROOT / name, TREE / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def make_environment() -> None:
    """One that has all that this Python has, but for bnbops."""
    if not PYTHON.exists():
        venv.create(ENVIRONMENT)
    (folder,) = ENVIRONMENT.glob("lib/python*/site-packages")
    (folder / "all.pth").write_text(sysconfig.get_path("purelib") + "\n")


def build(log: Path) -> None:
    command = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", TREE]
    if run([*command, "-C", "cmake.define.BNBOPS_CUDA=OFF"], log) != 0:
        raise NotPlanted(f"it does not compile: {log}")


def run(command: list[object], log: Path) -> int:
    with log.open("a") as file:
        return subprocess.run(list(map(str, command)), cwd=TREE, stdout=file, stderr=subprocess.STDOUT).returncode


def is_compiled(fault: Fault) -> bool:
    return fault.file.startswith(COMPILED) and not fault.file.startswith(SIMULATED)


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    path = TREE / fault.file
    text = path.read_text() if path.exists() else ""
    if text.count(fault.old) != 1:
        holders = [str(p.relative_to(TREE)) for p in sources() if fault.old in p.read_text()]
        found = f"{text.count(fault.old)} times there; files that have it: {', '.join(holders) or 'none'}"
        raise NotPlanted(f"{fault.file} should have this once, bring tests/planted/faults.py up to date: {fault.old!r} "
                         f"({found})")  # fmt: skip
    try:
        path.write_text(text.replace(fault.old, fault.new))
        yield
    finally:
        path.write_text(text)


def sources() -> Iterator[Path]:
    for folder in ("csrc", "bnbops", "meta_kernels"):
        yield from (path for path in (TREE / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu"))


def pytest(tests: Iterable[str], log: Path) -> tuple[int, list[str]]:
    """Its exit status, and the test that failed, if any."""
    cache = SCRATCH / "pytest_cache"
    shutil.rmtree(cache, ignore_errors=True)
    status = run([PYTHON, "-m", "pytest", "-q", "-x", "-o", f"cache_dir={cache}", *tests], log)
    failed = cache / "v" / "cache" / "lastfailed"
    return status, list(json.loads(failed.read_text())) if failed.exists() else []


def noticing(fault: Fault, log: Path) -> list[str] | None:
    """The test that failed, none if the process died of the fault; None if all passed."""
    with planted(fault):
        if is_compiled(fault):
            build(log)
        status, failed = pytest([f"tests/{name}" for name in fault.tests], log)
    if status > FAILED:
        raise NotPlanted(f"pytest ended with status {status}: {log}")
    return None if status == PASSED else failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="planted", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="faults whose name or file has one of these words")
    words = parser.parse_args().only
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name + fault.file for word in words)]
    chosen.sort(key=is_compiled)  # what needs no build of the library first
    copy_tree()
    make_environment()
    logs = SCRATCH / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    build(logs / "build.txt")
    failures, noticed = 0, list[str]()
    for i, fault in enumerate(chosen):
        begin, log = time.monotonic(), logs / f"{i:02}.txt"
        try:
            tests = noticing(fault, log)
            said = "UNNOTICED" if tests is None else "noticed"
            noticed += tests or []
        except NotPlanted as error:
            said = f"NOT PLANTED: {error}"
        failures += said != "noticed"
        print(f"{said:10} {time.monotonic() - begin:5.0f} s  {fault.file}: {fault.name}", flush=True)
    build(logs / "build.txt")
    log = logs / "without faults.txt"
    if noticed and (failed := pytest(noticed, log)[1]):
        print(f"these fail without a fault, too ({log}): {', '.join(failed)}")
        failures += len(failed)
    print(f"{len(chosen) - failures} of {len(chosen)} faults were noticed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
