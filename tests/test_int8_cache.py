"""The int8 key/value cache: what it holds is within half a step, attention over it equals float64, and rows, growth,
lookup and searches carry its scales along. (tests/test_kernel.py has the kernel's share, test_lookup.py lookup's.)"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALTERNATING, TINY, exhaustive, grid, make_model, needs_compiler, random_ids

from jaxgpt import beam_search, generate, load, prepare
from jaxgpt.cpu.kernel_check import attention_in_float64
from jaxgpt.generation import beams, decode
from jaxgpt.model import GPT, Cache, Quantised, Seen, attend

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_an_element_is_off_by_half_a_step_at_most():
    x = normal(2, 3, 50, 24) * np.exp(normal(2, 3, 50, 1, seed=1))
    x[0, 0, 0] = 0
    kept = Quantised.of(jnp.asarray(x))
    assert (kept.values.dtype, kept.scale.shape) == (jnp.int8, (2, 3, 50, 1))
    off = np.abs(np.float64(kept.values) * np.float64(kept.scale) - x)
    largest = np.abs(x).max(-1, keepdims=True)
    assert np.all(off <= largest / 254 * (1 + 1e-5))
    assert np.max(off[1] / largest[1]) > 0.9 / 254
    assert np.all(kept.floats()[0, 0, 0] == 0)
    assert np.abs(kept.values).max() == 127


def test_what_is_not_finite_stays_so():
    x = normal(2, 8)
    x[0, 3], x[1, 2] = np.nan, np.inf
    assert not np.isfinite(Quantised.of(jnp.asarray(x)).floats()).all(axis=1).any()


@pytest.mark.parametrize("window", [None, 7])
def test_attention_over_an_int8_cache_equals_float64(window):
    B, H, T, S, K = 2, 3, 2, 40, 24
    q, (k, v) = normal(B, H, T, K), (Quantised.of(jnp.asarray(normal(B, H, S, K, seed=seed))) for seed in (1, 2))
    start_B, slot = jnp.array([0, 9], jnp.int32), jnp.int32(33)

    @jax.jit
    def run(q, k, v, slot):
        return attend(q, Seen(k, v, slot, start_B, "float32"), window=window, return_weights=True)

    got, weights = run(q, k, v, slot)
    exact = (np.float64(x.values) * np.float64(x.scale) for x in (k, v))
    want = attention_in_float64(q * K**-0.5, *exact, 33, np.asarray(start_B), window)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert weights.shape == (B, H, T, S)


@grid(1, scan_layers=[False, True], batch=[1, 2], config={"dense": TINY, "alternating": ALTERNATING})
def test_logits_are_within_two_percent_of_those_without_a_cache(scan_layers, batch, config):
    model, params = make_model(config, scan_layers=scan_layers)
    ids = random_ids(config, batch, 12)
    want = jax.jit(model.apply)({"params": params}, ids)

    @jax.jit
    def step(cache, ids_BxT):
        x, cache = model.apply({"params": params}, ids_BxT, cache=cache, method=GPT.features)
        return model.apply({"params": params}, x, method=GPT.logits), cache

    cache = Cache.empty(config, model.compute, jnp.zeros(batch, jnp.int32), 16, "int8")
    got = []
    for piece in np.split(ids, [6, *range(7, 12)], axis=1):
        logits, cache = step(cache, piece)
        got.append(logits)
    off = np.abs(np.concatenate(got, axis=1) - want).max()
    assert 0 < off < 0.02 * np.abs(want).max()


@needs_compiler
@pytest.mark.parametrize("native", [False, exhaustive(True)])
def test_each_row_gets_the_ids_that_it_gets_alone_also_in_a_cache_that_grows(monkeypatch, request, native):
    if native:
        request.getfixturevalue("built")
    monkeypatch.setattr("jaxgpt.generation.session.FIRST_NEW_TOKENS", 2)
    monkeypatch.setattr("jaxgpt.generation.session.CACHE_BUCKET", 4)
    grown, grow = [], decode.grow
    monkeypatch.setattr(decode, "grow", lambda state, slots: grown.append(slots) or grow(state, slots))
    model, params = prepare(*make_model(TINY.replace(context_length=64)))
    assert model.compute.native_kernel == native
    run = functools.partial(generate, model, params, max_new_tokens=40, cache_dtype="int8")
    prompts = [[1, 2, 3, 4, 5], [9], [7, 7]]
    together = run(prompts)
    assert grown
    for prompt, row in zip(prompts, together.tokens, strict=True):
        np.testing.assert_array_equal(run([prompt]).tokens[0], row)


def test_rows_are_taken_with_their_scales():
    model, params = make_model()
    cache = Cache.empty(model.config, model.compute, jnp.zeros(3, jnp.int32), 16, "int8")
    _, cache = model.apply({"params": params}, random_ids(TINY, 3, 9), cache=cache, method=GPT.features)
    for rows in ([2, 0, 0, 1], [1]):
        taken = cache.take(jnp.array(rows))
        for (ours, theirs), (k, v) in zip(taken.layers, cache.layers, strict=True):
            for got, kept in ((ours, k), (theirs, v)):
                x = got.floats() if len(rows) > 1 else got.floats()[None]
                np.testing.assert_array_equal(x, kept.floats()[jnp.array(rows)])
    moved = beams._reorder(cache, jnp.array([1, 1, 0]), 16)
    assert jax.tree.all(jax.tree.map(np.array_equal, moved.layers, cache.take(jnp.array([1, 1, 0])).layers))


def test_a_search_with_an_int8_cache_finds_what_one_without_finds(tiny):
    want, got = (beam_search(*tiny, [[1, 2, 3], [4]], 8, num_beams=3, cache_dtype=dtype) for dtype in (None, "int8"))
    np.testing.assert_allclose(got.scores, want.scores, atol=0.02)
    assert not np.array_equal(got.scores, want.scores)


@pytest.mark.exhaustive
def test_the_bundled_models_loss_is_that_of_a_float32_cache():
    model, params = load("shakespeare")
    T, B, read = model.config.context_length, 16, 16
    text = (Path(__file__).parents[1] / "docs" / "sonnets.txt").read_bytes()
    starts = np.linspace(0, len(text) - T - 1, B).astype(int)
    ids = np.stack([np.frombuffer(text[start : start + T + 1], np.uint8) for start in starts]).astype(np.int32)

    def mean_loss(dtype):
        def step(cache, pieces):
            ids_BxT, labels_BxT = (x.reshape(B, -1) for x in pieces)
            x, cache = model.apply({"params": params}, ids_BxT, cache=cache, method=GPT.features)
            logits = model.apply({"params": params}, x, method=GPT.logits)
            return cache, optax.softmax_cross_entropy_with_integer_labels(logits, labels_BxT).mean()

        @jax.jit
        def losses(ids):
            # What the first tokens predict does not depend on the cache.
            cache = Cache.empty(model.config, model.compute, jnp.zeros(B, jnp.int32), T, dtype)
            cache, _ = step(cache, (ids[:, :read], ids[:, 1 : read + 1]))
            return jax.lax.scan(step, cache, (ids[:, read:T].T, ids[:, read + 1 :].T))[1]

        return float(losses(ids).mean())

    exact, rounded = mean_loss("float32"), mean_loss("int8")
    assert 0 < abs(rounded / exact - 1) < 1e-4
