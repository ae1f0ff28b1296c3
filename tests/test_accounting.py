"""Accounting reproduces every number of the published tables, and agrees with the model that is actually built."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import ALTERNATING, TINY, make_model, product_flops

from jaxgpt import accounting, prepare
from jaxgpt.config import PRESETS, ComputeConfig, GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.model.cache import Cache
from jaxgpt.model.gpt import GPT

# preset: (all parameters, parameters without the output head, MiB in float32)
TOTALS = {
    "gpt2": (124_439_808, 124_439_808, 474.70),
    "gpt2-medium": (354_823_168, 354_823_168, 1353.54),
    "gpt2-large": (774_030_080, 774_030_080, 2952.69),
    "gpt2-xl": (1_557_611_200, 1_557_611_200, 5941.82),
    "book-124m": (163_009_536, 124_412_160, 621.83),
    "book-355m": (406_212_608, 354_749_440, 1549.58),
    "book-774m": (838_220_800, 773_891_840, 3197.56),
    "book-1558m": (1_637_792_000, 1_557_380_800, 6247.68),
    "gpt3-125m": (125_226_240, 125_226_240, 477.70),
    "gpt3-350m": (355_871_744, 355_871_744, 1357.54),
    "gpt3-760m": (760_300_032, 760_300_032, 2900.31),
    "gpt3-1.3b": (1_315_723_264, 1_315_723_264, 5019.09),
    "gpt3-2.7b": (2_651_553_280, 2_651_553_280, 10114.87),
    "gpt3-6.7b": (6_658_404_352, 6_658_404_352, 25399.80),
    "gpt3-13b": (12_853_386_240, 12_853_386_240, 49031.78),
    "gpt3-175b": (174_604_259_328, 174_604_259_328, 666062.39),
}

SHAPES = {
    "gpt2": TINY,
    "book": TINY.replace(tie_embeddings=False, qkv_bias=False),
    "no biases": TINY.replace(bias=False, qkv_bias=False),
    "biases in qkv only": TINY.replace(bias=False),
    "odd feed-forward": TINY.replace(ffn_dim=37, tie_embeddings=False),
    "one layer": TINY.replace(n_layers=1),
    "alternating": ALTERNATING,
    "wide": GPTConfig.preset("gpt3-175b", n_layers=2),  # shapes alone: nothing is allocated
}


def built_shapes(config: GPTConfig, **compute: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tree that the model itself builds."""
    model = GPT(config, ComputeConfig(**compute))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_every_preset_has_its_totals():
    assert TOTALS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_the_published_sizes(name):
    config = GPTConfig.preset(name)
    counts = accounting.count_parameters(config)
    mebibytes = round(accounting.parameter_bytes(config) / accounting.MIB, 2)
    assert (counts.total, counts.total - counts.out_head, mebibytes) == TOTALS[name]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt3-")])
def test_gpt3_totals_equal_the_closed_form(name):
    config = GPTConfig.preset(name)
    L, D, V, C = config.n_layers, config.emb_dim, config.vocab_size, config.context_length
    assert accounting.count_parameters(config).total == 12 * L * D**2 + 13 * L * D + 2 * D + (V + C) * D


def test_components_of_the_books_small_model():
    counts = accounting.count_parameters(GPTConfig.preset("book-124m"))
    assert counts == accounting.Counts(
        tok_emb=50257 * 768,
        pos_emb=1024 * 768,
        attention=12 * 2_360_064,
        feed_forward=12 * 4_722_432,
        norms=12 * 3_072 + 2 * 768,
        out_head=50257 * 768,
    )
    assert counts.without_embeddings == 12 * (2_360_064 + 4_722_432 + 3_072) + 2 * 768


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_are_those_of_the_model(config):
    assert accounting.parameter_shapes(config) == built_shapes(config)


def test_shapes_come_in_the_order_of_the_datas_way():
    order = list(dict.fromkeys(path.split("/")[0] for path in accounting.parameter_shapes(SHAPES["book"])))
    assert order == ["tok_emb", "pos_emb", "trf_blocks_0", "trf_blocks_1", "final_norm", "out_head"]


def test_scanned_layers_count_the_same():
    built = sum(math.prod(shape) for shape in built_shapes(TINY, scan_layers=True).values())
    assert accounting.count_parameters(TINY).total == built


def test_sizes_are_written_in_binary_units():
    assert accounting.format_bytes(3 * 2**30) == "3.00 GiB"
    assert accounting.format_bytes(2**27) == "0.12 GiB"
    assert accounting.format_bytes(100 * 10**6) == "95.4 MiB"


def test_bytes_by_dtype():
    total = accounting.count_parameters(TINY).total
    assert accounting.parameter_bytes(TINY) == 4 * total
    assert accounting.parameter_bytes(TINY, "bfloat16") == 2 * total
    _, params = prepare(*make_model(), "int8")
    assert accounting.parameter_bytes(TINY, "int8") == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, int8, not 'int4'"):
        accounting.parameter_bytes(TINY, "int4")


def test_forward_flops_of_the_small_model():
    flops = accounting.forward_flops(GPTConfig.preset("book-124m"), batch=2, length=1024)
    assert flops.linear == 505_987_203_072 == 2 * 2 * 1024 * (12 * 12 * 768**2 + 50257 * 768)
    assert flops.attention == 2 * 2 * 2 * 1024 * 1024 * 768 * 12
    assert flops.total == flops.linear + flops.attention


@pytest.mark.parametrize("name", ["gpt2", "odd feed-forward"])
def test_flops_are_those_of_the_models_own_products(name):
    config, ids = SHAPES[name], jnp.zeros((3, 7), jnp.int32)
    model = GPT(config)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]

    def total(params):
        return jnp.sum(model.apply({"params": params}, ids))

    assert product_flops(jax.make_jaxpr(total)(params).jaxpr) == accounting.forward_flops(config, 3, 7)
    # Attention may recompute its scores in the backward pass, so only the linear layers are exact there.
    backward = product_flops(jax.make_jaxpr(jax.grad(total))(params).jaxpr)
    assert backward.linear == accounting.training_flops(config, 3, 7).linear


def test_a_banded_layer_counts_its_band():
    plain = ALTERNATING.replace(attention_pattern="dense")
    for T, square, triangle, band, part_of_band in ((16, 256, 136, 80, 70), (5, 25, 15, 25, 15), (2, 4, 3, 4, 3)):
        flops, dense = (accounting.forward_flops(config, 3, T) for config in (ALTERNATING, plain))
        assert flops.linear == dense.linear
        assert flops.attention == 4 * 3 * 24 * (2 * square + band)
        assert dense.attention == 4 * 3 * 24 * 3 * square
        assert accounting.causal_attention_flops(ALTERNATING, 3, T) == 4 * 3 * 24 * (2 * triangle + part_of_band)
        assert accounting.causal_attention_flops(plain, 3, T) == 4 * 3 * 24 * 3 * triangle
        assert accounting.training_flops(ALTERNATING, 3, T).attention == 3 * flops.attention
    with pytest.raises(ValueError, match="length 17 is beyond context_length=16"):
        accounting.causal_attention_flops(ALTERNATING, 1, 17)


def test_remat_adds_a_forward_pass_without_what_no_gradient_needs():
    forward = accounting.forward_flops(TINY, 2, 8)
    head_and_fc_out = 2 * 2 * 8 * TINY.emb_dim * (TINY.vocab_size + TINY.n_layers * TINY.ffn_dim)
    plain, dots, block = (accounting.training_flops(TINY, 2, 8, remat) for remat in ("none", "dots", "block"))
    assert (plain.linear, plain.attention) == (3 * forward.linear, 3 * forward.attention)
    assert (dots.linear, dots.attention) == (3 * forward.linear, 4 * forward.attention)
    assert (block.linear, block.attention) == (4 * forward.linear - head_and_fc_out, 4 * forward.attention)


def test_what_a_training_step_computes_again_is_what_its_program_does():
    programs = {}
    for remat in ("none", "dots", "block"):
        config, ids = SHAPES["odd feed-forward"], jnp.zeros((3, 7), jnp.int32)
        model = GPT(config, ComputeConfig(remat=remat))
        params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        gradient = jax.grad(lambda params, model=model, ids=ids: jnp.sum(model.apply({"params": params}, ids) ** 2))
        programs[remat] = product_flops(jax.make_jaxpr(gradient)(params).jaxpr)
        assert programs[remat].linear == accounting.training_flops(config, 3, 7, remat).linear
    # Attention recomputes scores in every backward pass, so only what a policy adds is exact.
    forward = accounting.forward_flops(SHAPES["odd feed-forward"], 3, 7).attention
    for remat in ("dots", "block"):
        assert programs[remat].attention == programs["none"].attention + forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_cache_bytes_are_those_of_the_cache(dtype, batch):
    cache = jax.eval_shape(
        lambda start_B: Cache.empty(TINY, ComputeConfig(), start_B, 11, dtype), jnp.zeros(batch, jnp.int32)
    )
    built = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert accounting.cache_bytes(TINY, batch, slots=11, dtype=dtype) == built


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        accounting.forward_flops(TINY, 0, 4)
    with pytest.raises(ValueError, match="length must be at least 1, not -1"):
        accounting.training_flops(TINY, 1, -1)
    with pytest.raises(ValueError, match="length 17 is beyond context_length=16"):
        accounting.forward_flops(TINY, 1, 17)
    with pytest.raises(ValueError, match="slots must be at least 1, not 0"):
        accounting.cache_bytes(TINY, 1, 0, "float32")
