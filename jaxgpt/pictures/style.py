"""The style of all pictures, and their conversion to PNG and SVG. Leaves pyplot and the user's settings alone."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jaxgpt.files import local, replacing_file

INK, MUTED, PAPER = "#1a1c1f", "#6e7379", "#fefefe"
# On the page these colours follow the reader's light or dark scheme.
_THEME = {INK: "currentColor", MUTED: "var(--muted)", PAPER: "var(--paper)"}
# In an .svg, which documentation shows on white and on black without telling it which: no paper, and a grey with a
# contrast of at least 4 with both.
GREY = "#7b7b7b"
_EITHER = {INK: GREY, MUTED: GREY, PAPER: "none"}
# Okabe and Ito 2008: distinguishable with every common form of colour blindness. Its yellow is too pale for lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
OUTLINE = "#0a84ff"  # visible on both ends of SCALE
TIMES = "\N{MULTIPLICATION SIGN}"
FONT = "DejaVu Sans"  # comes with matplotlib
PNG_DPI = 160
# Perceptually uniform, from light (0) to dark. The black end of magma is cut off: it would hide marks and outlines.
SCALE = ListedColormap(matplotlib.colormaps["magma_r"]([0.85 * i / 255 for i in range(256)]), name="probability")

_SETTINGS: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "text.usetex": False,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "savefig.facecolor": "auto",
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxgpt",  # makes files reproducible
    "pdf.fonttype": 42,
}


# A decorator: the function runs with these settings, and the user's are restored afterwards.
styled = matplotlib.rc_context(_SETTINGS)  # type: ignore[arg-type]


@styled
def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format of the path's suffix: .png, .svg or .pdf. Its layout is fixed from then on. An .svg
    has no background, and is readable on a light page and on a dark one."""
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    path = local(path)
    suffix = path.suffix.lower()
    with replacing_file(path) as partial:
        figure.savefig(partial, format=suffix[1:], dpi=PNG_DPI, metadata=dates.get(suffix))
        if suffix == ".svg":
            partial.write_text(_recoloured(partial.read_text(encoding="utf-8"), _EITHER), encoding="utf-8")
    figure.set_layout_engine("none")


@styled
def to_svg(figure: Figure, name: str, description: str) -> str:
    """Converts a figure to an <svg> element for a page. Its ids begin with `name`, it takes ink and paper colours from
    the page, and screen readers read out `description`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None})
    root, _, content = file.getvalue().partition("<svg ")[2].partition(">")
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    content = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", content)
    content = _recoloured(content, _THEME)
    found = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', root)
    assert found is not None
    width = float(found[1]) * 96 / 72  # points to CSS pixels
    return (
        f'<svg role="img" aria-label="{escape(description)}" style="--width:{width:.0f}px" '
        f'data-name="{name}" {found[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f"{content}"
    )


def _recoloured(svg: str, colours: dict[str, str]) -> str:
    for colour, value in colours.items():
        svg = svg.replace(colour, value)
    return svg


def escape(text: str) -> str:
    """Escapes text for HTML, including attributes."""
    return "".join({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}.get(c, c) for c in text)


def drawable(text: str, longest: int | None = None) -> str:
    """Prepares text for matplotlib to draw literally: characters that the font lacks become escapes, and dollar signs
    do not start a formula. Cuts it with … to `longest` characters."""
    text = "".join(c if ord(c) in _characters() else ascii(c)[1:-1] for c in text)
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is more readable on a colour (relative luminance: WCAG 2, with gamma 2.2)."""
    luminance = sum(weight * part**2.2 for weight, part in zip((0.2126, 0.7152, 0.0722), colour, strict=False))
    return "#ffffff" if luminance < 0.18 else "#000000"


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())
