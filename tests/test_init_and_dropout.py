"""What `model.init` draws, leaf by leaf, and where dropout acts."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, grid, make_model, random_ids

from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.model.gpt import GPT, MultiHeadAttention, TransformerBlock

pytestmark = pytest.mark.usefixtures("compiled_quickly")

WIDE = GPTConfig(
    vocab_size=300, context_length=64, emb_dim=64, n_heads=4, n_layers=3, drop_rate=0.0, tie_embeddings=False
)


def init(config, seed=0, **compute):
    return jax.jit(GPT(config, ComputeConfig(**compute)).init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))[
        "params"
    ]


def named_leaves(tree, prefix=""):
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from named_leaves(child, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(child, np.float64)


@grid(1, param_dtype=["float32", "bfloat16"], scan_layers=[False, True])
def test_each_leaf_is_initialised_as_gpt2s(scan_layers, param_dtype):
    params = init(WIDE, scan_layers=scan_layers, param_dtype=param_dtype)
    kinds = set()
    for name, leaf in named_leaves(params):
        kind = name.rsplit("/", 1)[1]
        kinds.add(kind)
        if kind != "weight":
            assert (leaf == (1 if kind == "scale" else 0)).all(), name
            continue
        std = 0.02
        if name.startswith("pos_emb"):
            std = 0.01
        if "out_proj" in name or "fc_out" in name:
            std = 0.02 / math.sqrt(2 * 3)
        n = leaf.size  # below: five standard errors
        assert leaf.std() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
        assert leaf.mean() == pytest.approx(0, abs=5 * std / math.sqrt(n)), name
        assert np.abs(leaf).max() > 3 * std, name  # not truncated
    assert kinds == {"weight", "bias", "scale", "shift"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {param_dtype}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_no_two_weights_start_equal(scan_layers):
    params = init(WIDE, scan_layers=scan_layers)
    rows = [
        row
        for name, leaf in named_leaves(params)
        if name.endswith("weight")
        for row in leaf.reshape(-1, leaf.shape[-1])
    ]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_embedding_std_sets_both_embeddings_and_nothing_else():
    wide = init(WIDE.replace(embedding_std=1.0))
    usual = init(WIDE)
    for (name, leaf), (_, plain) in zip(named_leaves(wide), named_leaves(usual), strict=True):
        scale = 50 if name.startswith(("tok_emb", "pos_emb")) else 1
        np.testing.assert_allclose(leaf, scale * plain, rtol=1e-6, err_msg=name)


def test_init_is_reproducible_from_its_key():
    first, again, other = init(TINY, 1), init(TINY, 1), init(TINY, 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    assert bool((first["tok_emb"]["weight"] != other["tok_emb"]["weight"]).any())


def test_parameters_do_not_depend_on_the_shape_of_the_ids():
    model = GPT(TINY)
    short = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    long = jax.jit(model.init)(jax.random.key(0), jnp.zeros((3, 9), jnp.int32))["params"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), short, long))


def test_params_are_a_plain_nested_dict_of_the_documented_tree():
    params = init(TINY.replace(tie_embeddings=False, n_layers=1))

    def plain(node):
        return isinstance(node, jax.Array) or (type(node) is dict and all(plain(child) for child in node.values()))

    assert plain(params)
    V, C, D, F = 97, 16, 24, 96
    norm = {"scale": (D,), "shift": (D,)}
    assert jax.tree.map(jnp.shape, params) == {
        "tok_emb": {"weight": (V, D)},
        "pos_emb": {"weight": (C, D)},
        "trf_blocks_0": {
            "norm1": norm,
            "att": {
                "qkv": {"weight": (3, D, D), "bias": (3, D)},
                "out_proj": {"weight": (D, D), "bias": (D,)},
            },
            "norm2": norm,
            "ff": {
                "fc_in": {"weight": (F, D), "bias": (F,)},
                "fc_out": {"weight": (D, F), "bias": (D,)},
            },
        },
        "final_norm": norm,
        "out_head": {"weight": (V, D)},
    }


def test_switches_remove_exactly_their_leaves():
    full = {name for name, _ in named_leaves(init(TINY.replace(tie_embeddings=False)))}
    tied = {name for name, _ in named_leaves(init(TINY))}
    no_qkv = {name for name, _ in named_leaves(init(TINY.replace(tie_embeddings=False, qkv_bias=False)))}
    no_bias = {name for name, _ in named_leaves(init(TINY.replace(tie_embeddings=False, bias=False)))}
    assert full - tied == {"out_head/weight"}
    assert full - no_qkv == {f"trf_blocks_{i}/att/qkv/bias" for i in range(2)}
    gone = {name for name in full if name.endswith(("bias", "shift")) and "qkv" not in name}
    assert full - no_bias == gone
    assert tied | no_qkv | no_bias <= full


def run(config, key=None, ids=None, **compute):
    """Logits and intermediates; with a key, dropout is on."""
    model, params = make_model(config, **compute)
    ids = random_ids(config, 2, 12) if ids is None else ids
    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates"], deterministic=key is None))
    logits, state = apply({"params": params}, ids, rngs=None if key is None else {"dropout": key})
    return np.asarray(logits), state["intermediates"]


RATES = ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")


@grid(1, scan_layers=[False, True], rate=RATES)
def test_each_rate_alone_changes_the_output_by_key_and_only_when_asked(rate, scan_layers):
    config = TINY.replace(**{rate: 0.5})
    plain, _ = run(TINY, scan_layers=scan_layers)
    assert np.array_equal(run(config, scan_layers=scan_layers)[0], plain)
    first, again, other = (run(config, jax.random.key(seed), scan_layers=scan_layers)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - plain).max() > 0.1
    assert np.abs(first - other).max() > 0.1


def test_a_rate_of_zero_needs_no_rng():
    model, params = make_model(TINY)
    ids = random_ids(TINY, 2, 12)
    got = model.apply({"params": params}, ids, deterministic=False)
    assert np.array_equal(got, model.apply({"params": params}, ids))


def test_dropout_without_an_rng_is_an_error():
    model, params = make_model(TINY.replace(drop_rate=0.1))
    with pytest.raises(Exception, match="dropout"):
        model.apply({"params": params}, random_ids(TINY, 2, 12), deterministic=False)


def test_embedding_dropout_acts_on_the_sum_of_the_embeddings():
    config = TINY.replace(drop_rate_emb=0.4)
    ids = random_ids(config, 64, 16)
    embedded = np.asarray(run(config, jax.random.key(0), ids)[1]["embedded"][0])
    plain = np.asarray(run(config, None, ids)[1]["embedded"][0])
    dropped = embedded == 0
    assert dropped.mean() == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / dropped.size))
    np.testing.assert_allclose(embedded[~dropped], plain[~dropped] / 0.6, rtol=1e-4)
    assert not np.array_equal(dropped[0], dropped[1])  # each row has different masks


@pytest.mark.parametrize("rate", ["drop_rate_attn", "drop_rate_shortcut"])
def test_other_rates_leave_the_embeddings_alone(rate):
    config = TINY.replace(**{rate: 0.5})
    assert np.array_equal(run(config, jax.random.key(0))[1]["embedded"][0], run(config)[1]["embedded"][0])


def test_shortcut_dropout_acts_on_both_branches_and_never_on_the_stream():
    config = TINY.replace(drop_rate_shortcut=0.5)
    _, params = make_model(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16, config.emb_dim)), jnp.float32)
    y, _ = TransformerBlock(config).apply(
        {"params": params["trf_blocks_0"]}, x, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    untouched = np.asarray(y == x).mean()  # both branches are dropped: a quarter of the time if they draw independently
    assert untouched == pytest.approx(0.25, abs=5 * math.sqrt(0.1875 / x.size))


def test_attention_dropout_leaves_the_first_tokens_weight_dropped_or_doubled():
    # With one token the only weight is 1; dropped, the attention adds just its output bias.
    config = TINY.replace(drop_rate_attn=0.5, n_heads=1)
    _, params = make_model(config)
    att = params["trf_blocks_0"]["att"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2000, 1, config.emb_dim)), jnp.float32)
    module = MultiHeadAttention(config)
    bias = att["out_proj"]["bias"][None, None]
    plain = np.asarray(module.apply({"params": att}, x)[0] - bias)
    y, _ = module.apply({"params": att}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    dropped = np.asarray((y == bias).all(axis=(1, 2)))
    assert dropped.mean() == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 2000))
    np.testing.assert_allclose((y - bias)[~dropped], 2 * plain[~dropped], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [exhaustive(False), True])
def test_blocks_draw_their_own_masks(scan_layers):
    """Two equal blocks whose input is what dropout kept: equal masks would drop the same places."""
    config = TINY.replace(drop_rate_shortcut=0.5, vocab_size=5)
    model = GPT(config, ComputeConfig(scan_layers=scan_layers))
    params = jax.tree.map(jnp.zeros_like, init(config, scan_layers=scan_layers))

    def set_bias(path, leaf):  # each branch adds 1 where it is kept, whatever its input
        return jnp.ones_like(leaf) if path[-1].key == "bias" and path[-2].key == "fc_out" else leaf

    params = jax.tree_util.tree_map_with_path(set_bias, params)
    ids = jnp.zeros((8, 16), jnp.int32)
    _, state = model.apply(
        {"params": params},
        ids,
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
        mutable=["intermediates"],
    )
    seen = state["intermediates"]
    outputs = seen["trf_blocks"]["output"][0] if scan_layers else [seen[f"trf_blocks_{i}"]["output"][0] for i in (0, 1)]
    final = np.asarray(outputs[1]) / 2  # kept in neither, one or both blocks: 0, 1 or 2
    shares = [float((final.round() == times).mean()) for times in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=5 * math.sqrt(0.25 / final.size))
