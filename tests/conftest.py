"""Fixtures shared by all test modules."""

from __future__ import annotations

import ctypes
import os

import jax
import pytest
from helpers import TINY, make_model
from hypothesis import HealthCheck, settings

from jaxgpt.cpu import kernel, sequences

# A kernel that the developer has built must not affect the tests. Those that use one build it themselves: `built`.
os.environ["JAXGPT_KERNEL"] = "0"
# Simulated devices for tests/test_sharding.py; all other tests use the first one.
jax.config.update("jax_num_cpu_devices", 8)
# No implicit promotion: users may forbid it, and it hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Every run uses the same examples, whatever failed before. There are no deadlines, so a busy machine fails no test.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Lets tests reuse what others have compiled, within this session: XLA takes most of the tests' time."""
    base = tmp_path_factory.getbasetemp()
    jax.config.update("jax_compilation_cache_dir", str(base / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def compiled_quickly():
    """Halves XLA's compile time, for modules that test the code around the compiled programs. Other modules do not
    reuse what is compiled here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_quickly_by_default(request):
    """`compiled_quickly` in the default tier only: the exhaustive tier makes the same assertions on optimised
    programs."""
    if request.config.option.markexpr == "not exhaustive":
        request.getfixturevalue("compiled_quickly")


@pytest.fixture
def compiled_fully():
    """Compiles as for users: for a test that reads a compiled program in a module that uses `compiled_quickly`."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny():
    """(model, params) of the smallest configuration, with random parameters in every leaf."""
    return make_model(TINY)


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory):
    """A user's cache with the kernel in it, shared by all test processes."""
    import fcntl  # not on Windows, where no test uses this

    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernel"
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (home / "lock").open("w") as lock:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.delenv(kernel.VARIABLE)
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel.build_once()
        assert kernel.failure() is None
    return home


@pytest.fixture
def natively(built, monkeypatch, request):
    """The kernel computes whole sequences in the dtype of the test's parameters, or in float32, whatever the processor;
    by MKL if they name it. Where the processor cannot, or MKL is not installed, the test is skipped."""
    parameters = getattr(request.node, "callspec", None)
    named = "" if parameters is None else str(parameters.params)
    flags = {"GenuineIntel", "avx2", "fma"}
    monkeypatch.setattr(sequences, "_processor_flags", lambda: flags)
    if "MKL" not in named:
        monkeypatch.setattr(sequences, "_mkl", lambda: None)
        ctypes.CDLL(str(kernel.path())).JaxgptUseLibrary(None)  # an earlier test's
    for cached in (sequences.lacks, sequences.lacks_mkl):
        cached.cache_clear()
    reason = sequences.missing("bfloat16" if "bfloat16" in named else "float32")
    if reason := reason or ("MKL" in named and sequences.lacks_mkl(kernel.path())):
        pytest.skip(reason)
    monkeypatch.setattr(sequences, "lacks_mkl", lambda file: "")  # products in float32 are the kernel's without it too
    monkeypatch.setattr(sequences, "LEAST_OPERATIONS", 0)
    monkeypatch.setattr(sequences, "LEAST_ROWS", 1)
    yield
    monkeypatch.undo()
    for cached in (sequences.lacks, sequences.lacks_mkl):
        cached.cache_clear()


@pytest.fixture
def built(kernel_cache, monkeypatch):
    """The kernel is built, and `prepare` takes it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache))
    monkeypatch.delenv(kernel.VARIABLE)
