"""Describes a model or its parameters by names, shapes and types: what `print(params)` would bury under numbers."""

from __future__ import annotations

import dataclasses
import html
import io
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.accounting import MIB
from jaxgpt.checks import short_repr
from jaxgpt.model import GPT, leaves


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter, or the same one of several blocks.

    Attributes:
        path: its path in the tree; the blocks' number is a range such as "0-11".
        shape: of one array.
        dtype: its type.
        count: how many such arrays there are.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    count: int = 1

    @property
    def parameters(self) -> int:
        """Elements of all of them."""
        return self.count * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.parameters * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What `describe` returns. It prints as a table, and shows as one in a notebook.

    Attributes:
        title: what is described.
        rows: the parameters, in the order of the tree.
    """

    title: str
    rows: tuple[Leaf, ...]

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(row.parameters for row in self.rows)

    @property
    def nbytes(self) -> int:
        """The memory they take."""
        return sum(row.nbytes for row in self.rows)

    def __repr__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        header, *rows = self._cells()
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(name, justify="left" if name == "parameter" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console = Console(file=io.StringIO(), width=120, highlight=False)
        with console.capture() as capture:
            console.print(self.title, markup=False)
            console.print(table)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()

    def _repr_html_(self) -> str:
        lines = [
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, row in zip(["th", *["td"] * len(self.rows), "th"], self._cells(), strict=True)
        ]
        return f"<table><caption>{html.escape(self.title)}</caption>{''.join(lines)}</table>"

    def _cells(self) -> list[tuple[str, ...]]:
        """The table's header, rows and total."""
        rows = [
            (
                row.path,
                (f"{row.count} x " if row.count > 1 else "") + "[" + ", ".join(f"{n:,}" for n in row.shape) + "]",
                row.dtype,
                f"{row.parameters:,}",
                f"{row.nbytes / MIB:,.2f}",
            )
            for row in self.rows
        ]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.nbytes / MIB:,.2f}")
        return [("parameter", "shape", "dtype", "elements", "MiB"), *rows, total]


def describe(model_or_params: Any) -> Description:
    """Names, shapes, types and sizes of a model's parameters; those of equal blocks are one row.

    Args:
        model_or_params: a `GPT`, of which no array is made, or a tree of parameters, such as those from `jaxgpt.load`.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(model_or_params, GPT):
        model = model_or_params
        # Stacked, because tracing one block is quicker than tracing all of them.
        stacked = GPT(model.config, model.compute.replace(scan_layers=True))
        shapes = jax.eval_shape(stacked.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
        config, title = model.config, "GPT"
        sizes = ("n_layers", "emb_dim", "n_heads", "ffn_dim", "context_length", "vocab_size")
        title += ": " + ", ".join(f"{name} {getattr(config, name):,}" for name in sizes)
        rows = [
            Leaf(
                f"{_blocks(config.n_layers)}/{leaf.path.partition('/')[2]}", leaf.shape[1:], leaf.dtype, config.n_layers
            )
            if leaf.path.startswith("trf_blocks/")
            else leaf
            for leaf in _leaves(shapes)
        ]
        return Description(title, tuple(rows))
    if not isinstance(model_or_params, Mapping) or not all(
        hasattr(leaf, "dtype") for leaf in leaves(model_or_params).values()
    ):
        raise TypeError(f"describe takes a model or its parameters, not {short_repr(model_or_params)}")
    merged: dict[tuple[str, Any, str], list[Leaf]] = {}
    for leaf in _leaves(model_or_params):
        merged.setdefault((re.sub(r"^trf_blocks_\d+/", "\0", leaf.path), leaf.shape, leaf.dtype), []).append(leaf)
    rows = [
        leaf
        if len(same) == 1
        else Leaf(leaf.path.replace("trf_blocks_0", _blocks(len(same))), leaf.shape, leaf.dtype, len(same))
        for same in merged.values()
        for leaf in same[:1]
    ]
    return Description("parameters", tuple(rows))


def _leaves(tree: Any) -> list[Leaf]:
    return [Leaf(path, tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves(tree).items()]


def _blocks(n_layers: int) -> str:
    return f"trf_blocks_0-{n_layers - 1}" if n_layers > 1 else "trf_blocks_0"
