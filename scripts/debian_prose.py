"""Makes JSON lines of the prose in Debian's packages perl-doc and anarchism: the texts of docs/real-text.md.

    apt-get download perl-doc anarchism
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    python scripts/debian_prose.py unpacked prose

A record is a passage, `{"text": …}`: what stands under one heading, or, where that is long, paragraphs of it that are
at least `PASSAGE` characters in total. Passages that occur twice are written once. It needs `pod2text`, a part of Perl.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

PASSAGE = 1_000
NOT_PROSE = {"perltoc.pod", "perluniprops.pod"}  # a table of contents, and tables of Unicode
HEADINGS = {"h1", "h2", "h3", "h4"}
PARAGRAPHS = {"p", "blockquote", "li", "tr", "div", *HEADINGS}


class Block(NamedTuple):
    """A heading or a paragraph."""

    text: str
    heading: bool


class _HTMLBlocks(HTMLParser):
    """Collects the headings and paragraphs of a page's body."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self._text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in PARAGRAPHS or tag == "body":
            self.end_block()
        if tag == "body":
            self.blocks.clear()  # the head's
        if tag == "br":
            self._text += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self.end_block(heading=tag in HEADINGS)

    def handle_data(self, data: str) -> None:
        self._text += data

    def end_block(self, *, heading: bool = False) -> None:
        text = " ".join(self._text.split())
        if text:
            self.blocks.append(Block(text, heading))
        self._text = ""


def html_blocks(path: Path) -> Iterator[Block]:
    """Yields the headings and paragraphs of an HTML page."""
    parser = _HTMLBlocks()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    parser.end_block()
    yield from parser.blocks


def pod_blocks(path: Path) -> Iterator[Block]:
    """Yields the headings and paragraphs of a page in Perl's format pod."""
    command = ["pod2text", "--utf8", "--quotes=none", "--indent=4", "--width=1000000", str(path)]
    page = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    for text in re.split(r"\n\s*\n", page.strip("\n")):
        if not text.startswith("    "):  # headings are indented less, and no empty line follows them
            heading, _, text = text.partition("\n")
            yield Block(heading.strip(), heading=True)
        if text:
            yield Block(textwrap.dedent(text), heading=False)  # GPT-2 has one token for each space of an indent


def passages(blocks: Iterable[Block]) -> Iterator[str]:
    """Joins blocks to passages: a heading starts one, and so does a paragraph after `PASSAGE` characters."""
    passage: list[Block] = []
    for block in blocks:
        full = sum(len(text) for text, _ in passage) >= PASSAGE
        if full or (block.heading and not all(heading for _, heading in passage)):
            yield "\n\n".join(text for text, _ in passage)
            passage = []
        passage.append(block)
    if not all(heading for _, heading in passage):
        yield "\n\n".join(text for text, _ in passage)


def write(path: Path, texts: Iterable[str]) -> None:
    """Writes one record per text that was not there before, and prints how many there are."""
    unique = dict.fromkeys(texts)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in unique)
    mean = sum(map(len, unique)) / len(unique)
    print(f"{path}: {len(unique):,} passages of {mean:,.0f} characters on average")


def main() -> None:
    """Writes perl.jsonl and anarchism.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("unpacked", type=Path, help="directory in which both packages are unpacked")
    parser.add_argument("out", type=Path, help="directory to write perl.jsonl and anarchism.jsonl to")
    args = parser.parse_args()
    if not shutil.which("pod2text"):
        parser.error("pod2text was not found: install Perl (on Debian, the package perl)")
    pods = sorted(args.unpacked.glob("usr/share/perl/*/pod/*.pod"))
    pages = sorted(args.unpacked.glob("usr/share/doc/anarchism/html/*.html"))
    if not pods or not pages:
        parser.error(f"{args.unpacked} does not hold both packages: {len(pods)} pod files, {len(pages)} FAQ pages")
    args.out.mkdir(parents=True, exist_ok=True)
    texts = (text for pod in pods if pod.name not in NOT_PROSE for text in passages(pod_blocks(pod)))
    write(args.out / "perl.jsonl", texts)
    write(args.out / "anarchism.jsonl", (text for page in pages for text in passages(html_blocks(page))))


if __name__ == "__main__":
    main()
