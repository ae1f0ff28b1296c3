"""Makes one HTML page that contains its pictures and needs nothing else: no library, no font, no network. A script in
it tells the value under the pointer or finger, and saves a picture as a file; without scripts, the pictures remain."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files

from jaxgpt.pictures.readout import Readout
from jaxgpt.pictures.style import escape
from jaxgpt.version import __version__

_SCRIPT = files("jaxgpt.pictures").joinpath("page.js").read_text(encoding="utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
# Makes the browser load nothing: the only images are those in the page, and it runs this script and no other.
_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_DIGEST}'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1f; --muted: #5f646a; --paper: #fefefe; --line: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --muted: #a2a7ad; --paper: #17191c; --line: #383c41; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: .5rem 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
p { max-width: 46rem; margin: .5rem 0; }
blockquote { margin: 1rem 0; padding: .25rem 1rem; border-left: .25rem solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
a { color: inherit; }
figure { margin: 1.5rem 0; }
.picture { overflow-x: auto; }
svg { display: block; width: min(100%, var(--width)); height: auto; }
.whole svg { width: var(--width); }
figcaption { display: flex; gap: .5rem; margin-top: .5rem; }
button { padding: .2rem .7rem; border: 1px solid var(--line); border-radius: .3rem; color: inherit;
  background: none; font: inherit; font-size: .85rem; cursor: pointer; }
#tip, #mark { position: fixed; pointer-events: none; }
#tip { max-width: min(24rem, 90vw); padding: .3rem .6rem; border-radius: .3rem; color: var(--paper);
  background: var(--ink); font-size: .85rem; overflow-wrap: anywhere; }
#mark { outline: 2px solid #0a84ff; }
svg image { image-rendering: pixelated; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: name of its anchor.
        title: its heading.
        text: how to read its pictures.
        svgs: the pictures, as <svg> elements.
        readouts: what each of them tells under the pointer, where there is something to tell.
    """

    name: str
    title: str
    text: str
    svgs: Sequence[str]
    readouts: Sequence[Readout | None] = ()


def page(title: str, prompt: str | None, sections: Sequence[Section]) -> str:
    """Returns the page's HTML; `prompt` is quoted under the title."""
    links = "".join(f'<li><a href="#{section.name}">{escape(section.title)}</a></li>\n' for section in sections)
    quoted = "" if prompt is None else f"<blockquote>{escape(prompt)}</blockquote>\n"
    readouts = [readout and dataclasses.asdict(readout) for section in sections for readout in _readouts(section)]
    values = json.dumps(readouts, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{quoted}<nav><ul>\n{links}</ul></nav>\n</header>\n<main>\n"
        f"{''.join(map(_section, sections))}</main>\n<footer>Made by jaxgpt {__version__}.</footer>\n"
        '<div id="mark" hidden></div>\n<div id="tip" role="status" hidden></div>\n'
        f'<script id="values" type="application/json">{values}</script>\n<script>{_SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


def _readouts(section: Section) -> Sequence[Readout | None]:
    return section.readouts or [None] * len(section.svgs)


def _section(section: Section) -> str:
    figures = "".join(f'<figure><div class="picture" tabindex="0">{svg}</div></figure>\n' for svg in section.svgs)
    return (
        f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n'
        f"{figures}</section>\n"
    )
