"""Draws how a model reads a text: attention maps, the next token at each position, and the logit lens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxgpt.config import GPTConfig
from jaxgpt.interpret import Inside
from jaxgpt.pictures.style import COLOURS, MUTED, OUTLINE, SCALE, drawable, on, styled

# Most labels along one side of a head's map; with more tokens, only every n-th is labelled.
_MOST_LABELS = 24
# Most positions per next-token figure and per logit-lens figure, and the width of the latter in inches; longer texts
# take several figures.
_ROWS, _COLUMNS, _LENS_WIDTH = 32, 24, 10.5
_LONGEST_LABEL = 10
# Of two models side by side: tokens shown per position, and the most bits that a bar is long.
_COMPARED, _MOST_BITS = 3, 10.0
_TILE = 2.3  # inches
# The square root makes weights of a few per cent visible; in a long text most are that small.
_ATTENTION_SCALE = PowerNorm(0.5, 0, 1)


@styled
def attention(config: GPTConfig, inside: Inside, layer: int, labels: Sequence[str]) -> Figure:
    """Draws one block's attention as one map per head, queries down, keys across. Keys that a query cannot see are
    blank."""
    weights_HxTxT = inside.attention_LxHxTxT[layer]
    H, T = weights_HxTxT.shape[:2]
    # Of the grids that are slightly wider than high, the one with the fewest empty cells.
    across = min(range(math.isqrt(H - 1) + 1, math.isqrt(2 * H) + 2), key=lambda n: (-H % n, n))
    down, gap = math.ceil(H / across), max(1, round(0.09 * T))
    pitch = T + gap
    # All maps form one image, because matplotlib is slow with many axes, and some models have hundreds of heads.
    image = np.full((down * pitch - gap, across * pitch - gap), np.nan)
    window = config.attention_window if layer in config.banded_layers else T
    visible = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -window)
    tile = _TILE if down > 1 or across > 2 else 1.5 * _TILE
    figure = Figure(figsize=(tile * across + 2.1, tile * down + 1.7), layout="constrained")
    axes = figure.subplots()
    for head, weights_TxT in enumerate(weights_HxTxT):
        top, left = head // across * pitch, head % across * pitch
        image[top : top + T, left : left + T] = np.where(visible, weights_TxT, np.nan)
        # Outline the positions that queries can see, so that a map of faint weights has a shape too.
        steps = np.repeat(np.arange(T + 1), 2)
        axes.plot(left + steps[1:] - 0.5, top + steps[:-1] - 0.5, color=MUTED, linewidth=0.4)
        corner = [left - 0.5, left - 0.5, left + T - 0.5], [top - 0.5, top + T - 0.5, top + T - 0.5]
        axes.plot(*corner, color=MUTED, linewidth=0.4)
        place: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "va": "bottom", "fontsize": 8}
        axes.annotate(f"head {head}", (left - 0.5, top - 0.5), **place)
    drawn = axes.imshow(image, cmap=SCALE, norm=_ATTENTION_SCALE, interpolation="none")
    step = math.ceil(T / _MOST_LABELS)
    shown = np.arange(0, T, step)
    names = [drawable(labels[t], _LONGEST_LABEL) for t in shown]
    last_row = [min((H - 1 - column) // across, down - 1) for column in range(across)]
    axes.set_yticks(np.concatenate([shown + row * pitch for row in range(down)]), names * down)
    axes.set_xticks(np.concatenate([shown + column * pitch for column in range(across)]), names * across, rotation=90)
    size = min(7.5, 0.8 * 72 * tile / (T + gap) * step)
    axes.tick_params(length=0, labelsize=size)
    if min(last_row) < down - 1:  # hide the labels in columns whose last map is not in the bottom row
        for label, column in zip(axes.get_xticklabels(), np.repeat(range(across), len(shown)), strict=True):
            label.set_visible(last_row[column] == down - 1)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("none")
    every = "" if step == 1 else f" (every {_ordinal(step)} is labelled)"
    axes.set(xlabel=f"key: the token looked at{every}", ylabel="query: the token that looks")
    axes.set_title(f"attention in block {layer}", fontsize=13, fontweight="bold", loc="left", pad=18)
    _bar(figure, axes, drawn, "attention weight", (0, 0.1, 0.25, 0.5, 1), 0.6)
    return figure


@styled
def next_tokens(inside: Inside, labels: Sequence[str], top_labels: Any) -> list[Figure]:
    """Draws the likeliest next tokens after each position, and the one that came; one figure per `_ROWS` positions.
    `top_labels` are the labels of `inside.top_ids_NxTxK`."""
    T = len(inside.ids_T)
    widest = max(4, *(len(_cut(label)) for ranks in top_labels[-1] for label in ranks))
    return [
        _next_tokens(inside, labels, top_labels[-1], range(i, min(T, i + _ROWS)), widest) for i in range(0, T, _ROWS)
    ]


def _next_tokens(inside: Inside, labels: Sequence[str], top_labels_TxK: Any, rows: range, widest: int) -> Figure:
    T, K = inside.top_ids_NxTxK.shape[1:]
    figure = Figure(figsize=(K * (0.5 + 0.075 * widest) + 2.6, 0.25 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    _tokens(axes, inside, top_labels_TxK, rows, K)
    came = [
        f"{_cut(labels[t + 1])}   {_percent(inside.true_probabilities_NxS[-1, t])}" if t + 1 < T else "" for t in rows
    ]
    axes.set_yticks(range(len(rows)), [f"{t}   {_cut(labels[t])}" for t in rows])
    axes.set_xticks(range(K), ["likeliest", *map(_ordinal, range(2, K + 1))])
    axes.xaxis.tick_top()
    _bare(axes)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(rows)), came)
    _bare(right)
    header: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom", "fontsize": 8}
    axes.annotate("just read", (0, 1), (-4, 4), ha="right", **header)
    axes.annotate("came next", (1, 1), (4, 4), ha="left", **header)
    _title(axes, "the next token", rows, T)
    return figure


def _tokens(axes: Axes, inside: Inside, top_labels_TxK: Any, rows: range, most: int) -> None:
    """The `most` likeliest next tokens after each of the positions `rows`; the one that came is outlined."""
    probabilities_RxK = inside.top_probabilities_NxTxK[-1, rows.start : rows.stop, :most]
    axes.imshow(probabilities_RxK, cmap=SCALE, vmin=0, vmax=1, aspect="auto", interpolation="none")
    for row, t in enumerate(rows):
        for rank, p in enumerate(map(float, probabilities_RxK[row])):
            style: dict[str, Any] = {"va": "center", "color": on(SCALE(p))}
            axes.text(rank - 0.44, row, _cut(top_labels_TxK[t][rank]), ha="left", fontsize=8, **style)
            axes.text(rank + 0.46, row, _percent(p), ha="right", fontsize=6.5, **style)
            if t + 1 < len(inside.ids_T) and inside.top_ids_NxTxK[-1, t, rank] == inside.ids_T[t + 1]:
                _outline(axes, rank, row)


@styled
def comparison(
    names: Sequence[str], insides: Sequence[Inside], labels: Sequence[str], top_labels: Sequence[Any]
) -> list[Figure]:
    """Draws the likeliest next tokens of two models that read the same ids side by side, and at the right by how many
    bits the second finds what came likelier than the first; one figure per `_ROWS` positions. `top_labels` has, per
    model, the labels of its `top_ids_NxTxK`."""
    T = len(labels)
    surer_S = np.log2(insides[1].true_probabilities_NxS[-1]) - np.log2(insides[0].true_probabilities_NxS[-1])
    # A probability of 0 in float32 has no logarithm; and one surprise should not flatten all other bars.
    surer_S = np.clip(np.nan_to_num(surer_S, nan=0.0, posinf=_MOST_BITS, neginf=-_MOST_BITS), -_MOST_BITS, _MOST_BITS)
    widest = max(4, *(len(_cut(label)) for tops in top_labels for ranks in tops[-1] for label in ranks[:_COMPARED]))
    figures = []
    for start in range(0, T, _ROWS):
        rows = range(start, min(T, start + _ROWS))
        width = _COMPARED * (0.5 + 0.075 * widest)
        figure = Figure(figsize=(2 * width + 3.6, 0.25 * len(rows) + 1.2), layout="constrained")
        *tables, bars = figure.subplots(1, 3, width_ratios=(width, width, 1.6))
        for axes, name, inside, tops in zip(tables, names, insides, top_labels, strict=True):
            _tokens(axes, inside, tops[-1], rows, _COMPARED)
            axes.set_yticks(range(len(rows)), [f"{t}   {_cut(labels[t])}" for t in rows] if axes is tables[0] else "")
            axes.set_xticks([])
            axes.set_title(drawable(name, 30), fontsize=10, loc="left")
            _bare(axes)
        drawn = surer_S[start : rows.stop]
        bars.barh(range(len(drawn)), drawn, color=[COLOURS[0] if bits >= 0 else COLOURS[1] for bits in drawn])
        bars.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-_limit(surer_S), _limit(surer_S)))
        bars.axvline(0, color=MUTED, linewidth=0.6)
        bars.set_yticks(range(len(rows)), [_cut(labels[t + 1]) if t + 1 < T else "" for t in rows])
        bars.yaxis.tick_right()
        bars.set_title("bits, and what came", fontsize=10, loc="right")
        _bare(bars)
        figures.append(figure)
    return figures


def _limit(bits: Any) -> float:
    return max(1.0, 1.1 * float(np.abs(bits).max(initial=0.0)))


@styled
def lens(inside: Inside, labels: Sequence[str], top_labels: Any) -> list[Figure]:
    """Draws what the model would predict after each block, at each position; long texts take several figures.
    `top_labels` are the labels of `inside.top_ids_NxTxK`."""
    N, T = inside.top_ids_NxTxK.shape[:2]
    shown = [*labels, *(top_labels[n][t][0] for n in range(N) for t in range(T))]
    width = 0.17 + 0.075 * max(2, *(len(_cut(label)) for label in shown))
    most = min(_COLUMNS, int(_LENS_WIDTH / width))
    return [_lens(inside, labels, top_labels, range(i, min(T, i + most)), width) for i in range(0, T, most)]


def _lens(inside: Inside, labels: Sequence[str], top_labels: Any, columns: range, width: float) -> Figure:
    N, T = inside.top_ids_NxTxK.shape[:2]
    probabilities_NxC = inside.top_probabilities_NxTxK[:, columns.start : columns.stop, 0]
    figure = Figure(figsize=(max(4.5, len(columns) * width + 2.4), 0.29 * N + 1.3), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(
        probabilities_NxC, cmap=SCALE, vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="none"
    )
    for n in range(N):
        for column, t in enumerate(columns):
            colour = on(SCALE(float(probabilities_NxC[n, column])))
            axes.text(column, n, _cut(top_labels[n][t][0]), ha="center", va="center", fontsize=8, color=colour)
            if t + 1 < T and inside.top_ids_NxTxK[n, t, 0] == inside.ids_T[t + 1]:
                _outline(axes, column, n)
    places = ["embeddings", *(f"block {i}" for i in range(N - 2)), f"block {N - 2}: the model"]
    axes.set_yticks(range(N), places)
    axes.set_xticks(range(len(columns)), [_cut(labels[t]) for t in columns])
    _bare(axes)
    axes.set_xlabel("the token just read")
    _title(axes, "the logit lens", columns, T)
    _bar(figure, axes, drawn, "probability", (0, 0.5, 1), 1)
    return figure


def _bar(figure: Figure, axes: Axes, drawn: ScalarMappable, label: str, ticks: Sequence[float], shrink: float) -> None:
    bar = figure.colorbar(drawn, ax=axes, shrink=shrink, aspect=18, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.set_label(label)
    bar.ax.tick_params(length=0)


def _title(axes: Axes, title: str, positions: range, T: int) -> None:
    if len(positions) < T:
        title += f", positions {positions.start} to {positions.stop - 1}"
    axes.set_title(title, fontsize=13, fontweight="bold", loc="left")


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _outline(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=OUTLINE, linewidth=1.8, zorder=3))


def _cut(label: str) -> str:
    return drawable(label, _LONGEST_LABEL)


def _percent(p: float) -> str:
    return f"{p:.0%}" if p >= 0.1 else f"{p:.1%}" if p >= 0.0005 else "<0.05%"


def _ordinal(n: int) -> str:
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
