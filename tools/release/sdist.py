"""The source distribution."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

from pathspec import GitIgnoreSpec

from release import ROOT, Fault, build_environment, project, run

LARGEST = 3_000_000  # bytes


def build(out: Path) -> Path:
    """Writes it into the folder `out`."""
    options = ["--sdist", "--no-isolation", "--skip-dependency-check"]
    run(sys.executable, "-m", "build", *options, "--outdir", out, ROOT, cwd=out, env=build_environment())
    (path,) = out.glob("*.tar.gz")
    return path


def belongs(root: Path = ROOT) -> set[str]:
    """The files that an sdist has: what neither git ignores nor pyproject.toml leaves out, and PKG-INFO."""
    left_out = GitIgnoreSpec.from_lines(project(root)["tool"]["scikit-build"]["sdist"]["exclude"])
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=root).split("\0")
    return {name for name in files if name and not left_out.match_file(name)} | {"PKG-INFO"}


def check(path: Path, expected: set[str]) -> None:
    """It is small, and has the files `expected`, no other ones."""
    if path.stat().st_size >= LARGEST:
        raise Fault(
            f"{path.name} has {path.stat().st_size:,} bytes, {LARGEST:,} or more: leave out what no build needs "
            "(sdist.exclude in pyproject.toml)"
        )
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()}
    if missing := sorted(expected - names):
        raise Fault(f"{path.name} lacks {', '.join(missing[:5])}")
    if extra := sorted(names - expected):
        raise Fault(f"{path.name} has what git ignores or pyproject.toml leaves out: {', '.join(extra[:5])}")
