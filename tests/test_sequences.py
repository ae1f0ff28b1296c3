"""Products and attention over whole sequences by the kernel; when they are used, and when not. What all backends of
attention have in common is in test_attention_backends.py.

They need AVX2, and where MKL multiplies that as well (extra [mkl]); they run also where XLA is the faster. The last
part needs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, exhaustive, make_model, needs_compiler, random_ids
from test_attention_backends import inputs

from jaxgpt import GPT, generate, lora, prepare, scan_generate
from jaxgpt.config import ComputeConfig
from jaxgpt.cpu import kernel, sequences
from jaxgpt.errors import ConfigError
from jaxgpt.model import backend_of, dot
from jaxgpt.model.attention import choose, native, native_attention
from jaxgpt.model.cache import Seen
from jaxgpt.model.ops import Matrix, activated_linear, activation, linear
from jaxgpt.training import TrainConfig, init_state, make_step, train

pytestmark = [needs_compiler, pytest.mark.usefixtures("compiled_quickly_by_default")]


@pytest.mark.parametrize(("K", "by"), [(8, "tiles"), (21, "tiles"), (70, "tiles"), (21, "MKL")])
def test_dropped_weights_reach_neither_the_result_nor_a_gradient(K, by, natively):
    T, block, factor = 150, 64, 1.25
    q, k, v, g = inputs(T, H=2, K=K)
    q /= K**0.5
    ends = [64, 128, 150]
    rng = np.random.default_rng(1)
    masks = [jnp.asarray(rng.random((2, 2, end - at, end)) < 0.8) for at, end in zip([0, *ends], ends, strict=False)]
    whole = jnp.concatenate([jnp.pad(mask, [(0, 0)] * 3 + [(0, T - mask.shape[3])]) for mask in masks], axis=2)

    def formula(q, k, v):
        causal = jnp.tril(jnp.ones((T, T), bool))
        weights = jax.nn.softmax(jnp.where(causal, q @ k.swapaxes(2, 3), -jnp.inf))
        return jnp.where(whole, weights * factor, 0) @ v

    def kernels(q, k, v):
        by_position = (x.swapaxes(1, 2) for x in (q, k, v))
        y = native._attend(block, factor, "float32", *by_position, jnp.zeros((2, T), jnp.int32), tuple(masks))
        return y.swapaxes(1, 2)

    with jax.default_matmul_precision("highest"):
        (y, pull_back), (want, pull_back_formula) = (jax.vjp(function, q, k, v) for function in (kernels, formula))
    np.testing.assert_allclose(y, want, atol=1e-5)
    for mine, theirs in zip(pull_back(g), pull_back_formula(g), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


def test_dropout_drops_its_share_of_the_weights_and_keeps_their_mean(natively):
    q = k = jnp.zeros((4, 2, 256, 8))
    v = jnp.ones((4, 2, 256, 8))
    y = native_attention(q, Seen(k, v, 0, None, "float32"), drop_rate=0.25, dropout_key=jax.random.key(0))[:, :, 128:]
    assert abs(float(y.mean()) - 1) < 0.01
    # Each of n weights of 1 / n is kept with probability 3/4 and multiplied by 4/3.
    assert 0.8 < float(y.std() / np.sqrt((1 / 3) / 192)) < 1.2


@pytest.mark.parametrize("operands", ["float32", "float32, MKL", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_result_but_not_that_of_earlier_blocks(operands, bad, natively):
    q, k, v, _ = inputs(300, H=12)
    block, broken, dtype = 96, 155, operands.split(",")[0]
    for i in range(3):
        operands = [x.at[0, 0, broken, 3].set(bad) if i == j else x for j, x in enumerate((q, k, v))]
        y, pull_back = jax.vjp(lambda q, k, v: native_attention(q, Seen(k, v, 0, None, dtype)), *operands)
        dq, _, _ = pull_back(jnp.ones_like(y))
        assert not np.isfinite(y[0, 0, broken]).all()
        assert np.isfinite(y[0, 0, :block]).all()
        assert np.isfinite(dq[0, 0, :block]).all()


@pytest.mark.parametrize("operands", ["float32", "float32, MKL", "bfloat16"])
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
        # Sums that are longer than is packed at a time.
        ("BO,OD->BD", (300, 5000), (5000, 260)),
        # More rows than are packed at a time.
        exhaustive("BD,OD->BO", (4500, 4000), (70, 4000)),
    ],
)
def test_products_equal_those_of_float64(subscripts, x_shape, y_shape, operands, natively):
    rng, dtype = np.random.default_rng(0), operands.split(",")[0]
    x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x_shape, y_shape))
    got = jax.jit(sequences.product(subscripts, x, y))(x, y)
    want = np.einsum(subscripts, np.asarray(x, np.float64), np.asarray(y, np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize(("subscripts", "y_shape"), [("BD,OD->BO", (130, 70)), ("BD,DO->BO", (70, 130))])
def test_a_float32_operand_beside_a_bfloat16_one_is_rounded_in_the_product(subscripts, y_shape, dtype, natively):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(150, 70)), dtype), jnp.asarray(rng.normal(size=y_shape), jnp.float32)
    y_as_well, swapped = y.astype(dtype), ",".join(reversed(subscripts[:5].split(","))) + subscripts[5:]
    got = sequences.product(subscripts, x, y)(x, y)
    np.testing.assert_array_equal(got, sequences.product(subscripts, x, y_as_well)(x, y_as_well))
    np.testing.assert_array_equal(got, sequences.product(swapped, y, x)(y, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("subscripts", ["BD,OD->BO", "BD,DO->BO", "DB,OD->BO"])
def test_integers_are_multiplied_as_numbers_of_the_type_beside_them(subscripts, dtype, natively):
    rng = np.random.default_rng(0)
    sizes = {"B": 150, "D": 77, "O": 135}
    x_shape, y_shape = ([sizes[i] for i in operand] for operand in subscripts.partition("->")[0].split(","))
    x, y = jnp.asarray(rng.normal(size=x_shape), dtype), jnp.asarray(rng.integers(-127, 128, y_shape), jnp.int8)
    got, wide = sequences.product(subscripts, x, y)(x, y), y.astype(dtype)
    np.testing.assert_array_equal(got, sequences.product(subscripts, x, wide)(x, wide))


def test_a_prompt_reads_weights_in_int8_as_they_are(natively):
    model, params = prepare(*make_model(TINY), dtype="int8")
    ids = random_ids(TINY, 5, 16)  # more rows than are few
    apply = jax.jit(lambda model, params, ids: model.apply({"params": params}, ids), static_argnums=0)
    calls = re.findall(
        r"@jaxgpt_product.*: \(tensor<.*xf32>, tensor<.*x(.*)>\)", apply.lower(model, params, ids).as_text()
    )
    assert calls == ["i8"] * (4 * TINY.n_layers + 1)
    want = apply(GPT(model.config, model.compute.portable()), params, ids)
    np.testing.assert_allclose(apply(model, params, ids), want, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_gelu_of_a_product_is_that_of_float64_and_its_gradient_that_of_the_plain_form(bias, dtype, natively):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 75, 70)).astype(np.float32), rng.normal(size=(130, 70)).astype(np.float32) / 4
    bias_O = jnp.asarray(rng.normal(size=130), jnp.float32) if bias else None

    def run(x, weight, bias_O, native=True):
        compute, matrix = ComputeConfig(dtype=dtype, native_sequences=native), Matrix(weight, None)
        y = activated_linear(x, matrix, bias_O, compute, "gelu_tanh")
        return activation("gelu_tanh")(linear(x, matrix, bias_O, compute)) if y is None else y

    assert "jaxgpt_gelu_of_product" in jax.jit(run).lower(x, weight, bias_O).as_text()
    got = run(x, weight, bias_O)
    rounded = [np.asarray(jnp.asarray(operand, dtype), np.float64) for operand in (x, weight)]
    u = np.einsum("BTD,OD->BTO", *rounded) + (0 if bias_O is None else np.asarray(bias_O, np.float64))
    want = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    np.testing.assert_allclose(got, want, rtol=0.004, atol=1e-6)

    def gradients(native):
        return jax.grad(lambda *operands: (run(*operands, native) ** 2).sum(), (0, 1))(x, weight, bias_O)

    for mine, plain in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(mine, plain, atol=0.01 * np.abs(plain).max())


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_adapters_act_where_the_activation_is_part_of_the_product_too(dtype, natively):
    model, params = make_model(TINY, dtype=dtype, native_sequences=True)
    adapters = lora.init(jax.random.key(0), params, 4)
    adapters = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    ids = random_ids(TINY, 2, 12)
    merged = model.apply({"params": lora.merge(params, adapters)}, ids)
    with lora.attached(params, adapters) as attached:
        beside = model.apply({"params": attached}, ids)
    difference = jnp.abs(merged - model.apply({"params": params}, ids)).max()
    assert jnp.abs(beside - merged).max() < 0.05 * difference


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "y_shape", "dtype"),
    [
        ("BHTK,BHSK->BHTS", (2, 3, 80, 8), (2, 3, 80, 8), "float32"),
        ("BD,D->B", (80, 8), (8,), "float32"),
        ("BD,OD->BO", (80, 8), (80, 8), "float16"),
    ],
)
def test_what_is_not_one_product_of_matrices_is_left_to_xla(subscripts, x_shape, y_shape, dtype, natively):
    x, y = jnp.ones(x_shape, dtype), jnp.ones(y_shape, dtype)
    assert sequences.product(subscripts, x, y) is None
    assert dot(subscripts, x, y, "float32", native=True).shape == jnp.einsum(subscripts, x, y).shape


def test_a_product_that_is_small_or_has_few_rows_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(sequences, "missing", lambda dtype: "")
    x = jnp.ones((256, 256), jnp.bfloat16)
    assert sequences.product("BD,OD->BO", x, x) is not None
    assert sequences.product("BD,OD->BO", x[:, :100], x[:, :100]) is None
    assert sequences.product("BD,OD->BO", x[:60], jnp.ones((2048, 256), jnp.bfloat16)) is None


@pytest.mark.parametrize("lacking", ["", "that is not installed"])
def test_products_in_float32_are_left_to_xla_where_there_is_no_mkl(lacking, monkeypatch):
    monkeypatch.setattr(sequences, "missing", lambda dtype: "")
    monkeypatch.setattr(sequences, "lacks_mkl", lambda file: lacking)
    x = jnp.ones((256, 256))
    assert (sequences.product("BD,OD->BO", x, x) is None) == bool(lacking)


def calls_native(function, *arguments):
    return "jaxgpt_product" in jax.jit(function).lower(*arguments).as_text()


def test_dot_uses_them_forward_and_backward_and_never_where_a_derivative_is_jaxs_own(natively):
    x, y = jnp.ones((80, 70)), jnp.ones((90, 70))

    def loss(x, y, custom=True):
        return jnp.sum(dot("BD,OD->BO", x, y, "float32", custom, native=True) ** 2)

    assert calls_native(loss, x, y)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, y).as_text()
    assert text.count("@jaxgpt_product") == 3
    assert not calls_native(lambda x, y: loss(x, y, custom=False), x, y)
    jax.jvp(lambda x: loss(x, y, custom=False), (x,), (x,))


@pytest.mark.parametrize("drop_rate", [0.0, pytest.param(0.1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("compute", [{}, {"remat": "block"}, {"remat": "dots"}, {"scan_layers": True}], ids=str)
def test_a_training_step_is_that_of_xla(compute, drop_rate, natively):
    model = TINY.replace(drop_rate=0.0, drop_rate_shortcut=drop_rate)
    ids = np.asarray(random_ids(model, 2, 17), np.int32)
    results = []
    for wanted in (True, False):
        config = TrainConfig(
            model=model, compute=ComputeConfig(**compute, native_sequences=wanted), batch_size=2, seq_len=16, steps=4
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


def test_a_step_has_the_same_bits_each_time(natively):
    config = TrainConfig(
        model=TINY.replace(context_length=128),
        compute=ComputeConfig(native_sequences=True),
        batch_size=2,
        seq_len=100,
        steps=4,
    )
    step, ids = jax.jit(make_step(config)), np.asarray(random_ids(config.model, 2, 101), np.int32)
    first, second = (jax.tree.leaves(step(init_state(config), ids)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_auto_takes_it_for_whole_sequences_only(natively, monkeypatch):
    compute = ComputeConfig(native_sequences=True)
    assert backend_of(TINY, compute, 2, 16) == backend_of(TINY, compute, 2, 16, dropout=True) == "native"
    assert backend_of(TINY, compute, 2, 16, documents=True) == "native"
    assert backend_of(TINY, compute.replace(custom_derivatives=False), 2, 16) == "blocked"
    assert backend_of(TINY, ComputeConfig(), 2, 16) == "blocked"
    assert backend_of(TINY, ComputeConfig(attention="native"), 2, 16) == "native"
    monkeypatch.setenv(kernel.VARIABLE, "0")
    assert backend_of(TINY, compute, 2, 16) == "blocked"
    with pytest.raises(ConfigError, match="native_sequences=True cannot be had: the kernel is not built or not used"):
        dot("BD,OD->BO", jnp.ones((80, 70)), jnp.ones((90, 70)), "float32", native=True)


def test_prepare_turns_it_on_and_generation_is_that_of_xla(natively):
    plain, params = make_model(TINY)
    prompts = [random_ids(TINY, 1, n)[0].tolist() for n in (9, 14)]  # rows that start at different slots
    model, prepared = prepare(plain, params)
    assert model.compute.native_sequences
    assert not model.compute.portable().native_sequences
    mine, theirs = generate(model, prepared, prompts, 8), generate(plain, params, prompts, 8)
    for row, expected in zip(mine.tokens, theirs.tokens, strict=True):
        np.testing.assert_array_equal(row, expected)
    ids = random_ids(TINY, 2, 16)
    logits = (each.apply({"params": params}, ids) for each in (model, plain))
    np.testing.assert_allclose(*logits, atol=2e-5)
    jax.export.export(jax.jit(lambda ids: scan_generate(model, prepared, ids, 3)))(ids)  # must run elsewhere too


def test_a_run_keeps_to_what_it_began_with(natively, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 60)
    model = TINY.replace(vocab_size=256, tokenizer="bytes")
    config = TrainConfig(model=model, batch_size=2, seq_len=16, steps=2, checkpoint_interval=2, sample_tokens=0)
    longer = dataclasses.replace(config, steps=4)

    def began(out):
        return json.loads((tmp_path / out / "run.json").read_text())["config"]["compute"]["native_sequences"]

    train(config, text, tmp_path / "with")
    assert began("with")
    assert "attention native" in capsys.readouterr().err
    monkeypatch.setenv(kernel.VARIABLE, "0")
    train(longer, text, tmp_path / "with", resume=True)
    assert (
        "the run began with native_sequences, and goes on without: the kernel is not built or not used"
        in capsys.readouterr().err
    )
    train(config, text, tmp_path / "without")
    monkeypatch.delenv(kernel.VARIABLE)
    train(longer, text, tmp_path / "without", resume=True)
    assert not began("without")
    assert "attention blocked" in capsys.readouterr().err


# Without the kernel


@pytest.mark.parametrize(
    ("flags", "dtypes"),
    [
        ({"avx", "avx2", "fma"}, ["float32", "bfloat16"]),
        ({"avx", "avx2"}, []),
        ({"avx", "fma"}, []),
        (set(), []),
    ],
    ids=["AVX2", "no FMA", "no AVX2", "unknown"],
)
def test_which_processors_use_them(flags, dtypes, monkeypatch):
    monkeypatch.setattr(sequences, "_processor_flags", lambda: flags)
    monkeypatch.setattr(sequences, "missing", lambda dtype: "")
    assert [dtype for dtype in ("float32", "bfloat16", "int8") if sequences.preferred(dtype)] == dtypes
    monkeypatch.setattr(sequences, "missing", lambda dtype: "no kernel")
    assert not sequences.preferred("float32")


def test_what_it_cannot_compute_is_refused_by_name():
    q, k, v, _ = inputs(20)

    def reason(slot=0, **options):
        with pytest.raises(ConfigError) as error:
            choose("native", q, Seen(k, v, slot, None, "float32"), **options)
        return str(error.value)

    assert "these queries continue one in a cache" in reason(slot=5)
    assert "does not return the attention weights" in reason(return_weights=True)
    assert "no forward-mode derivatives" in reason(custom_derivatives=False)
    assert "the kernel is not built or not used (jaxgpt build-kernel)" in reason()
