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
        there = format_bytes(capacity(sharding.default_device()))
        raise OutOfMemoryError(f"{first_line(error)} (there are {there}): {advice}") from None


def check_memory(program: Any, advice: str) -> None:
    """Raises OutOfMemoryError if a compiled program needs more than its device has. A CPU's system may promise more
    memory than it has, and then kill the process that uses it."""
    size = program.memory_analysis()
    if size is None:  # not every backend knows
        return
    check_bytes(
        size.temp_size_in_bytes + size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes,
        advice,
        program.input_shardings,
    )


def check_bytes(needed: float, advice: str, where: Any = None) -> None:
    """Raises OutOfMemoryError with this advice if so many bytes are more than a device has: that of `where`, a tree of
    arrays or shardings, or else the default one."""
    if needed > (there := capacity(_device(where))):
        raise OutOfMemoryError(
            f"{format_bytes(needed)} are needed at once, and there are {format_bytes(there)}: {advice}"
        )


def _device(where: Any) -> Any:
    layouts = (getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(where))
    layout = next((layout for layout in layouts if isinstance(layout, jax.sharding.Sharding)), None)
    return sharding.default_device() if layout is None else next(iter(layout.addressable_devices))


def capacity(device: Any) -> int:
    """Bytes of memory of a device; on a CPU, of the machine or, if that is less, of its container."""
    stats: dict[str, int] = {}
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # not every backend knows
        stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


# A container's memory limit as Linux shows it inside of the container: cgroups of version 2 and of version 1.
LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _limits() -> Iterator[int]:
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            yield int(path.read_text(encoding="ascii"))
