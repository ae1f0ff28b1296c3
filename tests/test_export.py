"""The forward pass and the generator lower for every platform of JAX, on a machine that has only a CPU."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, random_ids

from jaxgpt.config import ComputeConfig
from jaxgpt.generation.decode import scan_generate
from jaxgpt.generation.sampling import Temperature
from jaxgpt.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PLATFORMS = ("cpu", "cuda", "tpu")


def abstract_params(model):
    """Returns shapes and types only: nothing is allocated."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]


@pytest.mark.parametrize("compute", [{}, {"scan_layers": True, "dtype": "bfloat16", "remat": "block"}])
def test_forward_exports_for_every_platform(compute):
    model = GPT(TINY, ComputeConfig(**compute))
    forward = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    exported = jax.export.export(forward, platforms=PLATFORMS)(abstract_params(model), ids)
    assert exported.platforms == PLATFORMS
    assert exported.out_avals[0].shape == (2, 16, TINY.vocab_size)
    assert exported.out_avals[0].dtype == jnp.float32


def test_exported_forward_computes_the_same(tiny):
    model, params = tiny
    ids = random_ids(TINY, 2, 16)
    forward = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    exported = jax.export.export(forward, platforms=PLATFORMS)(params, ids)
    np.testing.assert_allclose(exported.call(params, ids), forward(params, ids), atol=1e-6)


def test_loss_gradient_exports_for_every_platform():
    model = GPT(TINY.replace(drop_rate=0.1))

    def loss(params, ids, key):
        logits = model.apply({"params": params}, ids, deterministic=False, rngs={"dropout": key})
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    params = abstract_params(model)
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=PLATFORMS)(params, ids, jax.random.key(0))
    assert [aval.shape for aval in exported.out_avals] == [leaf.shape for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize("sampler", [exhaustive(None), Temperature(0.8)])
def test_generator_exports_for_every_platform_and_generates_the_same(tiny, sampler):
    model, params = tiny
    ids = random_ids(TINY, 2, 5)
    key = None if sampler is None else jax.random.key(7)
    # 5 + 14 ids: first within the context of 16, then past it.
    run = jax.jit(lambda params, ids, key: scan_generate(model, params, ids, 14, sampler=sampler, key=key))
    exported = jax.export.export(run, platforms=PLATFORMS)(params, ids, key)
    assert exported.platforms == PLATFORMS
    assert exported.out_avals[0].shape == (2, 14)
    np.testing.assert_array_equal(exported.call(params, ids, key), run(params, ids, key))
