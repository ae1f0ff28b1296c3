"""The optional C++ kernel is built, checked, used by `prepare` and equal to XLA; and what happens if it cannot be
built."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALTERNATING, TINY, exhaustive, grid, make_model, needs_compiler, random_ids

from jaxgpt import cli, generate, load, prepare, save, scan_generate
from jaxgpt.cli.options import load_model
from jaxgpt.config import ComputeConfig
from jaxgpt.cpu import kernel, kernel_check
from jaxgpt.cpu.kernel_check import attention_in_float64
from jaxgpt.errors import KernelError
from jaxgpt.generation import decode, preparation, sampling
from jaxgpt.model import GPT, Cache, Quantised, cast_params, ops
from jaxgpt.parallel import sharding
from jaxgpt.parallel.mesh import MeshConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

# No size is a multiple of a vector's.
ODD = TINY.replace(emb_dim=150, n_heads=3, n_layers=1)


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
        each = [kernel.few_rows(x[-rows:], weight) for rows in (*range(1, 10), 23, len(x))]
        return each, kernel.few_rows(x, weight[7:30])

    each, some = jax.device_get(products(x, weight))
    for y in each:
        np.testing.assert_array_equal(y, each[-1][-len(y) :])
    np.testing.assert_array_equal(some, each[-1][:, 7:30])


@needs_compiler
def test_int8_products_round_x_to_16_bits_and_are_exact_then(built):
    assert kernel.available()
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(5, 9000)) * 10.0 ** rng.integers(-6, 2, size=(5, 9000))).astype(np.float32)
    x[1], x[2], x[3] = 7, 0, 1e-42  # the largest sums that there can be; nothing; what has no inverse
    weight = rng.integers(-128, 128, size=(40, 9000), dtype=np.int8)
    weight[0] = -128
    y = np.asarray(kernel.few_rows(x, weight))
    for row in (0, 1, 4):
        expected = kernel_check.rounded_to_16_bits(x[[row]])[0] @ weight.astype(float).T
        np.testing.assert_allclose(y[row], expected, rtol=0, atol=3e-7 * np.abs(expected).max())
    assert y[1, 0] == pytest.approx(-128 * 7 * 9000, rel=1e-6)
    assert not y[2].any()
    np.testing.assert_allclose(y[3], 0, atol=1e-35)


@needs_compiler
@pytest.mark.exhaustive
def test_rounding_to_16_bits_costs_no_loss(built):
    """The bundled model's, by the kernel and by float32 products of the same weights."""
    model, int8 = prepare(*load("shakespeare"), "int8")
    text = np.frombuffer((Path(__file__).parents[1] / "docs" / "sonnets.txt").read_bytes(), np.uint8)
    T1 = kernel.MOST_ROWS + 1
    ids_NxT1 = text[: len(text) // T1 * T1].reshape(-1, T1).astype(np.int32)

    def mean_loss(model, params):
        @jax.jit
        def loss(ids):
            logits = model.apply({"params": params}, ids[None, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[None, 1:]).mean()

        return np.mean([loss(ids) for ids in ids_NxT1], dtype=float)

    assert model.compute.native_kernel
    assert 0 < abs(mean_loss(model, int8) / mean_loss(GPT(model.config), cast_params(int8, "float32")) - 1) < 5e-6


@needs_compiler
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_products_of_a_row_that_is_not_finite_are_not(built, bad):
    assert kernel.available()
    x = np.random.default_rng(3).normal(size=(3, 50)).astype(np.float32)
    weight = np.random.default_rng(4).integers(-127, 128, size=(11, 50), dtype=np.int8)
    good = np.asarray(kernel.few_rows(x, weight))
    x[1, 49] = bad
    y = np.asarray(kernel.few_rows(x, weight))
    assert not np.isfinite(y[1]).any()
    np.testing.assert_array_equal(y[[0, 2]], good[[0, 2]])


@needs_compiler
@pytest.mark.exhaustive
def test_the_number_of_threads_changes_no_bit(kernel_cache):
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
    environment = {**os.environ, "XDG_CACHE_HOME": str(kernel_cache), kernel.VARIABLE: "1"}
    one, all_of_them = (
        subprocess.run([sys.executable, "-c", program, n], capture_output=True, text=True, env=environment, check=True)
        for n in ("1", "1000")
    )
    assert len(one.stdout.split()) == 4
    assert one.stdout == all_of_them.stdout


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(
    ("shape", "dtype"),  # B, H, T, S, K
    [
        ((1, 2, 1, 50, 64), "float32"),
        ((3, 2, 4, 41, 80), "bfloat16"),
        ((2, 1, 3, 19, 5), "float32"),
        ((1, 3, 2, 50, 24), "int8"),
        ((3, 2, 4, 41, 80), "int8"),
    ],
)
def test_the_kernels_attention_equals_float64(built, shape, dtype, window):
    assert kernel.available()
    B, H, T, S, K = shape
    rng = np.random.default_rng(0)
    q = (rng.normal(size=(B, H, T, K)) / K**0.5).astype(np.float32)
    cache = [jnp.asarray(rng.normal(size=(B, H, S, K)), "float32") for _ in range(2)]
    if dtype == "int8":
        cache = [Quantised.of(x) for x in cache]
        k, v = (np.float64(x.values) * np.float64(x.scale) for x in cache)
    else:
        cache = k, v = [np.asarray(x.astype(dtype)) for x in cache]
    start_B, attend = np.arange(B, dtype=np.int32) * 4, jax.jit(kernel.attention, static_argnums=5)
    for slot in (max(8, T), S - T):
        got = attend(q, *cache, np.int32(slot), start_B, window)
        np.testing.assert_allclose(got, attention_in_float64(q, k, v, slot, start_B, window), atol=2e-6)
    # Row, query, padding and first slot change no bit.
    cache = jax.tree.map(lambda x: np.pad(x[-1:, :, start_B[-1] :], ((0, 0), (0, 0), (2, 9), (0, 0))), cache)
    alone = attend(q[-1:, :, -1:], *cache, np.int32(S + 1 - start_B[-1]), np.full(1, 2, np.int32), window)
    np.testing.assert_array_equal(alone[0, :, 0], got[-1, :, -1])


@needs_compiler
def test_attention_turns_what_is_not_finite_into_nan(built):
    assert kernel.available()
    k = np.ones((1, 3, 6, 8), np.float32)
    k[0, 0, 2], k[0, 1, 2], k[0, 2, 5] = np.nan, np.inf, np.nan  # the last is not seen
    got = kernel.attention(
        np.ones((1, 3, 1, 8), np.float32), k, np.ones_like(k), np.int32(4), np.zeros(1, np.int32), None
    )
    assert np.isnan(got).all(axis=(0, 2, 3)).tolist() == [True, True, False]


@needs_compiler
@pytest.mark.parametrize("size", [1, 7, 32, 131])
def test_the_kernels_layer_norm_equals_float64(built, size):
    assert kernel.available()
    rng = np.random.default_rng(0)
    x, scale, shift = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, size), size, size))
    x = 100 + x  # E[x^2] - E[x]^2 would cancel
    wide = x.astype(float)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-3) * scale
    norm = jax.jit(ops.layer_norm, static_argnums=(3, 4))
    np.testing.assert_allclose(norm(x, scale, shift, 1e-3, True), want + shift, atol=1e-4)
    np.testing.assert_allclose(norm(x, scale, None, 1e-3, True), want, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "config"),
    [
        ("float32", None, ODD),
        ("float32", "int8", ODD),
        exhaustive("float32", "bfloat16", ALTERNATING),
        exhaustive("bfloat16", "bfloat16", ODD),
        exhaustive("bfloat16", None, ALTERNATING.replace(activation="gelu")),
        exhaustive("bfloat16", "int8", ALTERNATING),
        exhaustive("int8", None, ODD.replace(bias=False, activation="silu")),
        exhaustive("int8", "bfloat16", ALTERNATING.replace(activation="relu")),
    ],
)
def test_tokens_read_together_have_the_bits_of_tokens_read_one_by_one(built, dtype, cache_dtype, config):
    model, params = prepare(*make_model(config), dtype)

    @jax.jit
    def read(ids_BxT, cache):
        x, cache = model.apply({"params": params}, ids_BxT, cache=cache, method="features")
        return model.apply({"params": params}, x, method="logits"), cache

    ids = jnp.asarray(random_ids(config, 1, 14))
    cache = Cache.empty(config, model.compute, start_B=jnp.zeros(1, jnp.int32), slots=32, dtype=cache_dtype)
    _, cache = model.apply({"params": params}, ids[:, :7], cache=cache, method="features")
    cache = dataclasses.replace(cache, length=jnp.int32(7))
    together, their_cache = read(ids[:, 7:], cache)
    rows, _ = read(ids[:, 7:8].repeat(3, axis=0), cache.take(jnp.zeros(3, jnp.int32)))
    for t in range(7):
        alone, cache = read(ids[:, 7 + t : 8 + t], cache)
        np.testing.assert_array_equal(alone[0, 0], together[0, t])
        if t == 0:
            np.testing.assert_array_equal(alone.repeat(3, axis=0), rows)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(their_cache), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
@grid(
    1,
    dtype=["float32", "bfloat16"],
    batch=[1, 2],
    config={"dense": TINY, "alternating": ALTERNATING},
    cache_dtype={"default": None, "int8": "int8"},
)
@pytest.mark.usefixtures("compiled_fully")
def test_with_the_kernel_a_step_neither_copies_nor_converts_the_cache(built, batch, dtype, config, cache_dtype):
    model, params = prepare(*make_model(config.replace(context_length=128, emb_dim=64, n_heads=4), dtype=dtype))
    none = np.zeros(0, np.int32)
    read = functools.partial(decode.prefill, model, slots=112, sampler=sampling.Greedy(), cache_dtype=cache_dtype)
    state = jax.eval_shape(read, params, np.ones((batch, 16), np.int32), np.full(batch, 5), np.int32(5), None, none)
    step = decode.decode_tokens.lower(model, params, state, np.int32(9), chunk=32, sampler=sampling.Greedy())
    text = step.compile().as_text()
    assert "jaxgpt_attention" in text
    sizes = [
        (np.prod([int(n) for n in shape.split(",")]), op)
        for shape, op in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text)
    ]
    ops_ = [op for size, op in sizes if size == batch * 4 * 112 * 16]
    assert ops_.count("dynamic-update-slice") == 2 * config.n_layers
    assert not {"copy", "convert", "transpose"} & set(ops_)


@needs_compiler
def test_the_choice_of_kernel_is_not_saved(built, tmp_path):
    save(tmp_path / "model", *prepare(*make_model(TINY)))
    assert not load(tmp_path / "model")[0].compute.native_kernel


@needs_compiler
def test_the_kernel_is_the_users_own(kernel_cache):
    (directory,) = (kernel_cache / "jaxgpt").glob("kernel-*")
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
    with pytest.raises(KernelError, match=r"the compiler failed .*kernel\.cc.*exit 1"):
        kernel.build()
    assert not list(no_cache.glob("*/*"))


@needs_compiler
def test_preparing_a_large_model_starts_one_build(no_cache, monkeypatch, tmp_path, capsys):
    started = Mock()
    monkeypatch.setattr(kernel.subprocess, "Popen", started)
    monkeypatch.setattr(kernel, "_builder", None)
    arguments = argparse.Namespace(model=str(tmp_path / "model"), dtype=None, mesh=None, tokenizer=None)
    save(arguments.model, *make_model(TINY))
    load_model(arguments)
    assert "building" not in capsys.readouterr().err
    monkeypatch.setattr(preparation, "LARGE", 1)
    with monkeypatch.context() as patch:
        patch.setenv(kernel.VARIABLE, "0")
        load_model(arguments)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CXX", raising=False)
        load_model(arguments)
    started.assert_not_called()
    load_model(arguments)
    load_model(arguments)
    started.assert_called_once()
    assert started.call_args.args == ([sys.executable, "-m", "jaxgpt.cpu.kernel"],)
    assert "building the CPU kernel for later commands (JAXGPT_KERNEL=0: never)" in capsys.readouterr().err


@needs_compiler
def test_a_build_that_failed_is_not_repeated_unasked(no_cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert kernel.can_build()
    kernel.build_once()
    assert not kernel.can_build()
    assert "the compiler failed" in kernel.failure()
    monkeypatch.setattr(kernel, "build", Mock(side_effect=AssertionError))
    kernel.build_once()


@needs_compiler
def test_two_processes_do_not_build_the_kernel_at_once(no_cache, monkeypatch):
    build = Mock()
    monkeypatch.setattr(kernel, "build", build)
    descriptor = os.open(kernel.startup.private_directory(kernel.DIRECTORY), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    kernel.build_once()
    build.assert_not_called()
    os.close(descriptor)
    kernel.build_once()
    build.assert_called_once()


@needs_compiler
def test_nothing_is_built_where_others_can_write(no_cache):
    no_cache.mkdir()
    no_cache.chmod(0o770)
    assert not kernel.can_build()


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of processors are Intel's and AMD's")
@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512", "sapphirerapids"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_it_compiles_for_other_processors_than_this_one(compiler, processor):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    flags = [flag for flag in kernel.FLAGS if not flag.startswith("-march")]
    command = [compiler, *flags, f"-march={processor}", "-fsyntax-only", "-I", jax.ffi.include_dir()]
    subprocess.run([*command, *map(str, kernel.SOURCES)], check=True)


@needs_compiler
@pytest.mark.exhaustive
def test_a_kernel_that_computes_something_else_is_not_kept(no_cache, tmp_path, monkeypatch):
    kernel_cc, sequences_cc = kernel.SOURCES
    source = kernel_cc.read_text()
    assert source.count("Fma(w, x, sums)") == 1
    wrong = tmp_path / "kernel.cc"
    for header in kernel.HEADERS:
        (tmp_path / header.name).write_text(header.read_text())
    wrong.write_text(source.replace("Fma(w, x, sums)", "Fma(-w, x, sums)"))
    monkeypatch.setattr(kernel, "SOURCES", (wrong, sequences_cc))
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
def test_the_command_finds_the_kernel_in_a_later_process(kernel_cache):
    program = (
        "import jaxgpt; print(jaxgpt.prepare(*jaxgpt.load('shakespeare'))[0].compute.native_kernel);"
        "print(jaxgpt.generate_text(*jaxgpt.load('shakespeare'), 'ROMEO:', 20))"
    )
    printed = {}
    for setting in ("0", "1"):
        environment = {**os.environ, "XDG_CACHE_HOME": str(kernel_cache), kernel.VARIABLE: setting}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        printed[setting] = done.stdout.splitlines()
    assert [printed["0"][0], printed["1"][0]] == ["False", "True"]
    assert printed["0"][1:] == printed["1"][1:]
