"""Each check of a release (docs/releasing.md) against what it should find. The archives: test_packaging.py."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from datetime import date
from pathlib import Path

import pytest

import bnbops

for name in ("auditwheel", "cyclonedx", "pathspec", "twine"):
    pytest.importorskip(name, reason=f"{name} comes with `pip install bnbops[release]`")

from release import Fault, check, inventory, run, sdist, source, wheel  # noqa: E402

TODAY = date(2026, 12, 1)
CHANGELOG = "# Changelog\n\n## 1.2.0 (unreleased)\n\n- A change.\n\n## 1.1.0 (2026-01-01)\n\n- Another.\n"
NAME = f"bnbops-1.2.0-py3-none-{wheel.PLATFORM}.whl"
INFO = "bnbops-1.2.0.dist-info"
METADATA = (
    "Metadata-Version: 2.4\nName: bnbops\nVersion: 1.2.0\nSummary: Low bits\nLicense-Expression: MIT\n"
    "Requires-Dist: torch>=2.10\nRequires-Dist: pytest; extra == 'test'\n"
    "Description-Content-Type: text/markdown\n\nLow bits.\n"
)
SOURCES = {"bnbops/__init__.py", "meta_kernels/__init__.py", "README.md"}
FILES = {
    "bnbops/__init__.py": "",
    "bnbops/meta_kernels/__init__.py": "",
    "bnbops/lib/libbnbops_cpu.so": "",
    "bnbops.pth": "",
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-{wheel.PLATFORM}\n",
}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A repository of version 1.2.0, all of it committed."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(tree: Path, *arguments: str) -> None:
    run("git", "-c", "user.name=name", "-c", "user.email=name@example.org", *arguments, cwd=tree)


def commit(tree: Path) -> None:
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", "A change")


def a_wheel(folder: Path, files: dict[str, str | bytes], name: str = NAME) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{INFO}/RECORD", "".join(f"{path},,\n" for path in files))
    return folder / name


def an_sdist(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "bnbops-1.2.0.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"bnbops-1.2.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def a_library(folder: Path, code: str, *options: str) -> bytes:
    (folder / "code.c").write_text(code)
    run("cc", "-shared", "-fPIC", "-o", "library.so", "code.c", *options, cwd=folder)
    return (folder / "library.so").read_bytes()


# ---- the working tree ------------------------------------------------------------------------------------------


def test_version_of_this_repository():
    assert source.version() == bnbops.__version__


@pytest.mark.parametrize("text", ["1.2.0", "1.2.0rc1", "1.2.0.post1"])
def test_version_of_a_release(text, tree):
    (tree / "pyproject.toml").write_text(f'[project]\nversion = "{text}"\n')
    assert source.version(tree) == text


@pytest.mark.parametrize("text", ["1.2.0.dev1", "1.2.0+here", "1.2.0-rc1", "v1.2.0", "next"])
def test_version_of_no_release(text, tree):
    (tree / "pyproject.toml").write_text(f'[project]\nversion = "{text}"\n')
    with pytest.raises(Fault, match=r"^pyproject.toml: .* such as"):
        source.version(tree)


def test_tag_is_free_or_of_this_commit(tree):
    source.check_tag("1.2.0", tree)
    git(tree, "tag", "--annotate", "--message", "1.2.0", "v1.2.0")
    source.check_tag("1.2.0", tree)
    commit(tree)
    source.check_tag("1.2.1", tree)
    with pytest.raises(Fault, match=r"1.2.0 is out: tag v1.2.0 is commit \w{10}; give pyproject.toml the next version"):
        source.check_tag("1.2.0", tree)


def test_tree_is_committed(tree):
    source.check_clean(tree)
    (tree / "new.py").touch()
    with pytest.raises(Fault, match=r"commit or remove new\.py"):
        source.check_clean(tree)


@pytest.mark.parametrize(("when", "is_release"), [("unreleased", False), ("2026-12-01", True), ("2026-11-30", True)])
def test_changelog_tells_a_release_from_a_rehearsal(when, is_release, tree):
    (tree / "CHANGELOG.md").write_text(CHANGELOG.replace("unreleased", when))
    assert source.check_changelog("1.2.0", TODAY, tree) is is_release


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("1.2.0 (", "1.3.0 (", "at the top is about 1.3.0, pyproject.toml's version is 1.2.0"),
        (
            "unreleased",
            "soon",
            r"section is `## 1.2.0 \(soon\)`, it should be such as `## 1.2.0 \(unreleased\)` or .*2026-12-01",
        ),
        ("unreleased", "2026-12-02", "dated 2026-12-02, which is after today"),
        ("unreleased", "2026-02-30", "no day of the calendar"),
        ("- A change.", "", r"lists no changes"),
        (CHANGELOG, "# Changelog\n", "should be such as"),
    ],
)
def test_changelog_is_about_something_else(before, after, fault, tree):
    (tree / "CHANGELOG.md").write_text(CHANGELOG.replace(before, after))
    with pytest.raises(Fault, match=fault):
        source.check_changelog("1.2.0", TODAY, tree)


# ---- the sdist -------------------------------------------------------------------------------------------------


def test_sdist_has_what_belongs(tmp_path):
    sdist.check(an_sdist(tmp_path, {"README.md": b"", "csrc/ops.cpp": b""}), {"README.md", "csrc/ops.cpp"})


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"a": b"", "b": bytes(sdist.LARGEST)}, "bytes, 3,000,000 or more: leave out what no build needs"),
        ({"a": b""}, "lacks b"),
        ({"a": b"", "b": b"", "c": b""}, "has what git ignores or pyproject.toml leaves out: c"),
    ],
)
def test_sdist_has_not(files, fault, tmp_path):
    with pytest.raises(Fault, match=fault):
        sdist.check(an_sdist(tmp_path, files), {"a", "b"})


# ---- the wheel -------------------------------------------------------------------------------------------------


def test_wheel_is_right(tmp_path):
    path = a_wheel(tmp_path, FILES)
    wheel.check_name(path, "1.2.0")
    assert wheel.check_contents(path, SOURCES) is False
    assert wheel.check_contents(a_wheel(tmp_path, FILES | {wheel.LIBRARIES[1]: ""}), SOURCES) is True


def test_wheel_of_another_platform_or_version(tmp_path):
    for name in (NAME.replace("manylinux_2_28", "linux"), NAME.replace("1.2.0", "1.2.1"), NAME.replace("py3", "cp311")):
        with pytest.raises(Fault, match=f"the wheel is {name}, it should be {NAME}"):
            wheel.check_name(a_wheel(tmp_path, FILES, name), "1.2.0")
    other = FILES | {f"{INFO}/WHEEL": FILES[f"{INFO}/WHEEL"].replace("py3-none", "py3-abi3")}
    with pytest.raises(Fault, match=rf"has the tags \['py3-abi3-{wheel.PLATFORM}'\]"):
        wheel.check_name(a_wheel(tmp_path, other), "1.2.0")


@pytest.mark.parametrize(
    "name", ["bnbops/__init__.py", "bnbops/meta_kernels/__init__.py", wheel.LIBRARIES[0], "bnbops.pth"]
)
def test_wheel_lacks(name, tmp_path):
    files = {path: content for path, content in FILES.items() if path != name}
    with pytest.raises(Fault, match=f"lacks {name}"):
        wheel.check_contents(a_wheel(tmp_path, files), SOURCES)


@pytest.mark.parametrize("name", ["tests/test_a.py", "bnbops/notes.py", "bnbops/lib/libother.so", "meta_kernels/a.py"])
def test_wheel_has_too_much(name, tmp_path):
    with pytest.raises(Fault, match=f"has what does not belong there: {name}"):
        wheel.check_contents(a_wheel(tmp_path, FILES | {name: ""}), SOURCES)


@pytest.mark.parametrize(
    ("code", "options", "fault"),
    [
        ("", ["-Wl,--no-as-needed", "-l:libdl.so.2"], "needs libdl.so.2, which neither torch nor the system brings"),
        ("", ["-Wl,-rpath,/somewhere"], "has a search path for libraries"),
        ('const char* file = "/somewhere/code.cu";', [], "names files of this machine: /somewhere/code.cu"),
    ],
)
def test_library_of_this_machine_alone(code, options, fault, tmp_path):
    path = a_wheel(tmp_path, FILES | {wheel.LIBRARIES[1]: a_library(tmp_path, code, *options)})
    with zipfile.ZipFile(path) as archive, pytest.raises(Fault, match=fault):
        wheel.check_library(Path(archive.extract(wheel.LIBRARIES[1], tmp_path)))


def test_library_that_needs_a_newer_system_is_refused(tmp_path):
    """exp(), as glibc has it since 2.29."""
    code = "double exp(double); double f(double x) { return exp(x); }"
    library = a_library(tmp_path, code, "-fno-builtin", "-lm")
    assert b"GLIBC_2.29" in library
    built = a_wheel(tmp_path, FILES | {wheel.LIBRARIES[0]: library}, NAME.replace("manylinux_2_28", "linux"))
    with pytest.raises(Fault, match=r"(?s)too-recent versioned symbols.*libm\.so\.6 with versions\s+{'GLIBC_2\.29'}"):
        wheel.name_platform(built, tmp_path)


# ---- what an index reads ---------------------------------------------------------------------------------------


def test_metadata(tmp_path):
    check.check_metadata(a_wheel(tmp_path, FILES))
    without = FILES | {f"{INFO}/METADATA": METADATA.replace("Version: 1.2.0\n", "")}
    with pytest.raises(Fault, match=r"twine check --strict .* failed with exit status 1"):
        check.check_metadata(a_wheel(tmp_path, without))


# ---- what comes with them --------------------------------------------------------------------------------------


@pytest.fixture
def archives(tmp_path) -> tuple[Path, Path]:
    return an_sdist(tmp_path, {"README.md": b""}), a_wheel(tmp_path, FILES | {wheel.LIBRARIES[1]: ""})


def test_bill_of_materials(archives):
    path = inventory.write_bill(*archives)
    inventory.check_bill(path, *archives)
    bill = json.loads(path.read_text())
    parts = {part["name"]: part for part in bill["components"]}
    assert bill["metadata"]["component"]["purl"] == "pkg:pypi/bnbops@1.2.0"
    assert {*parts} == {*(archive.name for archive in archives), "torch", "cudart_static"}
    assert parts["torch"]["description"].endswith("pip installs torch>=2.10")
    assert inventory.write_bill(*archives).read_text() == path.read_text(), "the same archives, another bill"


def test_bill_of_other_archives(archives):
    path = inventory.write_bill(*archives)
    archives[1].write_bytes(b"another")
    with pytest.raises(Fault, match=rf"{NAME} is missing, or has another SHA-256"):
        inventory.check_bill(path, *archives)


def test_bill_that_no_tool_reads(archives):
    path = inventory.write_bill(*archives)
    path.write_text(path.read_text().replace('"library"', '"book"'))
    with pytest.raises(Fault, match=r"does not follow CycloneDX 1.6: .*book"):
        inventory.check_bill(path, *archives)


def test_checksums(archives):
    sums = inventory.write_sums([*archives])
    inventory.check_sums(sums)
    assert run("sha256sum", "--check", sums.name, cwd=sums.parent) == "".join(
        f"{a.name}: OK\n" for a in sorted(archives)
    )
    archives[0].write_bytes(b"another")
    (sums.parent / "more").touch()
    with pytest.raises(Fault, match=r"SHA256SUMS is not that of its folder: bnbops-1.2.0.tar.gz, more"):
        inventory.check_sums(sums)
