"""The errors this package raises on purpose. Bad input is always a ValueError, so one `except` catches it."""

from __future__ import annotations

import importlib
from pathlib import Path, PurePath
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the field."""


class CheckpointError(ValueError):
    """A file or directory that cannot be read as (or written as) a checkpoint.

    Attributes:
        path: the file or directory that was refused.
        reason: what was expected, what was found, and what to do.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path if isinstance(path, PurePath) else Path(path)  # in a bucket, it is no `Path`
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.path, self.reason)


class DataError(ValueError):
    """A text, a token file or the files of a tokenizer that cannot be used."""


class MissingExtraError(ImportError):
    """An optional dependency is not installed. The message names the extra that installs it."""

    def __init__(self, module: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {module!r}: pip install 'jaxgpt[{extra}]'")
        self._arguments = module, extra, purpose

    def __reduce__(self):
        return type(self), self._arguments


class TrainingError(RuntimeError):
    """A training run that cannot continue. The checkpoints it has saved are good."""


class OutOfMemoryError(MemoryError):
    """What was asked for needs more memory than there is. The message says how much, and what would need less."""


class KernelError(RuntimeError):
    """The kernel of `jaxgpt.cpu.kernel` cannot be built."""


def require(module: str, extra: str, purpose: str) -> Any:
    """Imports an optional dependency.

    Raises:
        MissingExtraError: if it is not installed.
        ImportError: the module's own, if it is installed but cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a dependency of the module is missing
        raise MissingExtraError(module, extra, purpose) from None
