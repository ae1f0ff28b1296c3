"""Process settings that the `jaxgpt` command makes before JAX starts. To get the same in a Python program, call
`configure()` before importing jax; `import jaxgpt` alone changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import site
import stat
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxgpt.checks import did_you_mean, first_line

# Environment variable; set to 0 to compile everything again in each process.
CACHE_VARIABLE = "JAXGPT_COMPILE_CACHE"
CACHE_BYTES = 2**30


def configure() -> None:
    """Calls both `use_compile_cache` and `keep_freed_memory`."""
    use_compile_cache()
    keep_freed_memory()


def child_environment(**settings: str) -> dict[str, str]:
    """The environment for a child that runs a module of this package, with these settings: it finds the package even if
    only the way this process was started made it importable."""
    environment, root = os.environ | settings, str(Path(__file__).parents[1])
    # Where packages are installed it is found anyway, and PYTHONPATH would come before the standard library.
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    return environment


# By platform, as JAX_PLATFORMS names it: the modules of which one brings it to JAX, and how to install it. JAX also
# takes "gpu", for whichever kind there is.
_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin"), "pip install 'jaxgpt[cuda]', or 'jax[cuda12]' for older drivers"
_PLATFORMS = {"cuda": _CUDA, "gpu": _CUDA, "tpu": (("libtpu",), "pip install 'jaxgpt[tpu]'")}


def missing_platform() -> str:
    """What to do if JAX_PLATFORMS asks for a platform that cannot be used; '' otherwise. To be asked after an error:
    those that JAX raises for it may be AssertionErrors without a word."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if not asked or "jax" not in sys.modules:
        return ""
    try:
        sys.modules["jax"].devices()
        return ""
    except (RuntimeError, AssertionError) as error:
        installed = [
            "cpu",
            *(n for n, (modules, _) in _PLATFORMS.items() if any(map(importlib.util.find_spec, modules))),
        ]
        return _platform_advice(asked, installed, error)


def _platform_advice(asked: str, installed: Sequence[str], error: Exception) -> str:
    """One line, the finding and the advice separated by ". ": an installed platform may lack its device or driver."""
    there = ", ".join(name for name in installed if name != "gpu")
    absent = [name for name in asked.split(",") if name not in installed]
    if not absent:
        return (
            f"JAX_PLATFORMS={asked}, and JAX cannot use that here ({first_line(error)}); installed: {there}. Unset "
            "JAX_PLATFORMS, or look for the device and its driver"
        )
    name = absent[0]
    then = f", or install it: {_PLATFORMS[name][1]}" if name in _PLATFORMS else did_you_mean(name, ("cpu", *_PLATFORMS))
    return f"JAX_PLATFORMS={asked}, and this JAX has no {name!r}; installed: {there}. Unset JAX_PLATFORMS{then}"


def use_compile_cache() -> None:
    """Makes JAX store what it compiles in the user's cache directory, for the next process.

    Does nothing if JAX_COMPILATION_CACHE_DIR is set, which then takes precedence; if JAXGPT_COMPILE_CACHE is 0; or,
    with a warning, if the directory cannot be created or others could write to it: its content is executed.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or os.environ.get(CACHE_VARIABLE) == "0":
        return
    try:
        directory = private_directory("xla")
        _prune(directory)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        warnings.warn(f"no compile cache: {error}. {CACHE_VARIABLE}=0 switches it off.", stacklevel=2)
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def cache_directory(name: str) -> Path:
    """The directory in the user's cache for code compiled for this type of processor.

    Raises:
        RuntimeError: if there is no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "jaxgpt" / f"{name}-{_processor()}"


def private_directory(name: str) -> Path:
    """Creates `cache_directory` and returns it.

    Raises:
        OSError: if it cannot be created, or if others could write to it: its content is executed.
        RuntimeError: if there is no home directory.
    """
    directory = cache_directory(name)
    directory.parent.parent.mkdir(parents=True, exist_ok=True)
    for made in (directory.parent, directory):
        made.mkdir(mode=0o700, exist_ok=True)
        check_private(made)
    return directory


@functools.cache
def _processor() -> str:
    """A name for the type of processor: code compiled for one may not run on another, and machines share homes."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    text = "\n".join([platform.machine(), platform.processor(), *known])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_private(directory: Path) -> None:
    """Raises PermissionError if anyone but the user can write to `directory`."""
    status = directory.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"others can write to {directory}, or it is another user's")


def _prune(directory: Path) -> None:
    """If a cache has grown past `CACHE_BYTES`, removes its oldest entries until it is half that size.

    JAX's own limit, `jax_compilation_cache_max_size`, is not usable (0.10.2): it needs the package filelock, reads the
    timestamp of every entry on each write, and if a process is killed between writing an entry and its timestamp, no
    later write succeeds.
    """
    entries = []
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may be pruning too
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
    """Makes glibc's allocator keep large freed blocks, instead of returning each to the system.

    On a CPU, XLA allocates new memory for the results of every call. Getting those pages, zeroed, from the system
    took a third of a forward pass of GPT-2 small over [4, 1024] ids, whose logits are 0.8 GB. The price is that the
    process never shrinks below its peak size. Blocks above 64 MiB that XLA allocates in threads of its own, such as a
    training step's temporaries, still come from the system each time (docs/tried.md says what keeping them costs).
    Does nothing except on Linux with glibc.
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
