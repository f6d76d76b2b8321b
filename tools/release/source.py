"""The working tree: its version, its change log, its state in git."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from packaging.version import InvalidVersion, Version

from release import ROOT, Fault, project, run


def version(root: Path = ROOT) -> str:
    """Of pyproject.toml, the one place that it stands in.

    Raises:
        Fault: it cannot be that of a release.
    """
    text = project(root)["project"]["version"]
    try:
        parsed = Version(text)
    except InvalidVersion:
        raise Fault(f"pyproject.toml: {text!r} is no version (PEP 440), such as 1.2.0 or 1.2.0rc1") from None
    if parsed.is_devrelease or parsed.local or str(parsed) != text:
        raise Fault(f"pyproject.toml: version {text!r} is not that of a release, such as {parsed.base_version!r}")
    return text


def check_tag(version: str, root: Path = ROOT) -> None:
    """The tag of this version is still free, or it is this commit's."""
    tag = f"v{version}"
    if run("git", "tag", "--list", tag, cwd=root) == "":
        return
    tagged = run("git", "rev-list", "-1", tag, cwd=root)
    if tagged != run("git", "rev-parse", "HEAD", cwd=root):
        raise Fault(
            f"{version} is out: tag {tag} is commit {tagged[:10]}; give pyproject.toml the next version, and "
            "CHANGELOG.md a section `## <that version> (unreleased)`"
        )


def check_clean(root: Path = ROOT) -> None:
    """What is built is what is committed."""
    changed = run("git", "status", "--porcelain", cwd=root).splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed[:5])
        raise Fault(f"the working tree differs from the last commit: commit or remove {names}")


def check_changelog(version: str, today: date, root: Path = ROOT) -> bool:
    """The section at the top is about this version and says something. Returns whether it has a date, which makes this
    the release; until then it is "unreleased", and all else is checked as a rehearsal."""
    heading, _, rest = (root / "CHANGELOG.md").read_text().partition("\n## ")[2].partition("\n")
    found = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d\d-\d\d)\)", heading)
    if not found:
        right = f"`## {version} (unreleased)` or `## {version} ({today})`"
        raise Fault(f"CHANGELOG.md: the first section is `## {heading}`, it should be such as {right}")
    if found[1] != version:
        raise Fault(f"CHANGELOG.md: the section at the top is about {found[1]}, pyproject.toml's version is {version}")
    if not re.search("^- ", rest.partition("\n## ")[0], re.MULTILINE):
        raise Fault(f"CHANGELOG.md: the section about {version} lists no changes (lines that begin with `- `)")
    if found[2] == "unreleased":
        return False
    try:
        released = date.fromisoformat(found[2])
    except ValueError:
        raise Fault(f"CHANGELOG.md: {found[2]}, the date of {version}, is no day of the calendar") from None
    if released > today:
        raise Fault(f"CHANGELOG.md: {version} is dated {released}, which is after today, {today}")
    return True
