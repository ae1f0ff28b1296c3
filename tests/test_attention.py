"""Attention alone: against the reference, in blocks, with padding, with dropout."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exhaustive, grid, product_flops

from jaxgpt.model import reference
from jaxgpt.model.attention import attend, blocked
from jaxgpt.model.cache import Seen

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def attention_inputs(T, S):
    return normal(0, 2, 3, T, 4), normal(1, 2, 3, S, 4), normal(2, 2, 3, S, 4)


def attention(q, k, v, dtype, query_slot=0, start_B=None, start_BxT=None, **options):
    return blocked(q, Seen(k, v, query_slot, start_B, dtype, start_BxT), **options)


@grid(1, window=[None, 1, 4, 9], query_block=[2, 128])
def test_attention_equals_the_reference_head_by_head(window, query_block):
    q, k, v = attention_inputs(9, 9)
    seen = Seen(k, v, 0, None, "float32")
    got, returned = attend(q, seen, window=window, query_block=query_block, return_weights=True)
    for b in range(2):
        for h in range(3):
            q64, k64, v64 = (np.asarray(x[b, h], np.float64) for x in (q, k, v))
            weights = reference.attention_weights(q64, k64, window)
            np.testing.assert_allclose(got[b, h], weights @ v64, atol=1e-6)
            np.testing.assert_allclose(returned[b, h], weights, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, jnp.float32(0.3)], ids=["number", "array"])
def test_scores_are_multiplied_by_the_scale(scale):
    q, k, v = attention_inputs(9, 9)
    got, returned = attend(q, Seen(k, v, 0, None, "float32"), scale=scale, query_block=4, return_weights=True)
    for b, h in np.ndindex(2, 3):
        q64, k64, v64 = (np.asarray(x[b, h], np.float64) for x in (q, k, v))
        weights = reference.attention_weights(q64, k64, divisor=1 / float(scale))
        np.testing.assert_allclose(got[b, h], weights @ v64, atol=1e-6)
        np.testing.assert_allclose(returned[b, h], weights, atol=1e-6)


def plain_attention(q, k, v, kept, visible_BxTxS):
    """The formula, for JAX to differentiate; dropout multiplies the weights by `kept`."""
    scores = jnp.where(visible_BxTxS[:, None], q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5, -jnp.inf)
    return jax.nn.softmax(scores) * kept @ v


# Where the documents of nine tokens start, in two rows.
DOCUMENTS = [[0, 0, 2, 3, 3, 5, 5, 5, 5], [0, 1, 1, 1, 1, 1, 1, 1, 8]]


@grid(
    1,
    drop_rate=[0.0, 0.4],
    group_scores=[1, 10**6],
    window=[2, 4, 9],
    start={"one document": None, "several": DOCUMENTS},
)
def test_attention_and_its_gradient_rule_equal_the_formula(drop_rate, group_scores, window, start):
    T = 9
    q, k, v = attention_inputs(T, T)
    start_BxT = np.zeros((2, T), int) if start is None else np.array(start)
    visible = (np.tri(T, dtype=bool) & ~np.tri(T, k=-window, dtype=bool))[None] & (
        np.arange(T) >= start_BxT[:, :, None]
    )
    run = functools.partial(
        attention,
        dtype="float32",
        window=window,
        query_block=4,
        drop_rate=drop_rate,
        dropout_key=jax.random.key(0) if drop_rate else None,
        group_scores=group_scores,
        start_BxT=None if start is None else jnp.array(start, jnp.int32),
    )
    # The same mask as it acts on the weights: zero scores and identity values expose it.
    zeros, values = jnp.zeros((2, 3, T, T)), jnp.broadcast_to(jnp.eye(T), (2, 3, T, T))
    kept = jax.jit(run)(zeros, zeros, values) * visible.sum(-1, dtype=np.float32)[:, None, :, None]
    assert not np.asarray(kept).any(axis=1)[~visible].any()
    assert bool((jnp.diagonal(kept, axis1=2, axis2=3) == 0).any()) == (drop_rate > 0)  # each position sees itself
    # Every row and head has a mask of its own; without dropout, only rows of other documents differ.
    different = 6 if drop_rate else 1 if start is None else 2
    assert len({head.tobytes() for head in np.asarray(kept).reshape(-1, T * T)}) == different
    got, pull_back = jax.vjp(jax.jit(run), q, k, v)
    want, pull_back_formula = jax.vjp(jax.jit(lambda q, k, v: plain_attention(q, k, v, kept, visible)), q, k, v)
    np.testing.assert_allclose(got, want, atol=2e-6)
    g = normal(3, *got.shape)
    for mine, theirs in zip(pull_back(g), pull_back_formula(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6)


@grid(
    2,
    query_block=[3, 4],
    group_scores=[1, 100, 10**6],  # one head, one row, and everything at a time
    query_slot=[0, 4],
    start={"None": None, "rows": [0, 3], "documents": np.array(DOCUMENTS)[:, :7]},
    window=[None, 2, 5],
)
def test_attention_in_query_blocks_equals_one_block_in_value_and_gradient(
    query_block, query_slot, start, group_scores, window
):
    T = 7
    q, k, v = attention_inputs(T, query_slot + T + 2)  # two slots past the last query: a cache that is not full
    start = None if start is None else jnp.asarray(start, jnp.int32)
    # A query before its row's start sees nothing; its result is unspecified and never used.
    start_BxT = 0 if start is None else start.reshape(2, -1)
    used = jnp.broadcast_to((query_slot + jnp.arange(T))[None] >= start_BxT, (2, T))

    def weighted(block, scores, q, k, v):
        options = {"query_slot": query_slot, "query_block": block, "group_scores": scores}
        if start is not None:
            options["start_B" if start.ndim == 1 else "start_BxT"] = start
        y = attention(q, k, v, dtype="float32", window=window, **options)
        y = jnp.where(used[:, None, :, None], y, 0)
        return jnp.sum(jnp.sin(y)), y

    differentiated = jax.jit(jax.value_and_grad(weighted, (2, 3, 4), has_aux=True), static_argnums=(0, 1))
    (_, want), want_grads = differentiated(64, 10**6, q, k, v)
    (_, got), got_grads = differentiated(query_block, group_scores, q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-6)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 4, 8, 20])
@pytest.mark.parametrize("slot", [3, 5, 7])
def test_attention_with_a_traced_query_slot_equals_the_static_one(slot, window):
    q, k, v = attention_inputs(2, 9)
    run = functools.partial(attention, q, k, v, dtype="float32", window=window, start_B=jnp.asarray([0, 3], jnp.int32))
    traced = jax.jit(lambda slot: run(query_slot=slot))(slot)
    np.testing.assert_allclose(traced, run(query_slot=slot), atol=1e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_attention_ignores_slots_before_a_rows_start(window):
    q, k, v = attention_inputs(8, 8)
    run = functools.partial(attention, dtype="float32", window=window)
    start = jnp.asarray([0, 3], jnp.int32)
    got = run(q, k, v, start_B=start)
    alone = run(q[1:, :, 3:], k[1:, :, 3:], v[1:, :, 3:])
    np.testing.assert_allclose(got[1:, :, 3:], alone, atol=1e-6)
    assert bool(jnp.isfinite(got).all())  # including rows that see nothing


@pytest.mark.parametrize("window", [11, exhaustive(12), exhaustive(100)])
def test_a_band_that_holds_every_slot_is_dense_attention_exactly(window):
    q, k, v = attention_inputs(11, 11)

    def run(window, q, k, v):
        options = {"drop_rate": 0.3, "dropout_key": jax.random.key(0), "query_block": 4}
        return attention(q, k, v, dtype="float32", window=window, **options)

    (got, pull_back), (want, pull_back_dense) = (jax.vjp(functools.partial(run, w), q, k, v) for w in (window, None))
    jax.tree.map(np.testing.assert_array_equal, (got, pull_back(want)), (want, pull_back_dense(want)))


def test_a_bands_products_grow_with_its_length_and_not_with_its_square():
    def flops(T, window):
        shape = jax.ShapeDtypeStruct((1, 2, T, 4), jnp.float32)

        def total(q, k, v):  # one group: products in a loop would be counted once
            return jnp.sum(attention(q, k, v, dtype="float32", window=window, query_block=16, group_scores=10**9))

        traced = (jax.make_jaxpr(function)(shape, shape, shape) for function in (total, jax.grad(total, (0, 1, 2))))
        return np.array([product_flops(jaxpr.jaxpr).attention for jaxpr in traced])

    short, double, long = (flops(T, 20) for T in (64, 128, 256))
    # A block of 16 queries sees 20 + 15 keys. Two products forward, and five more backward.
    assert (long - double == 2 * (double - short)).all()
    assert (long - double == 2 * 128 * (20 + 15) * 2 * 4 * np.array([2, 2 + 5])).all()
    assert (flops(256, None) > 3 * long).all()


def test_attention_softmax_is_float32_in_bfloat16():
    q, k, v = attention_inputs(9, 9)
    y, weights = attend(q, Seen(k, v, 0, None, "bfloat16"), return_weights=True)
    assert y.dtype == weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_attention_dropout_acts_on_the_weights_differently_in_each_block():
    T, rate = 64, 0.25
    zeros = jnp.zeros((4, 1, T, T))
    values = jnp.broadcast_to(jnp.eye(T), (4, 1, T, T))  # so the output is the weights
    options = {"drop_rate": rate, "dropout_key": jax.random.key(0), "query_block": 16}
    y = jax.jit(functools.partial(attention, dtype="float32", **options))(zeros, zeros, values)
    weights = np.asarray(y)[:, 0]
    visible = np.broadcast_to(np.tril(np.ones((T, T), bool)), weights.shape)
    assert not weights[~visible].any()
    kept = weights != 0
    assert 1 - kept[visible].mean() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / visible.sum()) ** 0.5)
    uniform = 1 / np.arange(1, T + 1)[None, :, None] / (1 - rate)
    np.testing.assert_allclose(weights[kept], np.broadcast_to(uniform, weights.shape)[kept], rtol=1e-4)
    masks = [kept[:, start : start + 16, :16] for start in (16, 32, 48)]  # every key is visible in each
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[1], masks[2])
