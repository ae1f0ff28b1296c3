"""Fixtures shared by all test modules."""

from __future__ import annotations

import os

import jax
import pytest
from helpers import TINY, make_model
from hypothesis import HealthCheck, settings

# A kernel that the developer has built decides no test but those of tests/test_kernel.py.
os.environ["JAXGPT_KERNEL"] = "0"
# Simulated ones, for tests/test_sharding.py; all other tests use the first.
jax.config.update("jax_num_cpu_devices", 8)
# Nothing is widened or converted unasked: users may forbid it, and it hides mistakes.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run, whatever failed before; and no test is about time, so a busy machine decides none.
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
    """Most of the tests' time is XLA's: what one test has compiled, another may use. For this session only."""
    base = tmp_path_factory.getbasetemp()
    jax.config.update("jax_compilation_cache_dir", str(base / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def compiled_quickly():
    """For modules that test what is around the compiled programs: XLA's compiler takes half the time. What it makes
    for them is not used by others."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_quickly_by_default(request):
    """For modules whose assertions hold optimised programs too: those are what the exhaustive tier compiles."""
    if request.config.option.markexpr == "not exhaustive":
        request.getfixturevalue("compiled_quickly")


@pytest.fixture
def compiled_fully():
    """For a test that reads a compiled program, in a module that is otherwise compiled quickly: what users get."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny():
    """(model, params) of the smallest configuration, its parameters random in every leaf."""
    return make_model(TINY)
