"""What the `jaxgpt` command sets up in its process before JAX starts. A Python program that wants the same calls
`configure()` before it imports jax; `import jaxgpt` alone changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import stat
import sys
import warnings
from pathlib import Path

# Set to 0 to compile everything anew in each process.
CACHE_VARIABLE = "JAXGPT_COMPILE_CACHE"
CACHE_BYTES = 2**30


def configure() -> None:
    """Both of the functions below."""
    use_compile_cache()
    keep_freed_memory()


def use_compile_cache() -> None:
    """Lets JAX keep what it compiles, in the user's cache directory, for the next process.

    Does nothing if JAX_COMPILATION_CACHE_DIR is set, which then decides; if JAXGPT_COMPILE_CACHE is 0; or, with a
    warning, if the directory cannot be made or others could write to it: what is in there is executed.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or os.environ.get(CACHE_VARIABLE) == "0":
        return
    try:
        directory = private_directory("xla")
        _prune(directory)
    except (OSError, RuntimeError) as error:  # a RuntimeError if there is no home
        warnings.warn(f"no compile cache: {error}. {CACHE_VARIABLE}=0 switches it off.", stacklevel=2)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def cache_directory(name: str) -> Path:
    """Where in the user's cache code belongs that was made for this kind of processor.

    Raises:
        RuntimeError: if there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "jaxgpt" / f"{name}-{_processor()}"


def private_directory(name: str) -> Path:
    """`cache_directory`, made.

    Raises:
        OSError: if it cannot be made, or if others could write to it: what is in there is executed.
        RuntimeError: if there is no home.
    """
    directory = cache_directory(name)
    directory.parent.parent.mkdir(parents=True, exist_ok=True)
    for made in (directory.parent, directory):
        made.mkdir(mode=0o700, exist_ok=True)
        check_private(made)
    return directory


@functools.cache
def _processor() -> str:
    """A name for the kind of processor: what was compiled for one may not run on another, and homes are shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    text = "\n".join([platform.machine(), platform.processor(), *known])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_private(directory: Path) -> None:
    """Raises PermissionError if others than the user can write to it."""
    status = directory.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"others can write to {directory}, or it is another user's")


def _prune(directory: Path) -> None:
    """Removes the oldest entries of a cache that has grown past `CACHE_BYTES`, down to half of that.

    JAX's own bound, `jax_compilation_cache_max_size`, will not do (0.10.2): it needs the package filelock, reads the
    time of every entry at each write, and after a process killed between an entry and its time no write succeeds.
    """
    entries = []
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
            status = entry.stat()
            entries.append((status.st_mtime, status.st_size, entry))
    entries.sort(key=lambda item: item[0])
    excess = sum(size for _, size, _ in entries)
    if excess <= CACHE_BYTES:
        return
    for _, size, entry in entries:
        if excess <= CACHE_BYTES // 2:
            return
        entry.unlink(missing_ok=True)
        excess -= size


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep large blocks that were freed, instead of handing each back to the system.

    XLA on CPU allocates the results of every call anew. Fetching those pages from the system each time, zeroed, took
    a third of a forward pass over [4, 1024] ids of GPT-2 small, whose logits are 0.8 GB. The price is that the
    process stays as large as it ever was. Elsewhere than on Linux with glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mmap_max, trim_threshold = -4, -1  # names in glibc's malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never
