"""Products and attention over whole sequences by the kernel and MKL; when they are used, and when not. What all
backends of attention have in common is in test_attention_backends.py.

Without MKL (extra [mkl]) there is only the last part. With it, every processor runs these tests, also one on which
XLA is the faster and the package would not use MKL.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, make_model, needs_compiler, random_ids
from test_attention_backends import inputs

from jaxgpt import generate, prepare, scan_generate
from jaxgpt.config import ComputeConfig
from jaxgpt.cpu import kernel, sequences
from jaxgpt.errors import ConfigError
from jaxgpt.model import backend_of, dot
from jaxgpt.model.attention import choose, mkl, native
from jaxgpt.model.cache import Seen
from jaxgpt.training import TrainConfig, init_state, make_step, train

pytestmark = [needs_compiler, pytest.mark.usefixtures("compiled_quickly_by_default")]


def test_dropped_weights_reach_neither_the_result_nor_a_gradient(with_mkl):
    T, block, factor = 150, 64, 1.25
    q, k, v, g = inputs(T, H=2)
    ends = [64, 128, 150]
    rng = np.random.default_rng(1)
    masks = [jnp.asarray(rng.random((2, 2, end - at, end)) < 0.8) for at, end in zip([0, *ends], ends, strict=False)]
    whole = jnp.concatenate([jnp.pad(mask, [(0, 0)] * 3 + [(0, T - mask.shape[3])]) for mask in masks], axis=2)

    def formula(q, k, v):
        causal = jnp.tril(jnp.ones((T, T), bool))
        weights = jax.nn.softmax(jnp.where(causal, q @ k.swapaxes(2, 3), -jnp.inf))
        return jnp.where(whole, weights * factor, 0) @ v

    def kernels(q, k, v):
        return native._attend(block, factor, "float32", q, k, v, jnp.zeros((2, T), jnp.int32), tuple(masks))

    with jax.default_matmul_precision("highest"):
        (y, pull_back), (want, pull_back_formula) = (jax.vjp(function, q, k, v) for function in (kernels, formula))
    np.testing.assert_allclose(y, want, atol=1e-5)
    for mine, theirs in zip(pull_back(g), pull_back_formula(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


def test_dropout_drops_its_share_of_the_weights_and_keeps_their_mean(with_mkl):
    q = k = jnp.zeros((4, 2, 256, 8))
    v = jnp.ones((4, 2, 256, 8))
    y = mkl(q, Seen(k, v, 0, None, "float32"), drop_rate=0.25, dropout_key=jax.random.key(0))[:, :, 128:]
    assert abs(float(y.mean()) - 1) < 0.01
    # Each of n weights of 1 / n is kept with probability 3/4 and multiplied by 4/3.
    assert 0.8 < float(y.std() / np.sqrt((1 / 3) / 192)) < 1.2


def test_what_is_not_a_number_reaches_the_result(with_mkl):
    q, k, v, _ = inputs(300)
    for dtype in ("float32", "bfloat16"):
        for broken in range(3):
            operands = [x.at[0, 0, 170, 3].set(jnp.nan) if i == broken else x for i, x in enumerate((q, k, v))]
            y = mkl(operands[0], Seen(*operands[1:], 0, None, dtype))
            assert not np.isfinite(y[0, 0, 170]).all()
            assert np.isfinite(y[0, 0, :150]).all()  # the blocks before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("subscripts", "x_shape", "y_shape"),
    [
        ("BTD,OD->BTO", (3, 50, 70), (130, 70)),
        ("BTO,OD->BTD", (3, 50, 130), (130, 70)),
        ("BO,BD->OD", (150, 130), (150, 70)),
        ("BD,OD->OB", (150, 70), (130, 70)),
        ("DB,DO->BO", (70, 150), (70, 130)),
        # Tiles: whole ones, and those that are cut off; of other sizes; packed from rows and from columns.
        ("BD,OD->BO", (768, 65), (1152, 65)),
        ("BD,OD->BO", (1030, 65), (777, 65)),
        ("BO,OD->BD", (520, 65), (65, 1300)),
        ("BO,BD->OD", (65, 1030), (65, 512)),
        exhaustive("BO,OD->BD", (300, 5000), (5000, 260)),
    ],
)
def test_products_equal_those_of_float64(subscripts, x_shape, y_shape, dtype, with_mkl):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x_shape, y_shape))
    call = sequences.product(subscripts, x, y)
    got = jax.jit(call)(x, y)
    want = np.einsum(subscripts, np.asarray(x, np.float64), np.asarray(y, np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "y_shape", "dtype"),
    [
        ("BHTK,BHSK->BHTS", (2, 3, 80, 8), (2, 3, 80, 8), "float32"),
        ("BD,D->B", (80, 8), (8,), "float32"),
        ("BD,OD->BO", (80, 8), (80, 8), "float16"),
    ],
)
def test_what_is_not_one_product_of_matrices_is_left_to_xla(subscripts, x_shape, y_shape, dtype, with_mkl):
    x, y = jnp.ones(x_shape, dtype), jnp.ones(y_shape, dtype)
    assert sequences.product(subscripts, x, y) is None
    assert dot(subscripts, x, y, "float32", mkl=True).shape == jnp.einsum(subscripts, x, y).shape


def test_a_product_that_is_small_or_has_few_rows_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(sequences, "missing", lambda: "")
    x = jnp.ones((256, 256))
    assert sequences.product("BD,OD->BO", x, x) is not None
    assert sequences.product("BD,OD->BO", x[:, :100], x[:, :100]) is None
    assert sequences.product("BD,OD->BO", x[:60], jnp.ones((2048, 256))) is None


def calls_mkl(function, *arguments):
    return "jaxgpt_product" in jax.jit(function).lower(*arguments).as_text()


def test_dot_uses_them_forward_and_backward_and_never_where_a_derivative_is_jaxs_own(with_mkl):
    x, y = jnp.ones((80, 70)), jnp.ones((90, 70))

    def loss(x, y, custom=True):
        return jnp.sum(dot("BD,OD->BO", x, y, "float32", custom, mkl=True) ** 2)

    assert calls_mkl(loss, x, y)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, y).as_text()
    assert text.count("@jaxgpt_product") == 3
    assert not calls_mkl(lambda x, y: loss(x, y, custom=False), x, y)
    jax.jvp(lambda x: loss(x, y, custom=False), (x,), (x,))


@pytest.mark.parametrize("drop_rate", [0.0, pytest.param(0.1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("compute", [{}, {"remat": "block"}, {"remat": "dots"}, {"scan_layers": True}], ids=str)
def test_a_training_step_is_that_of_xla(compute, drop_rate, with_mkl):
    model = TINY.replace(drop_rate=0.0, drop_rate_shortcut=drop_rate)
    ids = np.asarray(random_ids(model, 2, 17), np.int32)
    results = []
    for wanted in (True, False):
        config = TrainConfig(
            model=model, compute=ComputeConfig(**compute, mkl=wanted), batch_size=2, seq_len=16, steps=4
        )
        step = jax.jit(make_step(config)).lower(init_state(config), ids)
        text = step.as_text()
        assert all((f"jaxgpt_{name}" in text) == wanted for name in ("product", "sequence_attention_gradients"))
        results.append(step.compile()(init_state(config), ids))
    (state, metrics), (want_state, want) = results
    assert abs(metrics["loss"] - want["loss"]) < 1e-5
    assert abs(metrics["grad_norm"] - want["grad_norm"]) < 1e-4
    for mine, theirs in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(want_state["params"]), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)  # AdamW's first step is the gradient's sign


def test_a_step_has_the_same_bits_each_time(with_mkl):
    config = TrainConfig(
        model=TINY.replace(context_length=128), compute=ComputeConfig(mkl=True), batch_size=2, seq_len=100, steps=4
    )
    step, ids = jax.jit(make_step(config)), np.asarray(random_ids(config.model, 2, 101), np.int32)
    first, second = (jax.tree.leaves(step(init_state(config), ids)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_auto_takes_it_for_whole_sequences_only(with_mkl, monkeypatch):
    compute = ComputeConfig(mkl=True)
    assert backend_of(TINY, compute, 2, 16) == backend_of(TINY, compute, 2, 16, dropout=True) == "mkl"
    assert backend_of(TINY, compute.replace(dtype="bfloat16"), 2, 16, documents=True) == "mkl"
    assert backend_of(TINY, compute.replace(custom_derivatives=False), 2, 16) == "blocked"
    assert backend_of(TINY, ComputeConfig(), 2, 16) == "blocked"
    assert backend_of(TINY, ComputeConfig(attention="mkl"), 2, 16) == "mkl"
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert backend_of(TINY, compute, 2, 16) == "blocked"
    with pytest.raises(ConfigError, match="mkl=True cannot be had: the kernel is not built or not used"):
        dot("BD,OD->BO", jnp.ones((80, 70)), jnp.ones((90, 70)), "float32", mkl=True)


def test_prepare_turns_it_on_and_generation_is_that_of_xla(with_mkl):
    plain, params = make_model(TINY)
    prompts = [random_ids(TINY, 1, n)[0].tolist() for n in (9, 14)]  # rows that start at different slots
    model, prepared = prepare(plain, params)
    assert model.compute.mkl
    assert not model.compute.portable().mkl
    mine, theirs = generate(model, prepared, prompts, 8), generate(plain, params, prompts, 8)
    for row, expected in zip(mine.tokens, theirs.tokens, strict=True):
        np.testing.assert_array_equal(row, expected)
    ids = random_ids(TINY, 2, 16)
    logits = (each.apply({"params": params}, ids) for each in (model, plain))
    np.testing.assert_allclose(*logits, atol=2e-5)
    jax.export.export(jax.jit(lambda ids: scan_generate(model, prepared, ids, 3)))(ids)  # must run elsewhere too


def test_a_run_keeps_to_what_it_began_with(with_mkl, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 60)
    model = TINY.replace(vocab_size=256, tokenizer="bytes")
    config = TrainConfig(model=model, batch_size=2, seq_len=16, steps=2, checkpoint_interval=2, sample_tokens=0)
    longer = dataclasses.replace(config, steps=4)

    def began(out):
        return json.loads((tmp_path / out / "run.json").read_text())["config"]["compute"]["mkl"]

    train(config, text, tmp_path / "with")
    assert began("with")
    assert "attention mkl" in capsys.readouterr().err
    monkeypatch.setenv(kernel.VARIABLE, "0")
    train(longer, text, tmp_path / "with", resume=True)
    assert "the run began with MKL, and goes on without: the kernel is not built or not used" in capsys.readouterr().err
    train(config, text, tmp_path / "without")
    monkeypatch.delenv(kernel.VARIABLE)
    train(longer, text, tmp_path / "without", resume=True)
    assert not began("without")
    assert "attention blocked" in capsys.readouterr().err


# Without MKL


@pytest.mark.parametrize(
    ("flags", "dtypes"),
    [
        ({"AuthenticAMD", "avx2", "avx512f", "avx512_bf16"}, []),
        ({"GenuineIntel", "avx2", "avx512f"}, ["float32"]),
        ({"GenuineIntel", "avx2", "amx_bf16"}, ["float32", "bfloat16"]),
        ({"GenuineIntel"}, []),
        (set(), []),
    ],
    ids=["AMD", "Intel", "AMX", "old", "unknown"],
)
def test_which_processors_use_them(flags, dtypes, monkeypatch):
    monkeypatch.setattr(sequences, "_processor_flags", lambda: flags)
    monkeypatch.setattr(sequences, "missing", lambda: "")
    assert [dtype for dtype in ("float32", "bfloat16", "int8") if sequences.preferred(dtype)] == dtypes
    monkeypatch.setattr(sequences, "missing", lambda: "no MKL")
    assert not sequences.preferred("float32")


def test_what_mkl_cannot_compute_is_refused_by_name():
    q, k, v, _ = inputs(20)

    def reason(slot=0, **options):
        with pytest.raises(ConfigError) as error:
            choose("mkl", q, Seen(k, v, slot, None, "float32"), **options)
        return str(error.value)

    assert "these queries continue one in a cache" in reason(slot=5)
    assert "does not return the attention weights" in reason(return_weights=True)
    assert "no forward-mode derivatives" in reason(custom_derivatives=False)
    assert "the kernel is not built or not used (jaxgpt build-kernel)" in reason()
