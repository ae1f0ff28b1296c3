"""The optional C++ kernel is built, checked, used by `prepare` and equal to XLA; and what happens if it cannot be
built."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, make_model, random_ids

from jaxgpt import cli, generate, load, prepare, save, scan_generate
from jaxgpt.config import ComputeConfig
from jaxgpt.cpu import kernel
from jaxgpt.errors import KernelError
from jaxgpt.model import ops
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import MeshConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform == "win32", reason="no C++ compiler"
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A user's cache with the kernel in it, shared by all test processes."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernel"
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (home / "lock").open("w") as lock:
        patch.setenv("XDG_CACHE_HOME", str(home))
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kernel.path().is_file():
            kernel.build()
    return home


@pytest.fixture
def built(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv(kernel.VARIABLE)


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernel.VARIABLE)
    return tmp_path / "jaxgpt"


@needs_compiler
@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (4, 2)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_the_kernels_products_equal_xlas(built, rows, kind):
    assert kernel.available()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*rows, 200)), jnp.float32)
    weight = jnp.asarray(30 * rng.normal(size=(77, 200))).astype(kind)
    scale = jnp.asarray(rng.uniform(size=77), jnp.float32) if kind == "int8" else None
    dtype = "float32" if kind == "int8" else kind

    def product(x, native_kernel):
        return ops.product(x, ops.Matrix(weight, scale), ComputeConfig(dtype=dtype, native_kernel=native_kernel))

    ours, xlas = (jax.jit(product, static_argnums=1)(x, which) for which in (True, False))
    text = jax.jit(product, static_argnums=1).lower(x, True).as_text()
    assert kernel.TARGET in text
    # XLA's int8 product rounds several rows to 15 bits.
    np.testing.assert_allclose(ours, xlas, atol=(1e-4 if kind == "int8" else 2e-6) * float(jnp.abs(xlas).max()))
    each = jax.vmap(lambda x: product(x[None], True)[0])(x)
    np.testing.assert_allclose(each, ours, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("inner", [5, 16, 150])
def test_a_row_has_the_same_bits_whatever_comes_with_it(built, inner, kind):
    assert kernel.available()
    rng = np.random.default_rng(1)
    x = rng.normal(size=(kernel.MOST_ROWS, inner)).astype(np.float32)
    weight = np.asarray(jnp.asarray(30 * rng.normal(size=(61, inner))).astype(kind))

    @jax.jit
    def products(x, weight):
        """With each number of rows, as the last of them, and by some of the weight's rows."""
        each = [kernel.few_rows(x[-rows:], weight) for rows in range(1, len(x) + 1)]
        return each, kernel.few_rows(x, weight[7:30])

    each, some = jax.device_get(products(x, weight))
    for y in each:
        np.testing.assert_array_equal(y, each[-1][-len(y) :])
    np.testing.assert_array_equal(some, each[-1][:, 7:30])


@needs_compiler
@pytest.mark.exhaustive
def test_the_number_of_threads_changes_no_bit(cache):
    """With one thread, a weight of several pieces is read from end to end."""
    program = (
        "import os, sys; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:int(sys.argv[1])])\n"
        "import hashlib, numpy as np, jax, jax.numpy as jnp; from jaxgpt.cpu import kernel\n"
        "assert kernel.available()\n"
        "rng = np.random.default_rng(0); w = rng.normal(size=(4001, 770)).astype(np.float32)\n"
        "for rows in (1, 5):\n"
        "    x = rng.normal(size=(rows, 770)).astype(np.float32)\n"
        "    for dtype in ('float32', 'bfloat16'):\n"
        "        y = kernel.few_rows(jnp.asarray(x), jnp.asarray(w).astype(dtype))\n"
        "        print(hashlib.sha256(np.asarray(y).tobytes()).hexdigest())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), kernel.VARIABLE: "1"}
    one, all_of_them = (
        subprocess.run([sys.executable, "-c", program, n], capture_output=True, text=True, env=environment, check=True)
        for n in ("1", "1000")
    )
    assert len(one.stdout.split()) == 4
    assert one.stdout == all_of_them.stdout


@needs_compiler
def test_a_weight_that_is_to_be_rounded_on_the_way_stays_with_xla(built):
    """The kernel would use W without rounding it."""
    x, weight = jnp.ones((1, 1, 16)), jnp.full((4, 16), 1.001)
    compute = ComputeConfig(dtype="bfloat16", native_kernel=True)
    np.testing.assert_array_equal(ops.product(x, ops.Matrix(weight, None), compute), np.full((1, 1, 4), 16))


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *(exhaustive(rows, dtype) for rows, dtype in [(1, "float32"), (3, "float32"), (1, "bfloat16"), (3, "int8")]),
        exhaustive(1, "int8"),
        (3, "bfloat16"),
    ],
)
def test_generate_uses_the_kernel_and_draws_the_same_ids(built, dtype, rows, monkeypatch):
    model, params = make_model(TINY)
    prompts = random_ids(TINY, rows, 9).tolist()
    with_kernel, its_params = prepare(model, params, dtype)
    assert with_kernel.compute.native_kernel
    ours = generate(with_kernel, its_params, prompts, 40).tokens
    monkeypatch.setenv(kernel.VARIABLE, "0")
    without, params = prepare(model, params, dtype)
    assert not without.compute.native_kernel
    for row, want in zip(ours, generate(without, params, prompts, 40).tokens, strict=True):
        np.testing.assert_array_equal(row, want)


@needs_compiler
def test_the_choice_of_kernel_is_not_saved(built, tmp_path):
    save(tmp_path / "model", *prepare(*make_model(TINY)))
    assert not load(tmp_path / "model")[0].compute.native_kernel


@needs_compiler
def test_the_kernel_is_the_users_own(cache):
    (directory,) = (cache / "jaxgpt").glob("kernel-*")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [file.suffix for file in directory.iterdir()] == [".so"]


def test_nothing_is_built_unasked(no_cache):
    assert not kernel.available()
    assert not no_cache.exists()


def test_a_missing_compiler_is_told(no_cache, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main(["build-kernel"]) == 2
    assert "no C++ compiler: install g++ or clang++, or name one in CXX" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_nothing(no_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelError, match=r"the compiler failed .*few_rows\.cc.*exit 1"):
        kernel.build()
    assert not list(no_cache.glob("*/*"))


@needs_compiler
@pytest.mark.exhaustive
def test_a_kernel_that_computes_something_else_is_not_kept(no_cache, tmp_path, monkeypatch):
    source = kernel.SOURCE.read_text()
    assert source.count("Fma(ws[r], xs, sums[b][r])") == 1
    wrong = tmp_path / "few_rows.cc"
    wrong.write_text(source.replace("Fma(ws[r], xs, sums[b][r])", "Fma(-ws[r], xs, sums[b][r])"))
    monkeypatch.setattr(kernel, "SOURCE", wrong)
    with pytest.raises(KernelError, match=r"(?s)the kernel is wrong .*rows by .*off by"):
        kernel.build()
    assert not list(no_cache.glob("*/*"))


def test_a_file_that_is_no_kernel_is_not_used(no_cache):
    path = kernel.path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="does not load, so XLA is used instead: .* Run jaxgpt build-kernel"):
        assert not kernel.available()


def test_a_kernel_that_others_could_have_put_there_is_not_used(no_cache):
    path = kernel.path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    no_cache.chmod(0o770)
    with pytest.warns(UserWarning, match=f"the native kernel is not used: others can write to {no_cache}"):
        assert not kernel.available()


@needs_compiler
def test_a_prepared_model_can_be_exported(built):
    """An export must run on other machines too, so it does not use the kernel."""
    model, params = prepare(*make_model(TINY))
    assert model.compute.native_kernel
    ids = random_ids(TINY, 1, 5)
    program = jax.jit(lambda params, ids: scan_generate(model, params, ids, 6))
    exported = jax.export.export(program)(params, ids)
    assert kernel.TARGET not in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(params, ids)[0], generate(model, params, ids.tolist(), 6).tokens[0][5:])


@needs_compiler
def test_the_kernel_is_left_to_single_devices(built):
    model, params = prepare(*make_model(TINY))
    mesh = sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    text = jax.jit(model.apply).lower({"params": sharding.shard(params, mesh)}, random_ids(TINY, 1, 5)).as_text()
    assert kernel.TARGET not in text


@needs_compiler
@pytest.mark.exhaustive
def test_the_command_finds_the_kernel_in_a_later_process(cache):
    program = (
        "import jaxgpt; print(jaxgpt.prepare(*jaxgpt.load('shakespeare'))[0].compute.native_kernel);"
        "print(jaxgpt.generate_text(*jaxgpt.load('shakespeare'), 'ROMEO:', 20))"
    )
    printed = {}
    for setting in ("0", "1"):
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), kernel.VARIABLE: setting}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        printed[setting] = done.stdout.splitlines()
    assert [printed["0"][0], printed["1"][0]] == ["False", "True"]
    assert printed["0"][1:] == printed["1"][1:]
