"""Checks values of any type, and formats them for error messages.

NumPy is imported only where ids are checked, because importing it would take most of the time of
`jaxgpt train --help`.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import html
import math
import numbers
import operator
import reprlib
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from jaxgpt.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")


def check_type(name: str, value: Any, kind: str) -> None:
    """Raises a ConfigError that names the field unless `value` is of type `kind`: a finite "float" (ints count too), or
    exactly an "int", "bool" or "str"."""
    if kind == "float":
        good = type(value) is int or isinstance(value, float)
        try:
            good = good and math.isfinite(value)
        except OverflowError:  # an int that no float can hold
            good = False
    else:
        good = type(value).__name__ == kind  # exact: bool is an int to isinstance
    if not good:
        raise ConfigError(f"{name} must be a{'n' if kind == 'int' else ''} {kind}, not {short_repr(value)}")


def check_ids(ids: Any, name: str, vocab_size: int) -> np.ndarray:
    """Returns `ids` as an int32 array; raises a ValueError that names the first one that is not an integer from 0 to
    `vocab_size` - 1."""
    import numpy as np

    if hasattr(ids, "dtype"):
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold integers in one dimension, not {ids.dtype} {list(ids.shape)}")
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))[:1].tolist()
    else:
        for i, value in enumerate(ids):
            if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
                raise ValueError(f"{name}[{i}] is {short_repr(value)} ({type(value).__name__}): ids are integers")
        bad = [i for i, value in enumerate(ids) if not 0 <= value < vocab_size][:1]
    if bad:
        raise ValueError(
            f"{name}[{bad[0]}] is {short_repr(ids[bad[0]])}, outside the vocabulary: 0 to {vocab_size - 1}"
        )
    return np.array(ids, np.int32)


def check_batch(ids: Any, context_length: int) -> int:
    """Returns T of a batch of ids [B, T], whose values stay unread (they may be traced).

    Raises:
        TypeError: if `ids` is no array of integers.
        ValueError: if it has another number of axes, or T is beyond the context.
    """
    shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", None)
    if shape is None or getattr(dtype, "kind", "") not in ("i", "u"):
        found = short_repr(ids) if shape is None else f"{dtype}{list(shape)}"
        raise TypeError(f"ids must be an array of integers [B, T], such as jnp.array([[464, 3797]]), not {found}")
    if len(shape) != 2:
        hint = ": ids[None] is a batch of one row" if len(shape) == 1 else ""
        raise ValueError(f"ids must have the axes [B, T], not the shape {list(shape)}{hint}")
    if shape[1] > context_length:
        raise ValueError(
            f"{shape[1]} tokens do not fit context_length={context_length}: crop them to the last {context_length}, as "
            "jaxgpt.generate does"
        )
    return shape[1]


def check_starts(starts: Any, ids: Any) -> None:
    """Raises ValueError unless `starts`, where the documents of a batch of ids start, is int32 of the same shape."""
    shape, dtype = getattr(starts, "shape", None), getattr(starts, "dtype", None)
    if shape != ids.shape or dtype != "int32":
        found = short_repr(starts) if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(f"start_BxT must have a start for each token, int32{list(ids.shape)}, not {found}")


def as_ids(ids: Any, name: str) -> np.ndarray:
    """Returns one row of ids [N] as an array of integers, whose values stay unread; an array is returned as it is.

    Raises:
        TypeError: for text, and for anything else that is no row of integers.
    """
    import numpy as np

    if isinstance(ids, (str, bytes)):
        raise TypeError(
            f"{name} must be token ids, not text: jaxgpt.get_tokenizer(model.config.tokenizer).encode(text) gives them"
        )
    try:
        array = ids if isinstance(ids, np.ndarray) else np.asarray(ids)
    except ValueError:  # a ragged list
        array = np.empty((0, 0))
    if array.shape == (0,):  # an empty list's type says nothing
        array = array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu" or not hasattr(ids, "__len__"):
        found = short_repr(ids) if not hasattr(ids, "dtype") else f"{array.dtype}{list(array.shape)}"
        raise TypeError(f"{name} must be one row of integers [N], not {found}")
    return array


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """Returns the value as an int; raises a ValueError unless it is an integer of `least` (0 or 1) or more."""
    import numpy as np

    try:
        number = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = -1
    if number < least:
        raise ValueError(f"{name} must be an integer of {least} or more, not {short_repr(value)}")
    return number


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the known word closest to `word`, or ''."""
    match = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) and len(word) < 100 else []
    return f"; did you mean {match[0]!r}?" if match else ""


class _ShortRepr(reprlib.Repr):
    """A short `repr`, in bounded time: plain `repr` never finishes for a list nested 60 deep, twice per level."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring = 2, 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out an integer of more than 4,300 digits.
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, numbers.Integral) and not isinstance(x, bool):  # NumPy's
            return self.repr_int(int(x), level)
        plain = (float, bool, type(None), datetime.date, datetime.time)
        return repr(x) if isinstance(x, plain) else f"<{type(x).__name__}>"


def short_repr(value: Any) -> str:
    """Formats a value of any type for an error message: its `repr` if that is short, otherwise part of it."""
    return _ShortRepr().repr(value)


def brief(cls: type[T]) -> type[T]:
    """A class decorator for dataclasses that hold arrays: their `repr` shows each array's type and shape, not its
    values, and in a notebook so does a table."""

    def __repr__(self: Any) -> str:
        fields = ", ".join(f"{field.name}={_summary(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{type(self).__name__}({fields})"

    def _repr_html_(self: Any) -> str:
        names = [field.name for field in dataclasses.fields(self)]
        return html_table(type(self).__name__, [(name, _summary(getattr(self, name))) for name in names])

    cls.__repr__ = __repr__  # type: ignore[assignment]
    cls._repr_html_ = _repr_html_  # type: ignore[attr-defined]
    return cls


def html_table(caption: str, rows: Iterable[tuple[str, ...]], bold: Container[str] = ()) -> str:
    """A table for a notebook; the rows whose first cell is in `bold` stand out."""
    lines = []
    for row in rows:
        tag = "th" if row[0] in bold else "td"
        cells = "".join(f'<{tag} style="text-align: left">{html.escape(cell)}</{tag}>' for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><caption>{html.escape(caption)}</caption>{''.join(lines)}</table>"


def _summary(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        arrays = list(_arrays(value))
        if len(arrays) == 1 or (arrays and len(arrays) <= 4 and isinstance(value, list)):
            return f"[{', '.join(map(_summary, arrays))}]"
        if arrays:
            return f"<{len(arrays)} arrays, {sum(math.prod(array.shape) for array in arrays):,} elements>"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value) if dataclasses.is_dataclass(value) else short_repr(value)


def _arrays(tree: Any) -> Iterator[Any]:
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    for child in children:
        yield from _arrays(child)
    if hasattr(tree, "shape"):
        yield tree


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, with its middle cut if it is long: it may quote a whole
    file."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}"
