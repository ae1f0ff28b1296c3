"""Files that may be compressed, with gzip or zstd, and what goes wrong while one is read."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt.checks import first_line
from jaxgpt.errors import DataError, require

# Bytes that are read at once, and may be looked at in advance.
BUFFER = 2**16


def unpacked(path: str | Path, raw: Any, stack: contextlib.ExitStack) -> Any:
    """The file, or what it unpacks to if it is compressed."""
    head = raw.peek(4)
    if head.startswith(b"\x1f\x8b"):
        return stack.enter_context(gzip.GzipFile(fileobj=raw))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        if sys.version_info >= (3, 14):
            from compression import zstd

            return stack.enter_context(zstd.ZstdFile(raw))
        zstandard = require("zstandard", "data", f"{path}, which is compressed with zstd,")
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(stack.enter_context(reader), BUFFER)
    return raw


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Raises what goes wrong while a file is read or unpacked as a DataError."""
    try:
        yield
    except (DataError, ImportError):
        raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged: gzip cannot unpack it: {first_line(error)}") from None
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise DataError(f"{path}: damaged: zstd cannot unpack it: {first_line(error)}") from None
