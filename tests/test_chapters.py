"""The chapters after the fourth: as notebooks, their code runs and prints and draws what the pages show."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest
from helpers import exhaustive
from test_docs import BLOCK, assert_same_picture

pytest.importorskip("jupytext", reason="needs jupytext (extra [notebooks])")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat (extra [notebooks])")

ROOT = Path(__file__).parent.parent
MAKER = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
PAGES = MAKER["PAGES"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_every_chapter_after_the_fourth_is_among_them():
    assert set(PAGES) == {*(ROOT / "docs").glob("chapter-*.md"), *(ROOT / "docs").glob("appendix-*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_has_the_pages_text_code_and_output(page):
    book, text = MAKER["notebook"](page), page.read_text(encoding="utf-8")
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [(cell.source + "\n", printed(cell)) for cell in code] == BLOCK.findall(text)
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert not re.search(r"^```|^!\[", prose, re.MULTILINE)
    assert re.findall(r"^#+ .*", prose, re.MULTILINE) == re.findall(
        r"^#+ .*", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )


@pytest.mark.parametrize("page", [exhaustive(page, id=page.stem) for page in PAGES])
def test_a_notebook_runs_and_shows_what_the_page_does(page, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (extra [notebooks])")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    [path] = [path for path in MAKER["write"](tmp_path) if path.stem == page.stem]
    book = nbformat.read(path, as_version=4)
    expected = [printed(cell) for cell in book.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(book, timeout=1200, resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    for cell, shown in zip(code, expected, strict=True):
        assert printed(cell) == shown, cell.source
    drawn = {path.name for path in (tmp_path / "pictures").glob("*.svg")}
    assert drawn == set(re.findall(r"\]\(pictures/([\w-]+\.svg)\)", page.read_text(encoding="utf-8")))
    for name in drawn:
        assert_same_picture(tmp_path / "pictures" / name, ROOT / "docs" / "pictures" / name)
