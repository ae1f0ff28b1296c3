"""The forward with a key/value cache equals the forward without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALTERNATING, SCALED, TINY, grid, make_model, random_ids

from jaxgpt.model.cache import Cache
from jaxgpt.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

ATOL = 1e-5
DENSE_OR_ALTERNATING = {"dense": TINY, "alternating": ALTERNATING}
DENSE_OR_SCALED = DENSE_OR_ALTERNATING | {"scaled": SCALED}


def cached_logits(model, params, ids, start_B, chunks, *, traced=False, slots=16):
    """Logits of ids [B, T], fed in chunks of the given lengths. The cache's length is a Python int throughout, or a
    traced array from the second chunk on."""

    def step(params, cache, ids):
        x, cache = model.apply({"params": params}, ids, cache=cache, method=GPT.features)
        return model.apply({"params": params}, x, method=GPT.logits), cache

    def run(params, ids):
        cache = Cache.empty(model.config, model.compute, jnp.asarray(start_B, jnp.int32), slots)
        pieces, done = [], 0
        for chunk in chunks:
            logits, cache = one(params, cache, ids[:, done : done + chunk])
            pieces.append(logits)
            done += chunk
        return jnp.concatenate(pieces, axis=1), cache.length

    one = jax.jit(step) if traced else step
    logits, length = (run if traced else jax.jit(run))(params, ids)
    assert int(length) == ids.shape[1]
    return np.asarray(logits)


@grid(
    1,
    chunks=[(12,), (7, 1, 1, 1, 1, 1), (1,) * 12, (3, 4, 5)],
    scan_layers=[False, True],
    traced=[True, False],
    config=DENSE_OR_SCALED,
)
def test_cached_equals_uncached(chunks, scan_layers, traced, config):
    model, params = make_model(config, scan_layers=scan_layers)
    ids = random_ids(TINY, 2, 12)
    want = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_allclose(cached_logits(model, params, ids, [0, 0], chunks, traced=traced), want, atol=ATOL)


@grid(1, chunks=[(8, 1, 1, 1, 1), (5, 7)], traced=[False, True], config=DENSE_OR_ALTERNATING)
def test_each_row_of_a_left_padded_batch_equals_itself_alone(chunks, traced, config):
    model, params = make_model(config)
    ids, starts = random_ids(TINY, 3, 12), [0, 3, 7]
    got = cached_logits(model, params, ids, starts, chunks, traced=traced)
    assert np.isfinite(got).all()
    for row, start in enumerate(starts):
        alone = jax.jit(model.apply)({"params": params}, ids[row : row + 1, start:])[0]
        np.testing.assert_allclose(got[row, start:], alone, atol=ATOL)


def test_what_stands_in_the_padding_is_never_seen():
    model, params = make_model(TINY)
    ids = random_ids(TINY, 2, 12)
    other = ids.copy()
    other[:, :5] = (other[:, :5] + 1) % TINY.vocab_size
    first, second = (cached_logits(model, params, each, [5, 5], (8, 2, 2)) for each in (ids, other))
    assert np.array_equal(first[:, 5:], second[:, 5:])


@pytest.mark.usefixtures("compiled_fully")
def test_slots_beyond_the_length_are_never_seen():
    model, params = make_model(TINY)
    ids = random_ids(TINY, 2, 6)
    small, large = (cached_logits(model, params, ids, [0, 2], (4, 1, 1), slots=slots, traced=True) for slots in (6, 16))
    atol = 1e-6 if jax.__version_info__ < (0, 12) else ATOL  # whose products of other shapes round differently
    np.testing.assert_allclose(small[0], large[0], atol=atol)
    np.testing.assert_allclose(small[1, 2:], large[1, 2:], atol=atol)


def test_the_last_slot_of_a_full_cache_is_right():
    model, params = make_model(TINY)
    ids = random_ids(TINY, 1, 16)
    want = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_allclose(cached_logits(model, params, ids, [0], (15, 1)), want, atol=ATOL)


def test_a_bfloat16_cache_costs_less_than_three_percent():
    model, params = make_model(TINY, dtype="bfloat16")
    ids = random_ids(TINY, 2, 12)
    want = np.asarray(jax.jit(model.apply)({"params": params}, ids))
    got = cached_logits(model, params, ids, [0, 0], (6,) + (1,) * 6)
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


@grid(2, scan_layers=[False, True], rows=[(2, 0, 0), (1,)], batch=[3, 1])
def test_rows_of_a_cache_go_on_as_those_rows(scan_layers, rows, batch):
    model, params = make_model(scan_layers=scan_layers)
    rows = np.minimum(rows, batch - 1)
    before, after = random_ids(TINY, batch, 9), random_ids(TINY, len(rows), 3, seed=1)
    starts = np.array([0, 3, 5], np.int32)[:batch]

    @jax.jit
    def run(params):
        cache = Cache.empty(model.config, model.compute, jnp.asarray(starts), 16)
        _, cache = model.apply({"params": params}, before, cache=cache, method=GPT.features)
        x, cache = model.apply({"params": params}, after, cache=cache.take(jnp.asarray(rows)), method=GPT.features)
        empty = Cache.empty(model.config, model.compute, jnp.asarray(starts[rows]), 16)
        assert jax.tree.map(jnp.shape, cache.layers) == jax.tree.map(jnp.shape, empty.layers)
        return model.apply({"params": params}, x, method=GPT.logits)

    got = run(params)
    for r, row in enumerate(rows):
        ids = np.concatenate([before[row, starts[row] :], after[r]])[None]
        np.testing.assert_allclose(got[r], jax.jit(model.apply)({"params": params}, ids)[0, -3:], atol=ATOL)
