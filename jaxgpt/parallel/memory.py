"""Errors about memory, in one line: what was needed, what there is, and what would need less."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxgpt.accounting import format_bytes
from jaxgpt.checks import first_line
from jaxgpt.errors import OutOfMemoryError
from jaxgpt.parallel import sharding


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
        raise OutOfMemoryError(f"{first_line(error)} (there are {format_bytes(capacity())}): {advice}") from None


def check_memory(program: Any, advice: str) -> None:
    """Raises OutOfMemoryError if a compiled program needs more than the device has. A CPU's system may promise more
    memory than it has, and then kill the process that uses it."""
    size = program.memory_analysis()
    check_bytes(
        size.temp_size_in_bytes + size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes,
        advice,
    )


def check_bytes(needed: float, advice: str) -> None:
    """Raises OutOfMemoryError with this advice if so many bytes are more than the device has."""
    if needed > (there := capacity()):
        raise OutOfMemoryError(
            f"{format_bytes(needed)} are needed at once, and there are {format_bytes(there)}: {advice}"
        )


def capacity() -> int:
    """Bytes of memory of the default device; on a CPU, of the machine or, if that is less, of its container."""
    stats = sharding.default_device().memory_stats() or {}
    return stats.get("bytes_limit") or min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


# A container's memory limit as Linux shows it inside of the container: cgroups of version 2 and of version 1.
LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _limits() -> Iterator[int]:
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            yield int(path.read_text(encoding="ascii"))
