"""Tables that map our parameters to the tensors of an outside layout, and reading and writing by such a table.

All paths here are those of the tree with stacked blocks (`trf_blocks/att/qkv/weight` [L, 3, D, D]), because the
shapes of that tree follow from a config without tracing L blocks.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxgpt import accounting
from jaxgpt.checks import short_repr
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.errors import CheckpointError
from jaxgpt.model import GPT, leaves
from jaxgpt.parallel import check_bytes
from jaxgpt.weights.tensors import FLOATS, Tensor

BLOCKS = "trf_blocks/"
_LISTED = 20


class Row(NamedTuple):
    """One line of a layout's table.

    Attributes:
        ours: path in the stacked tree.
        theirs: the outside name, with "{i}" for the layer; or several names, for the parts along our first axis.
        form: layout of the outside tensor: "same" as ours (the default); "flat", all axes merged into one; "rows",
            [out, in] with our output axes merged; "columns", [in, out] likewise.
        padding: number of rows at the end of the outside tensor that we do not have.
    """

    ours: str
    theirs: str | tuple[str, ...]
    form: str = "same"
    padding: int = 0


class Entry(NamedTuple):
    """One of our arrays (per layer, if it belongs to a block) and the outside names of its parts."""

    row: Row
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]

    @property
    def path(self) -> str:
        """Its path in the unstacked tree."""
        return self.row.ours if self.layer is None else self.row.ours.replace(BLOCKS, f"trf_blocks_{self.layer}/")

    @property
    def outside_shape(self) -> tuple[int, ...]:
        """The shape of each outside tensor that it is read from."""
        shape = self.shape[1:] if len(self.names) > 1 else self.shape
        if self.row.form == "flat":
            return (math.prod(shape),)
        if self.row.form in ("rows", "columns"):
            shape = (math.prod(shape[:-1]), shape[-1])
        shape = (shape[0] + self.row.padding, *shape[1:])
        return shape[::-1] if self.row.form == "columns" else shape

    def inward(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        """Reads our array from the outside tensors."""
        parts = [tensors[name].read() for name in self.names]
        if len(parts) > 1:
            return np.stack(parts)
        part = parts[0].T if self.row.form == "columns" else parts[0]
        return part[: len(part) - self.row.padding].reshape(self.shape)

    def outward(self, array: np.ndarray) -> np.ndarray:
        """Converts our array to the one outside tensor that holds it."""
        shape = self.outside_shape
        return array.reshape(shape[::-1]).T if self.row.form == "columns" else array.reshape(shape)


@dataclass(frozen=True)
class Checkpoint:
    """What a format found at a path, with the tensors not read yet.

    Attributes:
        path: the file or directory.
        config: the model's config.
        rows: the format's table.
        tensors: opens the files and returns their tensors by name.
        skip: regular expression for names that are known and are not parameters.
        tied: (head, embedding): the names of both. A file of a tied model may hold either name, or both if equal.
        compute: how to run the model unless the caller says otherwise; its `param_dtype` is the file's.
        tokenizer: the name of the tokenizer, if the format stores one. `formats.py` looks for the tokenizer's files.
    """

    path: Path
    config: GPTConfig
    rows: tuple[Row, ...]
    tensors: Callable[[], dict[str, Tensor]]
    skip: str = r"(?!)"
    tied: tuple[str, str] | None = None
    compute: ComputeConfig = ComputeConfig()
    tokenizer: str | None = None


@functools.lru_cache(maxsize=64)
def abstract_leaves(config: GPTConfig, param_dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by path, with the blocks stacked, sorted by path. Follows from the config:
    tracing `GPT.init` instead would make every command that loads a model start a quarter of a second later."""
    abstract: dict[str, jax.ShapeDtypeStruct] = {}
    for path, shape in accounting.parameter_shapes(config.replace(n_layers=1)).items():
        if path.startswith("trf_blocks_0/"):
            path, shape = path.replace("trf_blocks_0/", BLOCKS), (config.n_layers, *shape)
        if param_dtype != "int8":
            abstract[path] = jax.ShapeDtypeStruct(shape, jnp.dtype(param_dtype))
        elif path.endswith("/weight"):
            abstract[path] = jax.ShapeDtypeStruct(shape, jnp.int8)
            abstract[f"{path}_scale"] = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        else:
            abstract[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return dict(sorted(abstract.items()))


def entries(config: GPTConfig, param_dtype: str, rows: tuple[Row, ...]) -> Iterator[Entry]:
    """Yields every array of a model that a table maps, leaf by leaf, and layer by layer within a leaf."""
    abstract = abstract_leaves(config, param_dtype)
    for row in rows:
        if row.ours not in abstract:
            continue  # a bias or a head that this config does not have
        stacked = row.ours.startswith(BLOCKS)
        names = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
        for i in range(config.n_layers) if stacked else [None]:
            leaf = abstract[row.ours]
            shape = leaf.shape[1:] if stacked else leaf.shape
            yield Entry(row, i, shape, leaf.dtype.name, tuple(name.format(i=i) for name in names))


def read_params(
    checkpoint: Checkpoint, config: GPTConfig, compute: ComputeConfig, check_finite: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint's parameters for a model of `config`, in the layout and `param_dtype` that `compute` asks for.
    With a shorter context than the checkpoint's, the position embeddings beyond it are left out.

    In addition to the result, memory holds one leaf at a time.

    Raises:
        CheckpointError: listing every tensor that is missing, unexpected, of the wrong shape or not of a
            floating-point type; if the tied head differs from the embedding; or, with `check_finite`, naming every
            parameter that holds NaN or infinite values.
        OutOfMemoryError: if the parameters alone need more memory than there is.
    """
    tensors = {name: tensor for name, tensor in checkpoint.tensors().items() if not re.fullmatch(checkpoint.skip, name)}
    rows, tied = checkpoint.rows, checkpoint.tied if config.tie_embeddings else None
    cropped = checkpoint.config.context_length - config.context_length
    rows = tuple(
        row._replace(padding=row.padding + cropped) if row.ours.startswith("pos_emb/") else row for row in rows
    )
    if tied and tied[0] in tensors and tied[1] not in tensors:
        # What stores shared tensors once, as safetensors' save_model does, may keep the head's name.
        rows = tuple(row._replace(theirs=tied[0]) if row.theirs == tied[1] else row for row in rows)
    both = tied if tied and tied[0] in tensors and tied[1] in tensors else None
    table = list(entries(config, compute.param_dtype, rows))
    outside = [(name, entry) for entry in table for name in entry.names]
    expected = {name: entry.outside_shape for name, entry in outside}
    quantised = {name for name, entry in outside if entry.dtype == "int8"}
    if both:
        expected[both[0]] = expected[both[1]]
    check_tensors(checkpoint.path, expected, tensors, quantised)
    if both:
        _check_tied(checkpoint.path, tensors, *both)
        del tensors[both[0]]
    check_bytes(
        accounting.parameter_bytes(config, compute.param_dtype),
        "choose a param_dtype of fewer bytes (--dtype bfloat16 or int8), or spread the model over a mesh",
    )

    damaged = []
    params: dict[str, jax.Array] = {}
    for ours, group in itertools.groupby(table, key=lambda entry: entry.row.ours):
        stacked = compute.scan_layers and ours.startswith(BLOCKS)
        # A leaf of the result holds the entries of all layers, or one entry.
        for parts in [list(group)] if stacked else [[entry] for entry in group]:
            shape = (len(parts), *parts[0].shape) if stacked else parts[0].shape
            leaf = _adoptable(shape, parts[0].dtype)
            for entry, array in zip(parts, leaf if stacked else [leaf], strict=True):
                array[...] = entry.inward(tensors)
                for name in entry.names:
                    del tensors[name]  # what an old file of PyTorch held in memory is freed as it is read
                if check_finite and (bad := array.size - int(np.count_nonzero(np.isfinite(array)))):
                    damaged.append(f"{entry.path} ({bad} of {array.size})")
            # Wait, so that the host's array, unless adopted, is freed before the next one is read.
            params[ours if stacked else parts[0].path] = jax.block_until_ready(jax.device_put(leaf))
    if damaged:
        raise CheckpointError(checkpoint.path, "values that are NaN or infinite in" + _listing("parameters", damaged))
    return unflatten_dict(params, sep="/")


def _adoptable(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array aligned to 64 bytes, which JAX on a CPU adopts instead of copying."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


def _check_tied(path: Path, tensors: Mapping[str, Tensor], head: str, embedding: str) -> None:
    one, other = tensors[head], tensors[embedding]
    # Compare bytes, because a NaN must equal itself here; the dtypes must agree too.
    if one.dtype != other.dtype or not np.array_equal(_bytes(one.read()), _bytes(other.read())):
        raise CheckpointError(
            path,
            f"the config ties the output head to the embedding, but {head!r} differs from {embedding!r}: "
            "pass tie_embeddings=False to load both",
        )


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def outside_tensors(
    path: Path, model: GPT, params: Any, rows: tuple[Row, ...], outside: GPTConfig
) -> dict[str, Tensor]:
    """Converts a model's parameters to the tensors in which a layout stores a model of config `outside`.

    Arrays that `outside` has and the model lacks become zeros. Biases are the only such arrays in use.

    Raises:
        CheckpointError: listing every difference, if `params` are not the model's.
    """
    found = {
        name: Tensor(np.shape(leaf), str(leaf.dtype), functools.partial(np.asarray, leaf))
        for name, leaf in leaves(params).items()
    }
    config, scanned, dtype = model.config, model.compute.scan_layers, model.compute.param_dtype
    unstacked = {entry.path: entry.shape for entry in entries(config, dtype, identity_rows(config, dtype))}
    stacked = {ours: leaf.shape for ours, leaf in abstract_leaves(config, dtype).items()}
    quantised = {name for name in found if dtype == "int8" and name.endswith("/weight")}
    check_tensors(path, stacked if scanned else unstacked, found, quantised)

    def outward(entry: Entry) -> Tensor:
        if entry.path not in unstacked:
            return Tensor(entry.outside_shape, dtype, lambda: np.zeros(entry.outside_shape, jnp.dtype(dtype)))
        leaf = found[entry.row.ours if scanned else entry.path]
        layer = entry.layer if scanned and entry.layer is not None else ...
        return Tensor(entry.outside_shape, leaf.dtype, lambda: entry.outward(leaf.read()[layer]))

    return {entry.names[0]: outward(entry) for entry in entries(outside, dtype, rows)}


@functools.lru_cache(maxsize=64)
def identity_rows(config: GPTConfig, param_dtype: str) -> tuple[Row, ...]:
    """The table of this project's format: paths as names, one array per layer."""
    paths = abstract_leaves(config, param_dtype)
    return tuple(Row(path, path.replace(BLOCKS, "trf_blocks_{i}/")) for path in paths)


def check_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], quantised: Set[str] = frozenset()
) -> None:
    """Raises one CheckpointError that lists every tensor that is missing, unexpected or of the wrong shape or dtype.
    Tensors named in `quantised` must be int8, and all others of a floating-point type."""
    both = [name for name in expected if name in found]
    problems = {
        "missing": [repr(name) for name in expected if name not in found],
        "unexpected": [repr(name[:100]) for name in found if name not in expected],
        "of the wrong shape": [
            f"{name!r} is {short_repr(list(found[name].shape))} and should be {list(expected[name])}"
            for name in both
            if found[name].shape != expected[name]
        ],
        "not of a floating-point type": [
            f"{name!r} is {found[name].dtype}"
            for name in both
            if name not in quantised and found[name].dtype not in FLOATS
        ],
        "not int8": [
            f"{name!r} is {found[name].dtype}" for name in both if name in quantised and found[name].dtype != "int8"
        ],
    }
    text = "".join(_listing(kind, items) for kind, items in problems.items() if items)
    if text:
        raise CheckpointError(path, "the tensors are not those of the configured model" + text)


def _listing(kind: str, items: list[str]) -> str:
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"\n  {len(items)} {kind}: {', '.join(items[:_LISTED])}{more}"
