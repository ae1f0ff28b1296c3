"""Samplers against their definitions in float64."""

from __future__ import annotations

import functools
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.generation.controls import MinNewTokens
from jaxgpt.generation.options import from_options
from jaxgpt.generation.sampling import REMOVED, Greedy, MinP, Temperature, TopK, TopP, simplest

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

LOGITS = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


def kept(sampler, logits):
    return set(np.flatnonzero(np.asarray(sampler.filter(jnp.asarray(logits))) > REMOVED / 2).tolist())


def nucleus(logits, p):
    """The shortest prefix of the ids, by falling probability, that reaches `p`, plus ties with its last id."""
    probabilities = softmax(logits)
    falling = np.sort(probabilities)[::-1]
    least = falling[np.flatnonzero(np.cumsum(falling) >= p)[0]]
    return set(np.flatnonzero(probabilities >= least).tolist())


def test_top_k_probabilities_of_the_published_example():
    probabilities = jax.nn.softmax(TopK(3).filter(jnp.asarray(LOGITS)))
    np.testing.assert_allclose(probabilities[jnp.array([3, 7, 0])], [0.5775, 0.3610, 0.0615], atol=5e-5)
    assert float(jnp.sum(probabilities)) == pytest.approx(1)


def defined(parts, logits):
    """(probabilities, whether rounding may decide) for one row of logits, in float64, by sorting."""
    logits, unsure = np.float64(logits), False
    for part in parts:
        probabilities = softmax(logits)
        relative = probabilities / probabilities.max()
        if isinstance(part, Temperature):
            logits = logits / part.value
        elif isinstance(part, TopK):
            logits = np.where(logits >= np.sort(logits)[::-1][: part.k][-1], logits, -np.inf)
        elif isinstance(part, TopP):
            held = np.cumsum(np.sort(probabilities)[::-1])
            unsure |= part.p < 1 and np.abs(held - part.p).min() < 1e-5
            if part.p < 1:
                logits = np.where([i in nucleus(logits, part.p) for i in range(len(logits))], logits, -np.inf)
        elif isinstance(part, MinP):
            unsure |= np.any((np.abs(relative - part.p) < 1e-5 * part.p) & (relative != part.p))
            logits = np.where(relative >= part.p, logits, -np.inf)
    return softmax(logits), unsure


def rows_of_logits(seed, n, V):
    """Rows with and without ties, with zeros of both signs, narrow and wide, and so large that float32 is coarse."""
    rng = np.random.default_rng(seed)
    kinds = [
        rng.normal(size=(n, V)) * 3,
        rng.integers(-3, 4, (n, V)) * 0.5,
        rng.choice([0.0, -0.0, 1.0], (n, V)),
        rng.normal(size=(n, V)) * 1e-3,
        rng.normal(size=(n, V)) * 60,
        1000 + rng.integers(-8, 8, (n, V)),
    ]
    return np.concatenate(kinds).astype(np.float32)


PARTS = st.one_of(
    st.builds(Temperature, st.sampled_from([0.05, 0.5, 1, 1.7, Fraction(5, 2), 100.0])),
    st.builds(TopK, st.integers(1, 14)),
    st.builds(TopP, st.sampled_from([1e-50, 0.013, 0.21, 0.5, 0.77, Fraction(9, 10), 0.999, 1.0])),
    st.builds(MinP, st.sampled_from([0.0, 1e-9, 0.02, 0.1, 0.5, 0.9, 1.0])),
)


@settings(max_examples=40)
@given(parts=st.lists(PARTS, min_size=1, max_size=4), seed=st.integers(0, 2**32))
@example(parts=[TopK(1)], seed=0)
@example(parts=[TopP(0.5)], seed=0)
@example(parts=[MinP(0.1)], seed=0)
def test_every_combination_gives_the_probabilities_of_its_definition(parts, seed):
    sampler = functools.reduce(operator.or_, parts)
    logits = rows_of_logits(seed, 20, 12)
    got = np.asarray(jax.nn.softmax(sampler.filter(jnp.asarray(logits))))
    compared = 0
    for row, probabilities in zip(logits, got, strict=True):
        expected, unsure = defined(parts, row)
        if not unsure:
            compared += 1
            assert set(np.flatnonzero(probabilities > 1e-30)) == set(np.flatnonzero(expected > 1e-30)), row
            np.testing.assert_allclose(probabilities, expected, rtol=2e-3, atol=2e-6)
    assert compared > 30


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


def test_one_row_is_drawn_as_in_a_batch():
    sampler = Temperature(1.7) | TopK(6)
    keys = jax.random.split(jax.random.key(1), 20)
    batch = sampler(jnp.broadcast_to(jnp.asarray(LOGITS), (20, 9)), keys)
    assert [int(sampler(jnp.asarray(LOGITS), key)) for key in keys] == batch.tolist()
    assert len(set(batch.tolist())) > 2


def test_filters_apply_from_left_to_right():
    # After sharpening, one id has 0.7 of the probability; before, two are needed.
    assert kept(Temperature(0.3) | TopP(0.7), LOGITS) == {3}
    assert kept(TopP(0.7) | Temperature(0.3), LOGITS) == {3, 7}
    assert from_options(temperature=0.5, top_k=5, top_p=0.9, min_p=0.1) == Temperature(0.5) | TopK(5) | TopP(
        0.9
    ) | MinP(0.1)


def test_greedy_takes_the_lowest_of_equals_and_needs_no_key():
    assert Greedy()(jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])).tolist() == [1, 0]
    assert Temperature(0)(jnp.array([0.0, 2.0, 2.0])).tolist() == 1
    assert not (Temperature(0) | TopK(2)).draws
    assert from_options(temperature=0, top_k=5) == Greedy()


def test_bfloat16_logits_are_drawn_from_in_float32():
    logits = jnp.asarray(LOGITS_2D, jnp.bfloat16)
    assert Temperature(0.8)(logits, KEYS).tolist() == Temperature(0.8)(logits.astype(jnp.float32), KEYS).tolist()


def test_samplers_are_equal_and_hash_by_value():
    chain = Temperature(0.8) | TopK(5)
    again = Temperature(0.8) | TopK(5)
    assert chain == again
    assert hash(chain) == hash(again)
    assert chain != Temperature(0.8) | TopK(6)


@pytest.mark.parametrize("value", [0.8, 1 / 3, 1.7, 1e-40])
def test_a_number_that_is_traced_filters_to_the_same_bits_as_a_constant(value):
    sampler = Temperature(value) | TopK(9) | TopP(0.9) | MinP(min(value, 1) / 7)
    logits = jnp.asarray(rows_of_logits(0, 5, 12))
    constant = jax.jit(lambda logits: sampler.filter(logits))(logits)
    traced = jax.jit(lambda sampler, logits: sampler.filter(logits))(sampler, logits)
    np.testing.assert_array_equal(np.asarray(traced).view(np.int32), np.asarray(constant).view(np.int32))


def test_samplers_are_trees_of_their_numbers():
    chain = Temperature(0.8) | TopK(5) | TopP(0.9) | MinP(0)
    leaves, structure = jax.tree.flatten(chain)
    assert jax.tree.unflatten(structure, leaves) == chain
    assert set(map(type, leaves)) == {float, int}
    assert structure == jax.tree.structure(Temperature(3) | TopK(10**12) | TopP(0.1) | MinP(0.5))
    assert structure != jax.tree.structure(TopK(5) | Temperature(0.8) | TopP(0.9) | MinP(0))
    assert jax.tree.structure(Temperature(0)) != jax.tree.structure(Temperature(1))
    assert jax.tree.structure(TopP(1)) != jax.tree.structure(TopP(0.9))  # it costs nothing
    assert repr(jax.tree.map(lambda leaf: "x", TopK(5))) == "TopK('x')"
    for leaf in jax.device_put(jax.tree.leaves(Temperature(1e300) | TopK(10**300))):  # beyond 32 bits
        assert bool(jnp.isfinite(leaf))


def test_a_sampler_that_draws_nothing_at_random_is_greedy_to_the_compiler():
    assert {simplest(sampler) for sampler in (Temperature(0), Greedy(), Temperature(0) | TopK(3))} == {Greedy()}
    assert simplest(Temperature(0) | MinNewTokens(3) | TopK(2)) == MinNewTokens(3) | Greedy()
    assert simplest(TopK(2) | MinNewTokens(3)) == TopK(2) | MinNewTokens(3)


def test_samplers_can_be_made_of_traced_numbers():
    logits = jnp.asarray(LOGITS)

    @jax.jit
    def made(t, k, p, m):
        return (Temperature(t) | TopK(k) | TopP(p) | MinP(m)).filter(logits)

    for values in ((0.5, 6, 0.99, 0.001), (0.5, 9, 1.0, 0.0)):
        t, k, p, m = values
        expected = (Temperature(t) | TopK(k) | TopP(p) | MinP(m)).filter(logits)
        np.testing.assert_array_equal(made(*values), expected)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda v=v: Temperature(v), "temperature")
        for v in (-0.1, float("nan"), float("inf"), True, "1", None, 10**400, 10**5000)
    ]
    + [(lambda v=v: TopP(v), "top_p") for v in (0, -0.5, 1.01, float("nan"), "a", 10**400)]
    + [(lambda v=v: MinP(v), "min_p") for v in (-0.01, 1.01, float("nan"), float("inf"))]
    + [(lambda v=v: TopK(v), "top_k") for v in (0, -1, 1.5, True, None, "3", -(10**5000))],
)
def test_options_out_of_range_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()
