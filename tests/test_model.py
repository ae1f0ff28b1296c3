"""The model against the float64 reference, and other promises about its modules and parameters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ALTERNATING,
    SCALED,
    TINY,
    cross_entropy,
    exhaustive,
    gradient_errors,
    grid,
    logits_error,
    make_model,
    random_ids,
    stack_blocks,
    to_numpy,
)

import jaxgpt.model.gpt as model_module
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.model import reference
from jaxgpt.model.attention import attend
from jaxgpt.model.gpt import GPT, FeedForward, LayerNorm, MultiHeadAttention, TransformerBlock

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

TOLERANCE = 2e-5  # tolerance of float32 logits against float64

CONFIGS = {
    "gpt2": TINY,
    "book": TINY.replace(tie_embeddings=False, qkv_bias=False),
    "untied": TINY.replace(tie_embeddings=False),
    "nanogpt-without-bias": TINY.replace(bias=False, qkv_bias=False),
    "only-qkv-bias": TINY.replace(bias=False),
    "exact-gelu": TINY.replace(activation="gelu"),
    "relu": TINY.replace(activation="relu"),
    "silu": TINY.replace(activation="silu"),
    "tanh": TINY.replace(activation="tanh"),
    "scaled-by-layer": SCALED,
    "unscaled": TINY.replace(scale_attn_weights=False),
    "unscaled-but-by-layer": SCALED.replace(scale_attn_weights=False),
    "odd-sizes": TINY.replace(vocab_size=101, context_length=13, emb_dim=35, n_heads=5, n_layers=3, ffn_dim=37),
    "smallest": TINY.replace(vocab_size=2, emb_dim=3, n_heads=1, n_layers=1),
    "heads-of-width-one": TINY.replace(n_heads=24),
    "large-eps": TINY.replace(layer_norm_eps=0.1),
    "alternating": ALTERNATING,
    "alternating-band-of-one": ALTERNATING.replace(attention_window=1),
    "alternating-band-of-all": ALTERNATING.replace(attention_window=16),
}

dense_or_alternating = pytest.mark.parametrize("config", [TINY, ALTERNATING], ids=["dense", "alternating"])
DEFAULT = (
    *("book", "nanogpt-without-bias", "exact-gelu", "odd-sizes", "large-eps", "alternating"),
    *("scaled-by-layer", "unscaled-but-by-layer"),
)
each_config = pytest.mark.parametrize(
    "config", [pytest.param(c, id=name) if name in DEFAULT else exhaustive(c, id=name) for name, c in CONFIGS.items()]
)


@each_config
def test_logits_equal_the_reference(config):
    model, params = make_model(config)
    for T in (1, config.context_length):
        assert logits_error(model, params, random_ids(config, 2, T)) < TOLERANCE


def test_logits_equal_the_reference_at_the_scale_of_gpt2s_embeddings():
    # Small embeddings make the first LayerNorm's eps visible.
    model, params = make_model(TINY.replace(tie_embeddings=False))
    params |= {name: jax.tree.map(lambda x: x / 30, params[name]) for name in ("tok_emb", "pos_emb")}
    assert logits_error(model, params, random_ids(TINY, 2, 16)) < TOLERANCE


@dense_or_alternating
def test_logits_equal_the_reference_when_attention_takes_several_query_blocks(config, monkeypatch):
    monkeypatch.setattr(model_module, "attend", functools.partial(attend, query_block=4))
    assert logits_error(*make_model(config), random_ids(config, 2, 16)) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        exhaustive(TINY, id="dense"),
        pytest.param(ALTERNATING, id="alternating"),
        pytest.param(SCALED, id="scaled"),
        pytest.param(SCALED.replace(attention_pattern="dense"), id="scaled-dense"),
        exhaustive(SCALED.replace(n_layers=1), id="scaled-one-layer"),
    ],
)
def test_scanned_layers_give_the_same_logits(config):
    _, params = make_model(config)
    stacked = stack_blocks(params, config.n_layers)
    scanned = GPT(config, ComputeConfig(scan_layers=True))
    ids = random_ids(config, 2, 16)
    assert logits_error(scanned, stacked, ids) < TOLERANCE
    expected = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(scanned.init, jax.random.key(0), ids)["params"])
    assert jax.tree.map(jnp.shape, stacked) == expected


@functools.cache
def plain_gradient(config):
    model, params = make_model(config)
    return jax.jit(jax.grad(functools.partial(cross_entropy, model)))(params, random_ids(config, 2, 12))


@pytest.mark.parametrize(
    "name",
    [
        exhaustive("gpt2"),
        exhaustive("book"),
        exhaustive("nanogpt-without-bias"),
        exhaustive("exact-gelu"),
        "alternating",
        exhaustive("scaled-by-layer"),
        "unscaled-but-by-layer",
    ],
)
def test_gradient_of_the_loss_equals_finite_differences_of_the_reference(name):
    config = CONFIGS[name]
    model, params = make_model(config)
    errors = gradient_errors(model, params, random_ids(config, 2, 12))
    assert len(errors) == len(jax.tree.leaves(params))
    assert max(errors.values()) < 1e-4, errors


def test_loss_equals_the_reference(tiny):
    model, params = tiny
    ids = random_ids(TINY, 3, 11)
    assert float(cross_entropy(model, params, ids)) == pytest.approx(
        reference.loss(to_numpy(params), TINY, ids), rel=1e-6
    )


@grid(
    1,
    remat=["none", "block", "dots"],
    scan_layers=[False, True],
    config={"dense": TINY, "scaled": SCALED, "scaled-dense": SCALED.replace(attention_pattern="dense")},
)
def test_rematerialisation_and_scanning_change_neither_logits_nor_gradients(remat, scan_layers, config):
    _, params = make_model(config)
    model = GPT(config, ComputeConfig(remat=remat, scan_layers=scan_layers))
    want = plain_gradient(config)
    if scan_layers:
        params, want = (stack_blocks(tree, config.n_layers) for tree in (params, want))
    assert logits_error(model, params, random_ids(config, 2, 12)) < TOLERANCE
    got = jax.jit(jax.grad(functools.partial(cross_entropy, model)))(params, random_ids(config, 2, 12))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, want)


def test_activations_in_bfloat16_round_what_passes_between_the_layers_and_nothing_else():
    (model, params), ids = make_model(TINY, activation_dtype="bfloat16"), random_ids(TINY, 2, 12)
    run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    logits, seen = run({"params": params}, ids)
    seen = seen["intermediates"]
    assert {seen[name][0].dtype.name for name in ("embedded", "normed")} == {"bfloat16"}
    assert seen["trf_blocks_1"]["output"][0].dtype == jnp.bfloat16
    assert seen["trf_blocks_1"]["att"]["weights"][0].dtype == logits.dtype == jnp.float32
    want = reference.gpt(to_numpy(params), TINY, ids)
    assert 1e-3 < np.linalg.norm(np.asarray(logits) - want) / np.linalg.norm(want) < 0.02
    got = jax.jit(jax.grad(functools.partial(cross_entropy, model)))(params, ids)
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(plain_gradient(TINY)), strict=True):
        assert mine.dtype == jnp.float32
        assert np.linalg.norm(mine - exact) < 0.05 * np.linalg.norm(exact)


def test_rematerialisation_repeats_the_same_dropout():
    gradients = []
    for remat in ("none", "block"):
        model, params = make_model(TINY.replace(drop_rate=0.3), remat=remat)

        def total(params, model=model):
            rngs = {"dropout": jax.random.key(3)}
            logits = model.apply({"params": params}, random_ids(TINY, 2, 8), deterministic=False, rngs=rngs)
            return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

        gradients.append(jax.jit(jax.grad(total))(params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *gradients)


@grid(1, query_block=[3, 128], window=[None, 1, 4])
def test_each_logit_depends_on_all_positions_that_it_may_see_and_on_no_other(query_block, window, monkeypatch):
    monkeypatch.setattr(model_module, "attend", functools.partial(attend, query_block=query_block))
    model, params = make_model()
    if window:  # the first layer, which is dense, mixes no positions, so only the banded layer does
        model = GPT(TINY.replace(attention_pattern="alternating", attention_window=window))
        first = params["trf_blocks_0"]
        silent = jax.tree.map(jnp.zeros_like, first["att"]["out_proj"])
        params = {**params, "trf_blocks_0": {**first, "att": {**first["att"], "out_proj": silent}}}
    T = 9
    ids = random_ids(TINY, 1, T)
    probe_V = jnp.asarray(np.random.default_rng(0).normal(size=TINY.vocab_size), jnp.float32)

    def probed_T(embedding_CxD):  # row s of the position table enters at position s only
        return model.apply({"params": {**params, "pos_emb": {"weight": embedding_CxD}}}, ids)[0] @ probe_V

    influence_TxCxD = jax.jit(jax.jacrev(probed_T))(params["pos_emb"]["weight"])
    influence_TxT = np.abs(influence_TxCxD).max(-1)[:, :T]
    distance_TxT = np.arange(T)[:, None] - np.arange(T)
    visible = (distance_TxT >= 0) & (distance_TxT < (window or T))
    assert (influence_TxT[~visible] == 0).all()
    assert (influence_TxT[visible] > 1e-6).all()


def test_rows_of_a_batch_do_not_touch_each_other(tiny):
    model, params = tiny
    ids = random_ids(TINY, 3, 9)
    forward = jax.jit(model.apply)
    together = forward({"params": params}, ids)
    for row, alone in zip(together, ids, strict=True):
        np.testing.assert_allclose(row, forward({"params": params}, alone[None])[0], atol=1e-5)


@each_config
def test_each_module_alone_equals_the_reference(config):
    _, params = make_model(config)
    block = params["trf_blocks_0"]
    x = np.random.default_rng(5).normal(size=(2, 7, config.emb_dim)).astype(np.float32)
    x64, block64 = x.astype(np.float64), to_numpy(block)

    def check(got, want):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=TOLERANCE)

    norm = LayerNorm(config).apply({"params": block["norm1"]}, x)
    check(norm, reference.layer_norm(block64["norm1"], x64, config.layer_norm_eps))
    forward = FeedForward(config).apply({"params": block["ff"]}, x)
    check(forward, reference.feed_forward(block64["ff"], config, x64))
    attended, _ = MultiHeadAttention(config).apply({"params": block["att"]}, x)
    check(attended, np.stack([reference.attention(block64["att"], config, row) for row in x64]))
    last = config.n_layers - 1
    for banded, layer in ((False, 0), (True, last)):
        y, _ = TransformerBlock(config).apply({"params": block}, x, banded=banded, scale=config.attention_scales[layer])
        window = config.attention_window if banded else None
        check(y, np.stack([reference.block(block64, config, row, window, layer) for row in x64]))


def test_all_intermediates_are_returned_on_request(tiny):
    model, params = tiny
    ids = random_ids(TINY, 2, 9)
    logits, state = model.apply({"params": params}, ids, mutable=["intermediates"])
    np.testing.assert_allclose(logits, model.apply({"params": params}, ids), atol=1e-6)
    seen, p64 = state["intermediates"], to_numpy(params)

    embedded = p64["tok_emb"]["weight"][ids] + p64["pos_emb"]["weight"][:9]
    np.testing.assert_allclose(seen["embedded"][0], embedded, atol=TOLERANCE)
    for b in range(2):
        x = embedded[b]
        for i in range(TINY.n_layers):
            x = reference.block(p64[f"trf_blocks_{i}"], TINY, x)
            np.testing.assert_allclose(seen[f"trf_blocks_{i}"]["output"][0][b], x, atol=TOLERANCE)
        x = reference.layer_norm(p64["final_norm"], x, TINY.layer_norm_eps)
        np.testing.assert_allclose(seen["normed"][0][b], x, atol=TOLERANCE)
    for i in range(TINY.n_layers):
        weights_BxHxTxT = np.asarray(seen[f"trf_blocks_{i}"]["att"]["weights"][0])
        assert weights_BxHxTxT.shape == (2, TINY.n_heads, 9, 9)
        np.testing.assert_allclose(weights_BxHxTxT.sum(-1), 1, atol=1e-6)
        assert not np.triu(weights_BxHxTxT, 1).any()
        assert (np.tril(weights_BxHxTxT) > 0).sum() == 2 * TINY.n_heads * 45


def test_scanned_intermediates_are_stacked_over_layers():
    model, params = make_model(TINY, scan_layers=True)
    _, state = model.apply({"params": params}, random_ids(TINY, 2, 9), mutable=["intermediates"])
    blocks = state["intermediates"]["trf_blocks"]
    assert blocks["att"]["weights"][0].shape == (2, 2, TINY.n_heads, 9, 9)
    assert blocks["output"][0].shape == (2, 2, 9, TINY.emb_dim)


def test_a_scan_that_alternates_returns_the_intermediates_of_separate_blocks():
    model, params = make_model(ALTERNATING)
    ids = random_ids(ALTERNATING, 2, 9)
    _, separate = model.apply({"params": params}, ids, mutable=["intermediates"])
    scanned = GPT(ALTERNATING, ComputeConfig(scan_layers=True))
    _, stacked = scanned.apply({"params": stack_blocks(params, 3)}, ids, mutable=["intermediates"])
    for i in range(3):
        here = separate["intermediates"][f"trf_blocks_{i}"]
        weights_BxHxTxT = np.asarray(here["att"]["weights"][0])
        assert (np.tril(weights_BxHxTxT, -5) == 0).all() == (i == 1)
        there = jax.tree.map(lambda x, i=i: x[i], stacked["intermediates"]["trf_blocks"])
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), here, there)


def test_a_scan_that_alternates_drops_weights_by_its_key():
    model, params = make_model(ALTERNATING.replace(drop_rate_attn=0.5), scan_layers=True)
    ids = random_ids(ALTERNATING, 2, 9)
    run = jax.jit(lambda key: model.apply({"params": params}, ids, deterministic=False, rngs={"dropout": key}))
    first, again, other = (run(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 0.1


def relative_error(got, want):
    return float(np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(want).max())


@pytest.mark.parametrize("param_dtype", ["float32", exhaustive("bfloat16")])
def test_bfloat16_compute_stays_within_three_percent_and_returns_float32(param_dtype):
    # bfloat16 has 8 significant bits: 0.4% per rounding, and several roundings per layer.
    model, params = make_model(TINY, dtype="bfloat16", param_dtype=param_dtype)
    ids = random_ids(TINY, 2, 16)
    logits = model.apply({"params": params}, ids)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == param_dtype for leaf in jax.tree.leaves(params))
    error = relative_error(logits, reference.gpt(to_numpy(params), TINY, ids))
    assert 1e-4 < error < 0.03  # the lower bound: it did compute in bfloat16


def test_bfloat16_gradients_stay_within_five_percent_of_float32():
    model, params = make_model(TINY, dtype="bfloat16")
    got = jax.jit(jax.grad(functools.partial(cross_entropy, model)))(params, random_ids(TINY, 2, 12))
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(plain_gradient(TINY)), strict=True):
        assert mine.dtype == jnp.float32
        assert np.linalg.norm(mine - exact) < 0.05 * np.linalg.norm(exact) + 1e-6


def test_more_tokens_than_the_context_are_refused(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="17 tokens do not fit context_length=16"):
        model.apply({"params": params}, random_ids(TINY, 1, 17))


def test_the_tiny_relu_model_runs():
    config = GPTConfig(
        vocab_size=1000,
        context_length=32,
        emb_dim=16,
        n_heads=4,
        n_layers=2,
        activation="relu",
        tie_embeddings=False,
        qkv_bias=False,
    )
    model, ids = GPT(config), jnp.asarray([[42, 105, 10]])
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    logits = jax.jit(model.apply)({"params": params}, ids)[0]
    assert logits.shape == (3, 1000)
    assert logits_error(model, params, np.asarray(ids)) < TOLERANCE


def test_the_books_example_shape():
    model = GPT(GPTConfig.preset("book-124m", n_layers=1, emb_dim=48))
    ids = jnp.asarray([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    logits = jax.jit(model.apply)({"params": params}, ids)
    assert (logits.shape, logits.dtype) == ((2, 4, 50257), jnp.float32)
    assert bool(jnp.isfinite(logits).all())


def test_a_scanned_models_program_does_not_grow_with_depth():
    def lines(n_layers, scan_layers):
        model = GPT(TINY.replace(n_layers=n_layers), ComputeConfig(scan_layers=scan_layers))
        ids = jnp.zeros((1, 8), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        loss = lambda params: model.apply({"params": params}, ids).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).as_text().count("\n")

    assert lines(4, True) == lines(96, True)
    assert lines(4, False) > 1.5 * lines(2, False)
