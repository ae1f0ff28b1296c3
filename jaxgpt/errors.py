"""The errors this package raises on purpose. Bad input is always a ValueError, so one `except` catches it."""

from __future__ import annotations

import datetime
import difflib
import importlib
import numbers
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the field."""


class CheckpointError(ValueError):
    """A file or directory that cannot be read as (or written as) a checkpoint.

    Attributes:
        path: the file or directory that was refused.
        reason: what was expected, what came, what to do.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.path, self.reason)


class DataError(ValueError):
    """A text or token file that cannot be trained or evaluated on."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""

    def __init__(self, module: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {module!r}: pip install 'jaxgpt[{extra}]'")
        self._arguments = module, extra, purpose

    def __reduce__(self):
        return type(self), self._arguments


class TrainingError(RuntimeError):
    """A run that cannot go on. What it had saved is good."""


class KernelError(RuntimeError):
    """The kernel of `jaxgpt.cpu.kernel` cannot be built."""


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports an optional dependency.

    Raises:
        MissingExtraError: if it is not installed.
        ImportError: its own, if it is, and does not work.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that it needs itself
        raise MissingExtraError(module, extra, purpose) from None


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the known word nearest to `word`, or ''."""
    match = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) and len(word) < 100 else []
    return f"; did you mean {match[0]!r}?" if match else ""


class _Shown(reprlib.Repr):
    """Short, and in bounded time: a list that holds itself twice over, sixty deep, has a `repr` without end."""

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


def shown(value: Any) -> str:
    """What an error message says of a value that may be anything: its `repr` if that is short, or part of it."""
    return _Shown().repr(value)


def first_line(error: BaseException) -> str:
    """What another library's error says, which may quote a whole file: its first line, or that line's two ends."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-150:]}"
