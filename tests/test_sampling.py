"""Samplers against their definitions in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.sampling import REMOVED, Greedy, MinP, Temperature, TopK, TopP, from_options

LOGITS = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


def kept(sampler, logits):
    return set(np.flatnonzero(np.asarray(sampler.filter(jnp.asarray(logits))) > REMOVED / 2).tolist())


def nucleus(logits, p):
    """The shortest prefix of the ids by falling probability that holds `p`, with the ties of its last."""
    probabilities = softmax(logits)
    falling = np.sort(probabilities)[::-1]
    least = falling[np.flatnonzero(np.cumsum(falling) >= p)[0]]
    return set(np.flatnonzero(probabilities >= least).tolist())


def test_top_k_probabilities_of_the_published_example():
    probabilities = jax.nn.softmax(TopK(3).filter(jnp.asarray(LOGITS)))
    np.testing.assert_allclose(probabilities[jnp.array([3, 7, 0])], [0.5775, 0.3610, 0.0615], atol=5e-5)
    assert float(jnp.sum(probabilities)) == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(
    logits=st.lists(st.integers(-80, 80), min_size=12, max_size=12),
    k=st.integers(1, 20),
    p=st.sampled_from([1e-50, 0.013, 0.21, 0.5, 0.77, 0.9001, 0.999]),
)
def test_filters_keep_what_their_definitions_keep(logits, k, p):
    logits = np.array(logits, np.float32) / 10
    probabilities = softmax(logits)
    kth = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    assert kept(TopK(k), logits) == set(np.flatnonzero(logits >= kth).tolist())
    if np.abs(np.cumsum(np.sort(probabilities)[::-1]) - p).min() > 1e-5:  # else rounding decides
        assert kept(TopP(p), logits) == nucleus(logits, p)
    if np.abs(probabilities / probabilities.max() - p).min() > 1e-5:
        assert kept(MinP(p), logits) == set(np.flatnonzero(probabilities >= p * probabilities.max()).tolist())


def test_nucleus_is_exact_over_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(size=(3, 50257)).astype(np.float32) * 3
    filtered = np.asarray(TopP(0.9).filter(jnp.asarray(logits))) > REMOVED / 2
    for row, mask in zip(logits, filtered, strict=True):
        expected = nucleus(row, 0.9)
        got = set(np.flatnonzero(mask).tolist())
        # Float32 sums of 50,257 terms: the boundary may move by a few ids among thousands, never by more.
        assert abs(len(got) - len(expected)) <= 3
        assert len(got ^ expected) <= 3


def test_equal_logits_are_kept_or_removed_together():
    flat = np.zeros(5, np.float32)
    for sampler in (TopK(2), TopP(0.3), MinP(1.0)):
        assert kept(sampler, flat) == {0, 1, 2, 3, 4}


def test_top_k_is_exact_over_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(size=50257).astype(np.float32) * 3
    for k in (1, 50, 200, 30_000, 50_256):
        assert kept(TopK(k), logits) == set(np.argsort(-logits)[:k].tolist())


def test_limits_keep_everything():
    for sampler in (TopK(9), TopK(10**9), TopP(1.0), TopP(1), MinP(0.0)):
        assert kept(sampler, LOGITS) == set(range(9))


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e-3])
def test_tiny_temperatures_approach_greedy_without_overflow(value):
    logits = Temperature(value).filter(jnp.asarray(LOGITS))
    assert bool(jnp.all(jnp.isfinite(logits)))
    assert int(Temperature(value)(LOGITS_2D, KEYS)[0]) == 3


LOGITS_2D = jnp.asarray(LOGITS[None])
KEYS = jax.random.split(jax.random.key(0), 1)


def test_draws_follow_the_filtered_distribution():
    sampler = Temperature(1.7) | TopK(6) | TopP(0.97) | MinP(0.02)
    n = 20_000
    keys = jax.random.split(jax.random.key(1), n)
    drawn = np.asarray(sampler(jnp.broadcast_to(jnp.asarray(LOGITS), (n, 9)), keys))

    expected = np.float64(LOGITS) / 1.7
    expected[expected < np.sort(expected)[-6]] = -np.inf
    expected[[i for i in range(9) if i not in nucleus(expected, 0.97)]] = -np.inf
    expected[softmax(expected) < 0.02 * softmax(expected).max()] = -np.inf
    probabilities = softmax(expected)
    counts = np.bincount(drawn, minlength=9)
    assert counts[probabilities == 0].sum() == 0
    alive = probabilities > 0
    chi_square = np.sum((counts - n * probabilities)[alive] ** 2 / (n * probabilities[alive]))
    assert alive.sum() >= 3
    assert chi_square < 25  # 5 degrees of freedom at most: 1 in 7,000


def test_filters_apply_from_left_to_right():
    # After sharpening, one id holds 0.7 of the probability; before, two are needed.
    assert kept(Temperature(0.3) | TopP(0.7), LOGITS) == {3}
    assert kept(TopP(0.7) | Temperature(0.3), LOGITS) == {3, 7}
    assert from_options(0.5, 5, 0.9, 0.1) == Temperature(0.5) | TopK(5) | TopP(0.9) | MinP(0.1)


def test_greedy_takes_the_lowest_of_equals_and_needs_no_key():
    assert Greedy()(jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])).tolist() == [1, 0]
    assert Temperature(0)(jnp.array([0.0, 2.0, 2.0])).tolist() == 1
    assert not (Temperature(0) | TopK(2)).draws
    assert from_options(0, top_k=5) == Greedy()


def test_bfloat16_logits_are_drawn_from_in_float32():
    logits = jnp.asarray(LOGITS_2D, jnp.bfloat16)
    assert Temperature(0.8)(logits, KEYS).tolist() == Temperature(0.8)(logits.astype(jnp.float32), KEYS).tolist()


def test_samplers_are_equal_and_hash_by_value():
    chain = Temperature(0.8) | TopK(5)
    again = Temperature(0.8) | TopK(5)
    assert chain == again
    assert hash(chain) == hash(again)
    assert chain != Temperature(0.8) | TopK(6)


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda v=v: Temperature(v), "temperature") for v in (-0.1, float("nan"), float("inf"), True, "1", None)]
    + [(lambda v=v: TopP(v), "top_p") for v in (0, -0.5, 1.01, float("nan"), "a")]
    + [(lambda v=v: MinP(v), "min_p") for v in (-0.01, 1.01, float("nan"), float("inf"))]
    + [(lambda v=v: TopK(v), "top_k") for v in (0, -1, 1.5, True, None, "3")],
)
def test_options_out_of_range_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()
