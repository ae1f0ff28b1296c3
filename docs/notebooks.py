"""Makes the chapters into notebooks: `python docs/notebooks.py build/book`, which needs jupytext (extra [docs]).

The directory also gets what their code reads: the sonnets, and the style of the pictures.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import jupytext
import nbformat

DOCS = Path(__file__).parent
PAGES = [DOCS / f"{name}.md" for name in ("chapter-5", "appendix-d", "chapter-6", "chapter-7", "appendix-e")]
OUTPUT = re.compile(r"```text\n(.*?)^```\s*", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\(pictures/[^)]*\)\s*")
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook(page: Path) -> nbformat.NotebookNode:
    """The page as a notebook: what it shows below its code becomes the output of that cell. Its pictures are left out,
    because the cell that draws one shows it."""
    book = jupytext.reads(page.read_text(encoding="utf-8"), fmt="md")
    book.metadata = nbformat.NotebookNode(kernelspec=KERNEL)
    cells: list[nbformat.NotebookNode] = []
    for cell in book.cells:
        cell.metadata.clear()
        if cell.cell_type == "markdown":
            if shown := OUTPUT.match(cell.source):
                cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=shown[1])]
            cell.source = PICTURE.sub("", OUTPUT.sub("", cell.source, count=1) if shown else cell.source)
        if cell.source.strip():
            cells.append(cell)
    book.cells = cells
    return book


def write(directory: Path) -> list[Path]:
    """Writes all notebooks and what they read into `directory`, which is made if need be; returns their paths."""
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    shutil.copy(DOCS / "sonnets.txt", directory)
    shutil.copy(DOCS / "pictures" / "style.mplstyle", directory / "pictures")
    paths = []
    for page in PAGES:
        paths.append(directory / f"{page.stem}.ipynb")
        nbformat.write(notebook(page), paths[-1])
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for path in write(parser.parse_args().directory):
        print(path)
