"""The parity comparisons fail if the package is wrong: each classic mistake is made on purpose and detected."""

from __future__ import annotations

from unittest.mock import Mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import ALTERNATING, SCALED, TINY, exhaustive, gradient_errors, grid, logits_error, make_model, random_ids

import jaxgpt.model.gpt as model_module
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.model import ops
from jaxgpt.model.attention import blocked, choice
from jaxgpt.model.gpt import Embedding, FeedForward, LayerNorm, Linear, MultiHeadAttention

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

TOLERANCE = 2e-5  # the parity tests'
CONFIG = TINY.replace(tie_embeddings=False)
IDS = random_ids(CONFIG, 2, 14)


@pytest.fixture
def error():
    """The parity tests' comparison, with embeddings small enough for LayerNorm's eps to matter, as in GPT-2.
    The parameters come from the correct package; only the forward pass has the mistake."""
    model, params = make_model(CONFIG)
    small = {name: {"weight": params[name]["weight"] / 30} for name in ("tok_emb", "pos_emb")}
    return lambda: logits_error(model, params | small, IDS)


def attention(*, scale=1.0, first_hidden=1, heads=slice(None), order=(0, 1, 2)):
    """Attention in three lines; correct with the defaults."""

    def attend(q, seen, **_):
        qkv = q, seen.k_BxHxSxK, seen.v_BxHxSxK
        q, k, v = (qkv[i] for i in order)
        T = q.shape[2]
        scores = jnp.einsum("BHTK,BHSK->BHTS", q, k) * q.shape[3] ** -0.5 * scale
        hidden = (jnp.arange(T)[None] - jnp.arange(T)[:, None] >= first_hidden)[None, None]
        return (jax.nn.softmax(jnp.where(hidden, -1e30, scores)) @ v)[:, heads], None

    return attend


def layer_norm(*, eps=None, unbiased=False, with_scale=True, with_shift=True, stop_variance=False):
    def normalise(x, scale, shift, config_eps, **_):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).sum(-1, keepdims=True) / (x.shape[-1] - unbiased)
        variance = jax.lax.stop_gradient(variance) if stop_variance else variance
        y = centred / jnp.sqrt(variance + (config_eps if eps is None else eps))
        y = y * ops.widen(scale, x) if with_scale else y
        return y + ops.widen(shift, x) if with_shift else y

    return normalise


def test_the_right_stand_ins_pass(error, monkeypatch):
    assert error() < TOLERANCE
    stand_ins = Mock(side_effect=attention()), Mock(side_effect=layer_norm())
    monkeypatch.setattr(model_module, "attend", stand_ins[0])
    monkeypatch.setattr(ops, "layer_norm", stand_ins[1])
    assert error() < TOLERANCE
    assert [stand_in.call_count for stand_in in stand_ins] == [CONFIG.n_layers, 2 * CONFIG.n_layers + 1]


ATTENTION = {
    "no mask": {"first_hidden": 99},
    "mask one too late": {"first_hidden": 2},
    "mask one too early": {"first_hidden": 0},
    "unscaled scores": {"scale": (TINY.emb_dim / TINY.n_heads) ** 0.5},
    "scaled by emb_dim": {"scale": TINY.n_heads**-0.5},
    "query and key swapped": {"order": (1, 0, 2)},
    "key and value swapped": {"order": (0, 2, 1)},
    "heads in reverse": {"heads": slice(None, None, -1)},
}


@pytest.mark.parametrize("mistake", ATTENTION.values(), ids=ATTENTION)
def test_wrong_attention_is_seen(mistake, error, monkeypatch):
    monkeypatch.setattr(model_module, "attend", attention(**mistake))
    assert error() > 20 * TOLERANCE


BANDS = {
    "one too wide": lambda window: window and window + 1,
    "one too narrow": lambda window: window and window - 1,
    "none": lambda window: None,
    "in every layer": lambda window: 5,
    "in the other layers": lambda window: None if window else 5,
}


@grid(1, scan_layers=[False, True], wrong=BANDS)
def test_a_wrong_band_is_seen(wrong, scan_layers, monkeypatch):
    model, params = make_model(ALTERNATING, scan_layers=scan_layers)
    assert logits_error(model, params, IDS) < TOLERANCE

    def wrongly(q, seen, *, window, **options):
        return blocked(q, seen, window=wrong(window), **options)

    monkeypatch.setitem(choice.BACKENDS, "blocked", choice.BACKENDS["blocked"]._replace(context=wrongly))
    assert logits_error(model, params, IDS) > 20 * TOLERANCE


@pytest.mark.parametrize("scan_layers", [False, exhaustive(True)])
def test_a_scale_of_another_layer_is_seen(scan_layers, monkeypatch):
    model, params = make_model(SCALED, scan_layers=scan_layers)
    scales = GPTConfig.attention_scales.fget
    monkeypatch.setattr(GPTConfig, "attention_scales", property(lambda config: scales(config)[::-1]))
    assert logits_error(model, params, IDS) > 20 * TOLERANCE


LAYER_NORM = {
    "Flax's eps": {"eps": 1e-6},
    "unbiased variance": {"unbiased": True},
    "no scale": {"with_scale": False},
    "no shift": {"with_shift": False},
}


@pytest.mark.parametrize("mistake", LAYER_NORM.values(), ids=LAYER_NORM)
def test_wrong_layer_norm_is_seen(mistake, error, monkeypatch):
    monkeypatch.setattr(ops, "layer_norm", layer_norm(**mistake))
    assert error() > 20 * TOLERANCE


@pytest.mark.parametrize("wrong", ["gelu", "relu", "silu"])
def test_a_wrong_activation_is_seen(wrong, error, monkeypatch):
    functions = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu, "silu": jax.nn.silu}
    monkeypatch.setattr(ops, "activation", lambda name: functions[wrong])
    assert error() > 20 * TOLERANCE


def transposed_where_square(dot):
    def wrong(subscripts, x, y, *more, **options):
        square_weight = subscripts == "BTD,OD->BTO" and y.shape[0] == y.shape[1]
        return dot(subscripts, x, y.T if square_weight else y, *more, **options)

    return wrong


def products_in_bfloat16(dot):
    return lambda subscripts, x, y, dtype, *more, **options: dot(subscripts, x, y, "bfloat16", *more, **options)


@pytest.mark.parametrize("mistake", [transposed_where_square, products_in_bfloat16])
def test_wrong_products_are_seen(mistake, error, monkeypatch):
    monkeypatch.setattr(ops, "dot", mistake(ops.dot))
    assert error() > 20 * TOLERANCE


class PositionsFromOne(Embedding):
    def __call__(self, ids):
        return super().__call__(ids + 1 if self.name == "pos_emb" else ids)


class ScaledEmbedding(Embedding):
    def __call__(self, ids):
        return super().__call__(ids) * self.width**0.5


class NoFinalNorm(LayerNorm):
    def __call__(self, x):
        return x if self.name == "final_norm" else super().__call__(x)


class PostNormBlock(nn.Module):
    config: GPTConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x, cache=None, layer=None, deterministic=True, banded=False, scale=None, start=None):
        attended, layer = MultiHeadAttention(self.config, self.compute, name="att")(
            x, cache, layer, deterministic, banded, scale, start
        )
        x = LayerNorm(self.config, self.compute, name="norm1")(x + attended)
        return LayerNorm(self.config, self.compute, name="norm2")(
            x + FeedForward(self.config, self.compute, name="ff")(x)
        ), layer


class ParallelBlock(nn.Module):
    config: GPTConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x, cache=None, layer=None, deterministic=True, banded=False, scale=None, start=None):
        normed = LayerNorm(self.config, self.compute, name="norm1")(x)
        attended, layer = MultiHeadAttention(self.config, self.compute, name="att")(
            normed, cache, layer, deterministic, banded, scale, start
        )
        return x + attended + FeedForward(self.config, self.compute, name="ff")(
            LayerNorm(self.config, self.compute, name="norm2")(x)
        ), layer


def linear_without_bias(out, use_bias, *more, **named):
    return Linear(out, False, *more, **named)


MODULES = {
    "positions from one": ("Embedding", PositionsFromOne),
    "embeddings times sqrt(D)": ("Embedding", ScaledEmbedding),
    "no final norm": ("LayerNorm", NoFinalNorm),
    "post-norm": ("TransformerBlock", PostNormBlock),
    "parallel branches": ("TransformerBlock", ParallelBlock),
    "no biases": ("Linear", linear_without_bias),
}


@pytest.mark.parametrize(("name", "wrong"), MODULES.values(), ids=MODULES)
def test_a_wrong_module_is_seen(name, wrong, error, monkeypatch):
    monkeypatch.setattr(model_module, name, wrong)
    assert error() > 20 * TOLERANCE


def test_a_wrong_gradient_of_a_right_forward_is_seen(monkeypatch):
    monkeypatch.setattr(ops, "layer_norm", layer_norm(stop_variance=True))
    model, params = make_model(TINY)
    assert logits_error(model, params, IDS) < TOLERANCE
    errors = gradient_errors(model, params, IDS[:, :9])
    assert max(errors.values()) > 1e-2
