"""The wheel in an environment of its own, as a user without a compiler gets it."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from release import Fault, run


def check(wheel: Path, torch: str) -> str:
    """Installs `torch`, such as "torch==2.13.0", and the wheel from nothing, and checks every operator. Returns what
    `python -m bnbops` says of the versions."""
    with TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        run(sys.executable, "-m", "venv", python.parents[1])
        run(python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", torch, wheel)
        return check_installed(python, Path(folder))


def check_installed(python: Path, folder: Path) -> str:
    """`python -m bnbops`, run in `folder` with no program on the PATH, finds all operators right."""
    said = run(python, "-m", "bnbops", cwd=folder, env={"PATH": "", "HOME": str(folder)})
    if "all operators are right" not in said:
        raise Fault(f"`python -m bnbops` does not find all operators right:\n  {said.strip()}")
    return next(line for line in said.splitlines() if line.startswith("bnbops "))
