"""Errors about memory, in one line: what was needed, what there is, and what would need less."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from jaxgpt.checks import first_line
from jaxgpt.errors import OutOfMemoryError

GIB = 2**30


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turns the errors that JAX and NumPy raise for want of memory into an `OutOfMemoryError` with this advice."""
    try:
        yield
    except OutOfMemoryError:
        raise  # with better advice
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(f"{first_line(error)} (there are {capacity() / GIB:,.1f} GiB): {advice}") from None


def check_memory(program: Any, advice: str) -> None:
    """Raises OutOfMemoryError if a compiled program needs more than the device has. A CPU's system may promise more
    memory than it has, and then kill the process that uses it."""
    size = program.memory_analysis()
    needed = (
        size.temp_size_in_bytes + size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
    )
    if needed > (there := capacity()):
        raise OutOfMemoryError(
            f"{needed / GIB:,.1f} GiB are needed at once, and there are {there / GIB:,.1f}: {advice}"
        )


def capacity() -> int:
    """Bytes of memory of the default device; on a CPU, the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
