"""The errors this package raises on purpose. Bad input is always a ValueError, so one `except` catches it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the known word nearest to `word`, or ''."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


class TrainingError(RuntimeError):
    """A run that cannot go on. What it had saved is good."""


class KernelError(RuntimeError):
    """The kernel of `jaxgpt.native` cannot be built."""
