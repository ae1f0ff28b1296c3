"""The shared arithmetic: products, LayerNorm, activations, dropout."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model import ops, reference


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "y_shape"),
    [
        ("BTD,OD->BTO", (2, 5, 7), (3, 7)),
        ("BTD,OPD->BTOP", (2, 5, 7), (3, 4, 7)),
        ("BHTK,BHSK->BHTS", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("BHTS,BHSK->BHTK", (2, 3, 5, 6), (2, 3, 6, 4)),
        ("BTD,VD->BTV", (2, 5, 7), (11, 7)),
    ],
)
def test_dot_and_its_gradient_rule_equal_einsum(subscripts, x_shape, y_shape):
    x, y = normal(0, *x_shape), normal(1, *y_shape)
    got, pull_back = jax.vjp(lambda x, y: ops.dot(subscripts, x, y, "float32"), x, y)
    want, pull_back_einsum = jax.vjp(lambda x, y: jnp.einsum(subscripts, x, y), x, y)
    np.testing.assert_allclose(got, want, atol=1e-5)
    g = normal(2, *got.shape)
    for mine, theirs in zip(pull_back(g), pull_back_einsum(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("subscripts", ["BTD,OD->BTO", "BTO,OD->BTD", "BDT,BDO->BTO"])
def test_dots_gradient_in_bfloat16_is_that_of_the_rounded_operands(subscripts):
    sizes = {"B": 2, "T": 5, "D": 7, "O": 3}
    x, y, g = (normal(seed, *(sizes[i] for i in indices)) for seed, indices in enumerate(re.split(",|->", subscripts)))
    rounded_x, rounded_y, rounded_g = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, y, g))
    for transform in (lambda f: f, jax.jit):
        grads = transform(lambda x, y, g: jax.vjp(lambda x, y: ops.dot(subscripts, x, y, "bfloat16"), x, y)[1](g))
        want = jax.vjp(lambda x, y: jnp.einsum(subscripts, x, y), rounded_x, rounded_y)[1](rounded_g)
        for mine, theirs in zip(grads(x, y, g), want, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weights_gradient_sums_over_one_axis(dtype):
    # XLA on CPU makes a transposed copy of a gradient that it sums over two axes.
    def gradient(x, y, g):
        return jax.vjp(lambda y: ops.dot("BTD,OD->BTO", x, y, dtype), y)[1](g)

    program = jax.jit(gradient).lower(normal(0, 2, 5, 7), normal(1, 3, 7), normal(2, 2, 5, 3)).as_text()
    found = re.findall(r"dot_general .*contracting_dims = (.*), precision.*-> tensor<3x7x", program)
    assert found == ["[0] x [0]" if dtype == "float32" else "[1] x [0]"]


def test_dot_in_bfloat16_rounds_its_operands_only_and_returns_float32():
    x, y = normal(0, 2, 5, 64), normal(1, 3, 64).astype(jnp.bfloat16)
    got, pull_back = jax.vjp(lambda x, y: ops.dot("BTD,OD->BTO", x, y, "bfloat16"), x, y)
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rounded @ np.asarray(y, np.float64).T, atol=1e-5)
    dx, dy = pull_back(jnp.ones_like(got))
    assert (dx.dtype, dy.dtype) == (jnp.float32, jnp.bfloat16)  # each has the dtype of its operand


@pytest.mark.parametrize(
    ("values", "variance"),
    [([0.2260, 0.3470, 0, 0.2216, 0, 0], 0.9995), ([0.2133, 0.2394, 0, 0.5198, 0.3297, 0], 0.9997)],
)
def test_layer_norm_gives_the_books_variances(values, variance):
    y = ops.layer_norm(jnp.asarray([values]), jnp.ones(6), jnp.zeros(6), 1e-5)
    assert float(jnp.mean(y)) == pytest.approx(0, abs=1e-6)
    assert round(float(jnp.var(y)), 4) == variance


def test_layer_norm_survives_a_mean_far_above_the_deviation():
    x = 1000 + normal(0, 4, 64)
    want = reference.layer_norm({"scale": 1.0}, np.asarray(x, np.float64), 1e-5)
    # E[x^2] - E[x]^2 would be off by about 0.1 here.
    np.testing.assert_allclose(ops.layer_norm(x, jnp.ones(64), None, 1e-5), want, atol=2e-3)


def test_softmax_of_the_books_logits_gives_its_top_three():
    logits = jnp.asarray([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])
    top, indices = jax.lax.top_k(logits, 3)
    kept = jnp.where(logits >= top[-1], logits, -jnp.inf)
    assert indices.tolist() == [3, 7, 0]
    np.testing.assert_allclose(jax.nn.softmax(kept)[indices], [0.5775, 0.3610, 0.0615], atol=5e-5)


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu", "relu", "silu", "tanh"])
def test_activation_equals_its_formula(name):
    x = np.linspace(-6, 6, 241)
    np.testing.assert_allclose(
        ops.activation(name)(jnp.asarray(x, jnp.float32)), reference.activate(name, x), atol=1e-6
    )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    n = 200_000
    y = ops.dropout(jnp.ones((n // 100, 100)), rate, jax.random.key(0))
    assert float(jnp.mean(y == 0)) == pytest.approx(rate, abs=5 * (rate * (1 - rate) / n) ** 0.5)
    assert np.unique(np.asarray(y)[np.asarray(y) != 0]) == pytest.approx([1 / (1 - rate)], rel=2e-4)
    assert float(jnp.mean(y)) == pytest.approx(1, abs=5 * (rate / (1 - rate) / n) ** 0.5)


def test_dropout_masks_of_distinct_keys_and_of_neighbours_are_independent():
    x, keys = jnp.ones(100_000), jax.random.split(jax.random.key(0), 2)
    first, second = (np.asarray(ops.dropout(x, 0.5, key)) > 0 for key in keys)
    noise = 5 / 100_000**0.5
    for other in (second, np.roll(first, 1), np.roll(first, 2), np.roll(first, 50_000)):
        assert np.corrcoef(first, other)[0, 1] == pytest.approx(0, abs=noise)
    assert (np.asarray(ops.dropout(x, 0.5, keys[0])) > 0).tolist() == first.tolist()


def test_dropout_without_a_key_or_a_rate_is_the_identity():
    x = normal(0, 3, 4)
    assert ops.dropout(x, 0.5, None) is x
    assert ops.dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_of_an_odd_number_of_elements_keeps_the_shape():
    assert ops.dropout(jnp.ones((3, 5, 7)), 0.5, jax.random.key(0)).shape == (3, 5, 7)
