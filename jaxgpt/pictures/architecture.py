"""Draws the diagram of a model from its config: data flows upwards, edges show shapes, and counts are at the side."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from jaxgpt.accounting import count_parameters, parameter_shapes
from jaxgpt.config import GPTConfig
from jaxgpt.pictures.style import INK, MUTED, PAPER, TIMES, drawable, styled

# Inches: the column of boxes, the positions left and right of it, and the gap between boxes.
_X, _WIDTH, _HEIGHT = 4.1, 3.5, 0.56
_SHORTCUT_X, _COUNT_X, _SHARE_X = 1.9, 8.15, 8.85
_GAP = 0.42
_FILL = {"embedding": "#cfe8f7", "norm": "#f6efb3", "attention": "#fbdcae", "feed forward": "#c4e8db"}
_DARK = "#000000"  # text on these fills, on a dark page too


@styled
def architecture(name: str, config: GPTConfig) -> Figure:
    """Draws the diagram."""
    return _Diagram(name, config).figure


def describe(config: GPTConfig) -> str:
    """Describes the diagram in words."""
    return (
        f"Diagram of the model: token and position embeddings of width {config.emb_dim:,} are added; then "
        f"{config.n_layers} blocks, each a LayerNorm, attention with {config.n_heads} heads, a shortcut, a LayerNorm, "
        f"a feed-forward layer of width {config.ffn_dim:,} and a shortcut; then a final LayerNorm and the output head, "
        f"which gives {config.vocab_size:,} logits. {count_parameters(config).total:,} parameters."
    )


class _Diagram:
    """Draws from the bottom up; `y` is the top of what has been drawn."""

    def __init__(self, name: str, config: GPTConfig):
        self.config, self.y = config, 0.0
        self.total = count_parameters(config).total
        self.figure = Figure(figsize=(9.25, 10.2))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self._draw()
        self.axes.text(0.35, self.y + 0.75, drawable(name, 60), fontsize=15, fontweight="bold", va="center")
        self.axes.text(0.35, self.y + 0.42, f"{self.total:,} parameters", fontsize=10, va="center", color=MUTED)
        self.axes.text(_COUNT_X, self.y, "parameters", ha="right", va="center", color=MUTED)
        self.axes.text(_SHARE_X, self.y, "share", ha="right", va="center", color=MUTED)
        height = self.y + 1.15
        self.axes.set(xlim=(0, 9.25), ylim=(-0.3, height))
        self.figure.set_size_inches(9.25, height + 0.3)

    def _draw(self) -> None:
        config = self.config
        D, V, C, L = config.emb_dim, config.vocab_size, config.context_length, config.n_layers
        stream = f"T {TIMES} {D:,}"
        self.axes.text(_X, self.y, "token ids", ha="center", va="center", fontsize=10)
        self.y += 0.12
        self.arrow("T")
        self.box("tok_emb", "token embedding", f"{V:,} {TIMES} {D:,}", "embedding", "tok_emb")
        self.arrow(stream)
        middle = self.plus()
        self.axes.add_patch(_box(0.35, middle - 0.28, 2.1, 0.56, _FILL["embedding"]))
        self.axes.text(1.4, middle + 0.1, "position embedding", ha="center", va="center", color=_DARK)
        self.axes.text(
            1.4, middle - 0.12, f"pos_emb  {C:,} {TIMES} {D:,}", ha="center", va="center", fontsize=7.5, color=_DARK
        )
        self._line((2.45, middle), (_X - 0.13, middle), arrow=True)
        self.count(middle, "pos_emb")
        self.arrow(stream)
        bottom = self.y
        self.step()
        self.branch("norm1", "att", self._attention(), "attention", "attention")
        self.branch("norm2", "ff", self._feed_forward(), "feed-forward", "feed forward")
        self.step()
        blocks = sum(size for path, size in self._sizes() if path.startswith("trf_blocks"))
        frame = FancyBboxPatch(
            (1.45, bottom),
            5.05,
            self.y - bottom,
            boxstyle="round,pad=0,rounding_size=0.14",
            facecolor="none",
            edgecolor=MUTED,
            linewidth=1.1,
        )
        self.axes.add_patch(frame)
        title = f"{L} blocks" if L > 1 else "1 block"
        self.axes.text(1.3, (self.y + bottom) / 2, title, fontsize=12, fontweight="bold", ha="right", va="center")
        self.axes.text(1.3, (self.y + bottom) / 2 - 0.26, "trf_blocks", fontsize=7.5, ha="right", va="center")
        self.axes.text(
            6.6, bottom + 0.12, f"{blocks // L:,} per block", fontsize=7.5, ha="left", va="center", color=MUTED
        )
        self.arrow(stream)
        self.box("final_norm", "LayerNorm", f"{D:,}", "norm", "final_norm")
        self.arrow(stream)
        tied = config.tie_embeddings
        self.box(
            "out_head", "output head", "tok_emb again" if tied else f"{V:,} {TIMES} {D:,}", "embedding", "out_head"
        )
        self.arrow(f"T {TIMES} {V:,}")
        self.axes.text(_X, self.y + 0.1, "logits of the next token", ha="center", va="center", fontsize=10)
        self.y += 0.22

    def _attention(self) -> str:
        config = self.config
        text = f"{config.n_heads} heads of {config.head_dim}"
        if config.banded_layers:
            text += f"; last {config.attention_window} positions in blocks 1, 3, ..."
        return text

    def _feed_forward(self) -> str:
        config = self.config
        return f"{config.emb_dim:,} → {config.ffn_dim:,} → {config.activation} → {config.emb_dim:,}"

    def branch(self, norm: str, name: str, detail: str, title: str, kind: str) -> None:
        """Draws a norm, the box that it feeds, and the shortcut around both."""
        stream = f"T {TIMES} {self.config.emb_dim:,}"
        start = self.y + 0.1
        self.arrow("")
        self.box(norm, "LayerNorm", f"{self.config.emb_dim:,}", "norm", f"/{norm}/")
        self.arrow(stream)
        self.box(name, title, detail, kind, f"/{name}/")
        self.arrow(stream)
        middle = self.plus()
        self._line((_X, start), (_SHORTCUT_X, start))
        self._line((_SHORTCUT_X, start), (_SHORTCUT_X, middle))
        self._line((_SHORTCUT_X, middle), (_X - 0.13, middle), arrow=True)
        self.axes.text(
            _SHORTCUT_X - 0.09, (start + middle) / 2, "shortcut", rotation=90, ha="right", va="center", fontsize=7.5
        )

    def box(self, name: str, title: str, detail: str, kind: str, prefix: str) -> None:
        """Draws a part of the model, with its parameter count at the side."""
        self.axes.add_patch(_box(_X - _WIDTH / 2, self.y, _WIDTH, _HEIGHT, _FILL[kind]))
        middle = self.y + _HEIGHT / 2
        self.axes.text(_X, middle + 0.1, title, ha="center", va="center", fontsize=10, color=_DARK)
        self.axes.text(_X, middle - 0.13, f"{name}  {detail}", ha="center", va="center", fontsize=7.5, color=_DARK)
        self.count(middle, prefix)
        self.y += _HEIGHT

    def count(self, y: float, prefix: str) -> None:
        """Writes, at height y, the parameters of all leaves whose path contains `prefix`, and their share."""
        sizes = [size for path, size in self._sizes() if prefix in path]
        L = self.config.n_layers if prefix.startswith("/") else 1
        text = f"{sum(sizes) // L:,}" if L == 1 else f"{L} {TIMES} {sum(sizes) // L:,}"
        self.axes.text(_COUNT_X, y, text, ha="right", va="center", fontsize=9)
        self.axes.text(_SHARE_X, y, f"{sum(sizes) / self.total:.1%}", ha="right", va="center", fontsize=9)

    def plus(self) -> float:
        """Draws a sum; returns the height of its centre."""
        middle = self.y + 0.13
        self.axes.add_patch(Circle((_X, middle), 0.13, facecolor=PAPER, edgecolor=INK, linewidth=1.1, zorder=3))
        self._line((_X - 0.07, middle), (_X + 0.07, middle), zorder=4)
        self._line((_X, middle - 0.07), (_X, middle + 0.07), zorder=4)
        self.y += 0.26
        return middle

    def arrow(self, shape: str) -> None:
        """Draws the arrow up to the next part, with the shape of the data on it."""
        self._line((_X, self.y), (_X, self.y + _GAP), arrow=True)
        self.axes.text(_X + 0.12, self.y + _GAP / 2 - 0.02, shape, fontsize=7.5, ha="left", va="center", color=MUTED)
        self.y += _GAP

    def step(self) -> None:
        """Draws a short line between a block's frame and its content."""
        self._line((_X, self.y), (_X, self.y + 0.12))
        self.y += 0.12

    def _line(self, start: tuple[float, float], end: tuple[float, float], arrow: bool = False, zorder: int = 2) -> None:
        style = "-|>,head_length=4,head_width=2" if arrow else "-"
        self.axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle=style, color=INK, linewidth=1.1, shrinkA=0, shrinkB=0, zorder=zorder)
        )

    def _sizes(self) -> list[tuple[str, int]]:
        return [(path, math.prod(shape)) for path, shape in parameter_shapes(self.config).items()]


def _box(x: float, y: float, width: float, height: float, colour: str) -> FancyBboxPatch:
    return FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=colour,
        edgecolor=MUTED,
        linewidth=0.8,
        zorder=2,
    )
