"""Every Python snippet of the README and docs runs, in order, in a fresh namespace a page."""

import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import bnbops

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[tuple[int, str]]:
    """(line number, code) of each block fenced as ```python."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start()) + 2, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture
def _as_in_a_process_of_its_own(monkeypatch):
    """Importing what patches other libraries does it, and it is undone."""
    monkeypatch.delitem(sys.modules, "bnbops.integrations.peft", raising=False)
    yield
    bnbops.uninstall_as_bitsandbytes()
    if (integration := sys.modules.get("bnbops.integrations.peft")) is not None:
        integration.unregister()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("_as_in_a_process_of_its_own")
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"snippets_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # the compiler looks globals up there
    for line, code in snippets(page):
        # Padding makes a traceback point at the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))


def test_pages_have_snippets():
    assert {page.name for page in PAGES if snippets(page)} >= {"README.md", "compile.md", "optimizers.md"}


def test_relative_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_index_lists_every_page_once():
    linked = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert sorted(linked) == sorted(page.name for page in PAGES[1:] if page.name != "index.md")
    assert "](docs/index.md)" in PAGES[0].read_text()


# ---- what pages name exists ------------------------------------------------------------------------------------

NAMING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
_FOLDERS = "bnbops|csrc|tests|docs|meta_kernels|examples|benchmarks"
_FILE = re.compile(rf"[\w./*-]*\w\.(?:py|h|cpp|cu|md|toml|cmake)|(?:{_FOLDERS})/[\w./*-]*")


def named_files(text: str) -> list[str]:
    """Inline code that is the path of a file or folder here; its last parts suffice."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [code for code in re.findall(r"`([^`\n]+)`", prose) if _FILE.fullmatch(code)]


def named_objects(text: str) -> list[str]:
    """ "bnbops.optim.AdamW", of "bnb.optim.AdamW" too, and "torch.ops.bnbops.isa"."""
    found = re.findall(r"(?<![\w./])(torch\.ops\.bnbops|bnbops|bnb)((?:\.[A-Za-z_]\w*)+)", text)
    return [f"{'bnbops' if root == 'bnb' else root}{names}" for root, names in found]


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.name)
def test_files_and_objects_that_a_page_names_exist(page):
    text = page.read_text()
    folders = [ROOT / folder for folder in _FOLDERS.split("|")]
    files = [path for folder in folders for path in [folder, *folder.rglob("*")]] + list(ROOT.glob("*"))

    def is_here(name: str) -> bool:
        return any(path.match(name.rstrip("/")) for path in files)

    assert [name for name in named_files(text) if not is_here(name)] == []
    others = {"bnbops.pth"}  # a file
    assert [name for name in named_objects(text) if name not in others and not exists(name)] == []


def test_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in NAMING:
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE))
        assert named <= targets, page.name


def test_wrong_names_are_noticed():
    assert named_files("`csrc/gone.h`, `a.b`, `tests/`\n```\n`x.py`\n```\n") == ["csrc/gone.h", "tests/"]
    text = "bnb.optim.AdamX, `torch.ops.bnbops.nothing`, from bnbops.functional import, mybnbops.x"
    assert [(name, exists(name)) for name in named_objects(text)] == [
        *(("bnbops.optim.AdamX", False), ("torch.ops.bnbops.nothing", False), ("bnbops.functional", True))
    ]
