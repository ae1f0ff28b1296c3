"""Checks values of any type, and formats them for error messages.

NumPy is imported only where ids are checked, because importing it would take most of the time of
`jaxgpt train --help`.
"""

from __future__ import annotations

import datetime
import difflib
import math
import numbers
import operator
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np


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


def whole_number(name: str, value: Any) -> int:
    """Returns the value as an int; raises a ValueError unless it is an integer of 0 or more."""
    import numpy as np

    try:
        number = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of 0 or more, not {short_repr(value)}")
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


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, with its middle cut if it is long: it may quote a whole
    file."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}"
