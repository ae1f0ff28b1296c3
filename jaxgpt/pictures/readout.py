"""What a picture on the page tells about the place under the pointer: the grid of its cells, and a text or number each.

A picture holds one table of cells, or several of one shape (a map per head). Positions and sizes are fractions of the
picture, from its top left, so that they hold at any size. Of several figures, each readout is made when it is asked
for, once its figure has been laid out.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxgpt.interpret import Inside, place_name


@dataclasses.dataclass(frozen=True)
class Readout:
    """What the page's script needs to tell about a cell, as plain values.

    Attributes:
        tiles: the name, the left and the top of each table; a single table has no name.
        width, height: of one table.
        rows, columns: their names.
        texts: what each cell says, table by table and row by row, if all are texts.
        weights: or, for maps in which no row sees a later column, base64 of each table's rows up to the diagonal, as
            little-endian 16-bit numbers from 0 to 65,535 for 0 to 1.
    """

    tiles: Sequence[tuple[str, float, float]]
    width: float
    height: float
    rows: Sequence[str]
    columns: Sequence[str]
    texts: Sequence[str] = ()
    weights: str = ""


def attention(figure: Figure, inside: Inside, layer: int, labels: Sequence[str]) -> Readout:
    """Of the figure that `reading.attention` draws, once its layout is fixed."""
    weights_HxTxT = inside.attention_LxHxTxT[layer]
    H, T = weights_HxTxT.shape[:2]
    (axes, *_), gap = figure.axes, max(1, round(0.09 * T))
    across = (_drawn(axes).shape[1] + gap) // (T + gap)
    tiles = []
    for head in range(H):
        row, column = divmod(head, across)
        x, y, width, height = _place(figure, axes, column * (T + gap), row * (T + gap), T, T)
        tiles.append((f"head {head}", x, y))
    below = np.tril_indices(T)
    quantised = np.rint(65535 * weights_HxTxT[:, below[0], below[1]]).astype("<u2")
    rows = [f"from {t} {label}" for t, label in enumerate(labels)]
    columns = [f"to {t} {label}" for t, label in enumerate(labels)]
    return Readout(tiles, width, height, rows, columns, weights=base64.b64encode(quantised.tobytes()).decode())


def next_tokens(figures: Sequence[Figure], inside: Inside, labels: Sequence[str], top_labels: Any) -> Iterator[Readout]:
    """Of the figures that `reading.next_tokens` draws, each with the positions that follow those of the one before."""
    start = 0
    for figure in figures:
        R, K = _drawn(figure.axes[0]).shape
        texts = [
            f"{top_labels[-1][t][k]} {percent(inside.top_probabilities_NxTxK[-1, t, k])}"
            for t in range(start, start + R)
            for k in range(K)
        ]
        rows = [f"after {t} {labels[t]}" for t in range(start, start + R)]
        yield _table(figure, rows, [f"no. {k + 1}" for k in range(K)], texts)
        start += R


def comparison(
    figures: Sequence[Figure],
    names: Sequence[str],
    insides: Sequence[Inside],
    labels: Sequence[str],
    top_labels: Sequence[Any],
) -> Iterator[Readout]:
    """Of the figures that `reading.comparison` draws. Each cell also tells what its model thinks of what came."""
    start, T = 0, len(labels)
    for figure in figures:
        tiles, texts = [], []
        for axes, name, inside, tops in zip(figure.axes[:2], names, insides, top_labels, strict=True):
            R, K = _drawn(axes).shape
            x, y, width, height = _place(figure, axes, 0, 0, K, R)
            tiles.append((name, x, y))
            for t in range(start, start + R):
                came = f"; {labels[t + 1]} came: {percent(inside.true_probabilities_NxS[-1, t])}" if t + 1 < T else ""
                texts += [
                    f"{tops[-1][t][k]} {percent(inside.top_probabilities_NxTxK[-1, t, k])}{came}" for k in range(K)
                ]
        rows = [f"after {t} {labels[t]}" for t in range(start, start + R)]
        yield Readout(tiles, width, height, rows, [f"no. {k + 1}" for k in range(K)], texts=texts)
        start += R


def lens(figures: Sequence[Figure], inside: Inside, labels: Sequence[str], top_labels: Any) -> Iterator[Readout]:
    """Of the figures that `reading.lens` draws: the likeliest tokens at each place, from the top row down."""
    start = 0
    K = inside.top_ids_NxTxK.shape[2]
    for figure in figures:
        N, C = _drawn(figure.axes[0]).shape
        texts = [
            ", ".join(f"{top_labels[n][t][k]} {percent(inside.top_probabilities_NxTxK[n, t, k])}" for k in range(K))
            for n in reversed(range(N))
            for t in range(start, start + C)
        ]
        columns = [f"having read {t} {labels[t]}" for t in range(start, start + C)]
        yield _table(figure, [place_name(n, N) for n in reversed(range(N))], columns, texts)
        start += C


def percent(p: float) -> str:
    """A probability to a hundredth of a per cent; the page's script writes weights in the same way."""
    return f"{p:.2%}" if p >= 0.00005 or p == 0 else "<0.01%"


def _table(figure: Figure, rows: Sequence[str], columns: Sequence[str], texts: Sequence[str]) -> Readout:
    x, y, width, height = _place(figure, figure.axes[0], 0, 0, len(columns), len(rows))
    return Readout([("", x, y)], width, height, rows, columns, texts=texts)


def _drawn(axes: Axes) -> Any:
    return axes.images[0].get_array()


def _place(figure: Figure, axes: Axes, left: int, top: int, columns: int, rows: int) -> tuple[float, ...]:
    """Where a block of an image's cells lies in the figure: (left, top, width, height). An image whose rows go upwards
    is drawn whole, so that its block is the same either way."""
    corners = axes.transData.transform([(left - 0.5, top - 0.5), (left + columns - 0.5, top + rows - 0.5)])
    (x0, y0), (x1, y1) = np.sort(corners / figure.bbox.size, axis=0)
    return tuple(round(float(part), 5) for part in (x0, 1 - y1, x1 - x0, y1 - y0))
