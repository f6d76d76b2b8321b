"""Every Python snippet of the README and docs runs, in order, in a fresh namespace a page."""

import re
import sys
import types
from pathlib import Path

import pytest

import bnbops

ROOT = Path(__file__).parent.parent
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
