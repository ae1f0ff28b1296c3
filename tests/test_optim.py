"""The optimizer against float64 arithmetic, written here from the papers' formulas."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, exhaustive, make_model, random_ids, stack_blocks, to_numpy

from jaxgpt.training.config import TrainConfig
from jaxgpt.training.loss import IGNORE, model_loss
from jaxgpt.training.optimizer import is_matrix, make_optimizer, schedule
from jaxgpt.training.step import abstract_state, init_state, make_step

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = TrainConfig(
    model=TINY, steps=20, batch_size=4, warmup_steps=4, learning_rate=3e-3, final_learning_rate=0.1, clip_norm=0.0
)


def learning_rate(config, step):
    """The expected learning rate at a step counted from 0."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak / (warmup + 1) + (peak - peak / (warmup + 1)) * step / warmup
    progress = min(1, (step - warmup) / (config.steps - warmup))
    low = config.final_learning_rate
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_is_warmup_then_cosine(warmup):
    config = dataclasses.replace(CONFIG, warmup_steps=warmup)
    rates = schedule(config, config.learning_rate)
    for step in range(25):
        assert float(rates(step)) == pytest.approx(learning_rate(config, step), rel=1e-5)
    assert 0 < float(rates(0)) <= config.learning_rate * (1 + 1e-6)
    assert float(rates(warmup)) == pytest.approx(config.learning_rate)
    assert float(rates(20)) == pytest.approx(0.1 * config.learning_rate)


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, with decoupled decay scaled by the learning rate."""

    def __init__(self, config, decayed):
        self.config, self.decayed, self.t, self.m, self.v = config, decayed, 0, {}, {}

    def update(self, params, grads):
        c, rate = self.config, learning_rate(self.config, self.t)
        self.t += 1
        for name, g in grads.items():
            self.m[name] = c.beta1 * self.m.get(name, 0) + (1 - c.beta1) * g
            self.v[name] = c.beta2 * self.v.get(name, 0) + (1 - c.beta2) * g**2
            m, v = self.m[name] / (1 - c.beta1**self.t), self.v[name] / (1 - c.beta2**self.t)
            decay = c.weight_decay * params[name] if self.decayed[name] else 0
            params[name] = params[name] - rate * (m / (np.sqrt(v) + 1e-8) + decay)


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_adamw_is_the_papers_with_decay_on_matrices_only(tiny):
    _, params = tiny
    tx = make_optimizer(CONFIG)
    opt_state = tx.init(params)
    by_hand = AdamW(CONFIG, flat(is_matrix(params)))
    exact = flat(to_numpy(params))
    rng = np.random.default_rng(0)
    for _ in range(6):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        by_hand.update(exact, flat(to_numpy(grads)))
    for name, want in exact.items():
        np.testing.assert_allclose(flat(params)[name], want, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("scan", [False, True])
def test_decay_spares_biases_scales_and_shifts(scan):
    _, params = make_model()
    params = stack_blocks(params, TINY.n_layers) if scan else params
    for name, decayed in flat(is_matrix(params)).items():
        assert decayed == name.endswith("['weight']")


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_a_step_is_optaxs_clipping_and_adamw_of_the_mean_losss_gradient(clip_norm):
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    ids = random_ids(TINY, 4, 17)
    ids[0, -1] = IGNORE  # only as a label: a count that is no power of two
    state = init_state(config)
    after, metrics = jax.jit(make_step(config))(state, ids)

    def mean(params):
        losses, count = model_loss(make_model()[0], params, ids[:, :-1], ids[:, 1:])
        return losses / count

    grads = jax.jit(jax.grad(mean))(state["params"])
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    assert (float(metrics["grad_norm"]) > clip_norm > 0) == (clip_norm == 0.5)
    adamw = optax.adamw(
        schedule(config, config.learning_rate), b2=config.beta2, weight_decay=config.weight_decay, mask=is_matrix
    )
    tx = optax.chain(clip, adamw)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = tx.update(grads, tx.init(state["params"]), state["params"])
    want = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path({name: after[name] for name in want}), jax.tree.leaves(want), strict=True
    ):
        # Of the keys' biases the gradient is rounding alone, as Adam's first step then is: far below its rate of 6e-4.
        atol = 1e-6 if path[0].key == "params" else 1e-8
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_a_donated_step_copies_nothing_of_its_state(compiled_fully):
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    ids = jax.ShapeDtypeStruct((4, 17), jnp.int32)
    text = jax.jit(make_step(config), donate_argnums=0).lower(abstract_state(config), ids).compile().as_text()
    assert "state__opt_state" in text
    copied = re.findall(r"= f32\S* copy\(\S*state__\S*\)", text)
    assert not copied


@pytest.mark.parametrize("scan", [False, True])
def test_muon_gives_block_matrices_orthogonal_updates_and_adamw_the_rest(scan):
    config = dataclasses.replace(CONFIG, optimizer="muon", weight_decay=0.0, warmup_steps=0)
    _, params = make_model()
    params = stack_blocks(params, TINY.n_layers) if scan else params
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    tx = make_optimizer(config)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, update in flat(updates).items():
        if "trf_blocks" in name and name.endswith("['weight']"):
            for matrix in np.asarray(update).reshape(-1, *update.shape[-2:]):
                singular = np.linalg.svd(matrix, compute_uv=False)
                assert singular.max() / singular.min() < 2.5, name  # Newton-Schulz leaves them within about 0.7..1.2
        else:
            # The first step of Adam is the sign of the gradient.
            np.testing.assert_allclose(update, -config.learning_rate * np.sign(flat(grads)[name]), rtol=1e-3)


@pytest.mark.parametrize("grad_accumulation", [2, exhaustive(4)])
def test_accumulated_step_equals_the_one_big_batch(grad_accumulation):
    config = dataclasses.replace(CONFIG, clip_norm=1.0)
    ids = random_ids(TINY, 4, 17)
    ids[0, -1] = IGNORE  # only as a label: the micro-batches then count differently
    state = init_state(config)
    big, big_metrics = jax.jit(make_step(config))(state, ids)
    small, small_metrics = jax.jit(make_step(dataclasses.replace(config, grad_accumulation=grad_accumulation)))(
        state, ids
    )
    assert float(small_metrics["loss"]) == pytest.approx(float(big_metrics["loss"]), rel=1e-6)
    assert float(small_metrics["grad_norm"]) == pytest.approx(float(big_metrics["grad_norm"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(small["opt_state"]), jax.tree.leaves(big["opt_state"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_step_takes_the_gradient_of_the_mean_loss():
    ids = random_ids(TINY, 4, 17)
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    state = init_state(config)
    _, metrics = jax.jit(make_step(config))(state, ids)

    def mean(params):
        losses, count = model_loss(make_model()[0], params, ids[:, :-1], ids[:, 1:])
        return losses / count

    grads = jax.jit(jax.grad(mean))(state["params"])
    norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_average_is_the_exponential_moving_average():
    config = dataclasses.replace(CONFIG, ema_decay=0.75)
    state = init_state(config)
    step = jax.jit(make_step(config))
    average = to_numpy(state["params"])
    for i in range(4):
        state, _ = step(state, random_ids(TINY, 4, 17, seed=i))
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p, np.float64), average, state["params"])
    for a, b in zip(jax.tree.leaves(state["ema_params"]), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_step_that_is_not_finite_changes_nothing_but_its_number():
    state = init_state(CONFIG)
    before = jax.tree.map(np.asarray, state)
    after, metrics = jax.jit(make_step(CONFIG))(state, jnp.full((4, 17), 10**6, jnp.int32))  # no such ids: NaN
    assert math.isnan(metrics["loss"])
    assert int(after["step"]) == 1
    for name in ("params", "opt_state"):
        for a, b in zip(jax.tree.leaves(after[name]), jax.tree.leaves(before[name]), strict=True):
            np.testing.assert_array_equal(a, b)
