"""All of JAX's transformations and its strict modes, on the model's forward pass, its loss and its generator."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALTERNATING, TINY, exhaustive, make_model, random_ids, to_numpy

from jaxgpt import ComputeConfig, Temperature, evaluate, generate, look_inside, prepare, score
from jaxgpt.model import GPT, reference
from jaxgpt.model.attention import blocked, choice
from jaxgpt.training import model_loss

pytestmark = pytest.mark.usefixtures("compiled_quickly")

UNTIED = TINY.replace(tie_embeddings=False, attention_pattern="alternating", attention_window=5)
VARIANTS = {
    "dense": (TINY, {}),
    "scanned, alternating, remat": (ALTERNATING, {"scan_layers": True, "remat": "block"}),
    "untied, banded": (UNTIED, {}),
    "remat dots": (TINY, {"remat": "dots"}),
}


def variants(default):
    """All of them, of which the default tier takes one."""
    cases = [(pytest.param if name == default else exhaustive)(*VARIANTS[name], id=name) for name in VARIANTS]
    return pytest.mark.parametrize(("config", "compute"), cases)


@pytest.fixture(autouse=True)
def _several_query_blocks(monkeypatch):
    in_blocks = choice.BACKENDS["blocked"]._replace(context=functools.partial(blocked, query_block=4))
    monkeypatch.setitem(choice.BACKENDS, "blocked", in_blocks)


def both(config, compute):
    """(model with hand-written derivatives, model with JAX's own, parameters)."""
    model, params = make_model(config, **compute)
    return model, GPT(config, model.compute.replace(custom_derivatives=False)), params


def mean_loss(model, params, ids, chunk=6):
    total, count = model_loss(model, params, ids[:, :-1], ids[:, 1:], chunk=chunk)
    return total / count


def direction(params, seed=2):
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def dot(x, y):
    return sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


@variants("dense")
def test_both_kinds_of_derivatives_give_the_same_loss_and_gradient(config, compute):
    own, plain, params = both(config, compute)
    ids = random_ids(config, 2, 14)
    (value, gradient), (plain_value, plain_gradient) = (
        jax.jit(jax.value_and_grad(functools.partial(mean_loss, model)))(params, ids) for model in (own, plain)
    )
    np.testing.assert_allclose(plain_value, value, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), plain_gradient, gradient)


@variants("scanned, alternating, remat")
def test_forward_mode_gives_the_slope_of_the_float64_loss(config, compute):
    _, plain, params = both(config, compute)
    ids, along = random_ids(config, 2, 14), direction(params)
    loss, slope = jax.jit(lambda p, t: jax.jvp(lambda p: mean_loss(plain, p, ids), (p,), (t,)))(params, along)
    exact, step = to_numpy(params), 1e-6
    ahead, behind = (
        reference.loss(
            jax.tree.map(lambda p, t, s=s: p + s * step * np.asarray(t, np.float64), exact, along), config, ids
        )
        for s in (1, -1)
    )
    assert float(loss) == pytest.approx((ahead + behind) / 2, rel=1e-5)
    assert float(slope) == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


@pytest.mark.exhaustive
@variants("dense")
def test_forward_over_reverse_equals_reverse_over_reverse(config, compute):
    _, plain, params = both(config, compute)
    ids, along = random_ids(config, 1, 9), direction(params)
    gradient = jax.grad(lambda p: mean_loss(plain, p, ids))
    forward = jax.jit(lambda p, t: jax.jvp(gradient, (p,), (t,))[1])(params, along)

    def slope(p, t):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient(p)), jax.tree.leaves(t), strict=True))

    reverse = jax.jit(jax.grad(slope))(params, along)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4), forward, reverse)


def test_jacfwd_and_hessian_of_one_parameter():
    _, plain, params = both(TINY, {})
    ids = random_ids(TINY, 1, 8)
    shift = params["final_norm"]["shift"]

    def loss(shift):
        return mean_loss(plain, {**params, "final_norm": {**params["final_norm"], "shift": shift}}, ids)

    forward, reverse = jax.jit(lambda shift: (jax.jacfwd(loss)(shift), jax.grad(loss)(shift)))(shift)
    np.testing.assert_allclose(forward, reverse, atol=1e-6)
    hessian = jax.jit(jax.hessian(loss))(shift)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
    assert np.linalg.eigvalsh(hessian).min() > -1e-5  # the loss is convex in the logits, and they are linear in it
    assert np.linalg.eigvalsh(hessian).max() > 1e-3


@pytest.mark.parametrize("custom_derivatives", [True, exhaustive(False)])
def test_vmap_over_texts_and_over_models_equals_one_at_a_time(custom_derivatives):
    model, params = make_model(TINY, custom_derivatives=custom_derivatives)
    ids = random_ids(TINY, 3, 14)
    gradient = jax.grad(lambda p, row: mean_loss(model, p, row[None]))
    one = jax.jit(gradient)
    alone = [one(params, row) for row in ids]
    together = jax.jit(jax.vmap(gradient, (None, 0)))(params, ids)
    jax.tree.map(
        lambda stacked, *rows: np.testing.assert_allclose(stacked, np.stack(rows), atol=1e-6), together, *alone
    )
    models = [make_model(TINY, seed)[1] for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    logits = jax.jit(jax.vmap(lambda p: model.apply({"params": p}, ids)))(stacked)
    for got, params in zip(logits, models, strict=True):
        np.testing.assert_allclose(got, reference.gpt(to_numpy(params), TINY, ids), atol=2e-5)


def test_forward_mode_through_hand_written_derivatives_is_refused_by_jax():
    """The plain form exists for this."""
    own, _, params = both(TINY, {})
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: mean_loss(own, p, random_ids(TINY, 1, 8)), (params,), (params,))


@pytest.mark.parametrize("dtype", ["float32", exhaustive("bfloat16"), exhaustive("int8")])
def test_nothing_crosses_to_the_device_unasked(dtype):
    model, params = prepare(*make_model(TINY), dtype)
    key = jax.random.key(0)
    with jax.transfer_guard("disallow"):
        # Past the context of 16 too, where no cache is used.
        greedy = generate(model, params, [[1, 2, 3], [4]], 20, stop_ids=[96])
        drawn = generate(model, params, [[1, 2, 3], [4]], 4, sampler=Temperature(0.8), key=key)
    assert [len(row) for row in drawn.tokens] == [7, 5]
    assert len(greedy.tokens[0]) > 4


def test_nothing_crosses_unasked_while_evaluating_scoring_and_looking_inside(tiny):
    model, params = make_model(TINY.replace(vocab_size=257, tokenizer="bytes"))
    with jax.transfer_guard("disallow"):
        assert evaluate(model, params, np.arange(40)).tokens == 39
        assert score(model, params, [[1, 2]], [[[3, 4]]])[0][0].logprob < 0
        assert look_inside(model, params, [1, 2, 3], top=2).ids_T.tolist() == [1, 2, 3]


def test_the_strict_modes_are_on():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(3) + jnp.ones(3, jnp.int32)
    assert ComputeConfig().custom_derivatives
