"""The README and the pages under docs/ do what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=str)
def test_code_on_the_page_runs_and_prints_what_it_shows(page):
    namespace: dict = {}
    for code, expected in BLOCK.findall(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if expected:
            assert printed.getvalue() == expected, code


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_readme_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for module in (ROOT / "jaxgpt").glob("*.py"):
        assert module.name in ("__init__.py", "__main__.py", "errors.py") or f"`{module.name}`" in readme, module.name


def test_readme_commands_are_the_two():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert '    pip install -e . && python scripts/generate.py --prompt "To be, or not to be"\n' in readme
    assert "    pip install -e '.[test]' && pytest\n" in readme
