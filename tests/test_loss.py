"""The loss against float64 arithmetic, and the chunked loss against the plain one."""

from __future__ import annotations

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_model, random_ids, to_numpy
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.data import Shard, Tokens
from jaxgpt.errors import DataError
from jaxgpt.model import reference
from jaxgpt.training.evaluation import evaluate
from jaxgpt.training.loss import IGNORE, bits_per_byte, cross_entropy, head_cross_entropy, model_loss, perplexity
from jaxgpt.weights import save

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

RNG = np.random.default_rng(0)
X_BxTxD = RNG.normal(size=(3, 7, 5)).astype(np.float32)
HEAD_VxD = RNG.normal(size=(11, 5)).astype(np.float32)
LABELS_BxT = RNG.integers(0, 11, (3, 7)).astype(np.int32)
LABELS_BxT[0, :3] = IGNORE


def by_hand(x_BxTxD, head_VxD, labels_BxT):
    """(sum, count, gradients of the sum) in float64."""
    x, head = x_BxTxD.astype(np.float64), head_VxD.astype(np.float64)
    logits = x @ head.T
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts = labels_BxT != IGNORE
    one_hot = np.eye(head.shape[0])[np.where(counts, labels_BxT, 0)]
    total = ((np.log(np.exp(logits).sum(-1)) - (logits * one_hot).sum(-1)) * counts).sum()
    dlogits = (probabilities - one_hot) * counts[..., None]
    return total, counts.sum(), dlogits @ head, np.einsum("BTV,BTD->VD", dlogits, x)


@functools.cache
def compiled(chunk):
    def loss(x, head, labels):
        return head_cross_entropy(x, head, labels, ComputeConfig(), chunk=chunk)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)), jax.jit(loss)


@given(
    shape=st.sampled_from([(3, 7), (1, 13), (4, 1)]),
    chunk=st.sampled_from([0, 1, 4, 7, 20, 100]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    kept=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@example(shape=(3, 7), chunk=4, scale=1.0, kept=0.0, seed=0)
def test_loss_and_gradients_are_float64_arithmetics_in_chunks_of_any_size(shape, chunk, scale, kept, seed):
    rng = np.random.default_rng(seed)
    x, head = (scale * rng.normal(size=(*size, 5)).astype(np.float32) for size in (shape, (11,)))
    labels = np.where(rng.random(shape) < kept, rng.integers(0, 11, shape), IGNORE).astype(np.int32)
    total, count, dx, dhead = by_hand(x, head, labels)
    with_gradients, alone = compiled(chunk)
    for losses, n in (with_gradients(x, head, labels)[0], alone(x, head, labels)):
        assert float(n) == count
        assert float(losses) == pytest.approx(total, rel=1e-5, abs=1e-5)
    for got, want in zip(with_gradients(x, head, labels)[1], (dx, dhead), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * scale)


def test_the_gradient_of_cross_entropy_is_softmax_less_one_hot():
    logits = RNG.normal(size=(3, 7, 11))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = (probabilities - np.eye(11)[LABELS_BxT]) * (LABELS_BxT != IGNORE)[..., None]
    got = jax.grad(lambda x: 2 * cross_entropy(x, LABELS_BxT)[0])(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, 2 * want, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 4])
def test_without_custom_derivatives_the_losses_gradients_are_the_same_and_forward_mode_agrees(chunk):
    compute = ComputeConfig(custom_derivatives=False)

    def loss(x, head):
        return head_cross_entropy(x, head, LABELS_BxT, compute, chunk=chunk)[0]

    _, _, *want = by_hand(X_BxTxD, HEAD_VxD, LABELS_BxT)
    for got, exact in zip(jax.grad(loss, (0, 1))(X_BxTxD, HEAD_VxD), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=2e-5)
    _, slope = jax.jvp(loss, (X_BxTxD, HEAD_VxD), tuple(jnp.asarray(exact, jnp.float32) for exact in want))
    assert float(slope) == pytest.approx(sum((exact**2).sum() for exact in want), rel=1e-4)


@pytest.mark.usefixtures("compiled_fully")
def test_chunked_loss_never_holds_all_logits():
    x, head = jnp.ones((1, 64, 8)), jnp.ones((1000, 8))
    labels = jnp.zeros((1, 64), jnp.int32)

    def largest(chunk):
        def loss(x, head):
            return head_cross_entropy(x, head, labels, ComputeConfig(), chunk=chunk)[0]

        memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, head).compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = 64 * 1000 * 4
    assert largest(0) >= logits
    assert largest(8) < logits


def test_the_gradient_of_the_logits_takes_their_place():
    x, head = jnp.ones((4, 16, 8)), jnp.ones((1000, 8))
    labels = jnp.zeros((4, 16), jnp.int32)

    def loss(x, head):
        return head_cross_entropy(x, head, labels, ComputeConfig())[0]

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, head).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 64 * 1000 * 4


@pytest.mark.parametrize(("T", "chunk", "lengths"), [(64, 40, 32), (64, 64, 64), (64, 22, 22), (61, 8, 8), (5, 1, 1)])
def test_chunks_are_balanced(T, chunk, lengths):
    """64 positions are padded to 66, not 80, because padding costs as much as the rest."""
    x, head, labels = jnp.ones((2, T, 8)), jnp.ones((1000, 8)), jnp.zeros((2, T), jnp.int32)
    loss = functools.partial(head_cross_entropy, compute=ComputeConfig(), chunk=2 * chunk)
    program = str(jax.make_jaxpr(loss)(x, head, labels))
    assert f"f32[2,{lengths},1000]" in program
    if lengths < T:
        assert f"length={-(-T // lengths)}" in program


@pytest.mark.parametrize("label", [11, 12345, -2])
def test_label_outside_the_vocabulary_makes_the_loss_nan(label):
    labels = LABELS_BxT.copy()
    labels[1, 1] = label
    for chunk in (0, 4):
        assert math.isnan(head_cross_entropy(X_BxTxD, HEAD_VxD, labels, ComputeConfig(), chunk=chunk)[0])


def test_bfloat16_logits_are_raised_to_float32():
    logits = jnp.asarray(RNG.normal(size=(4, 50)) * 10, jnp.bfloat16)
    labels = jnp.arange(4)
    losses, _ = cross_entropy(logits, labels)
    exact = np.asarray(logits, np.float64)
    want = (np.log(np.exp(exact).sum(-1)) - exact[np.arange(4), np.arange(4)]).sum()
    assert losses.dtype == jnp.float32
    assert float(losses) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("chunk", [0, 5])
def test_model_loss_is_the_references(tiny, chunk):
    model, params = tiny
    ids = random_ids(TINY, 2, 12)
    losses, count = jax.jit(functools.partial(model_loss, model, chunk=chunk))(params, ids[:, :-1], ids[:, 1:])
    assert float(losses / count) == pytest.approx(reference.loss(to_numpy(params), TINY, ids), abs=1e-5)


def test_perplexity_and_bits_per_byte():
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(1000.0) == math.inf
    assert bits_per_byte(80 * math.log(2), 10) == pytest.approx(8)


BYTES = GPTConfig(
    vocab_size=257, context_length=16, emb_dim=12, n_heads=2, n_layers=1, drop_rate=0.0, tokenizer="bytes"
)


@pytest.fixture(scope="module")
def bytes_model():
    return make_model(BYTES)


def naive_evaluation(params, ids, stride):
    """Scores every token except the first once, each with the most context that its sequence allows."""
    total, seen = 0.0, 1
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + BYTES.context_length + 1]
        logits = reference.gpt(params, BYTES, np.array([window[:-1]]))[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t in range(max(seen, start + 1), start + len(window)):
            total -= log_probs[t - start - 1, ids[t]]
            seen += 1
    assert seen == len(ids)
    return total


@pytest.mark.parametrize(("n", "stride"), [(2, 0), (16, 0), (17, 0), (18, 0), (70, 0), (70, 5), (70, 1), (65, 16)])
def test_evaluation_predicts_every_token_once(bytes_model, n, stride):
    model, params = bytes_model
    ids = np.frombuffer(b"It was a dark and stormy night; the rain fell in torrents -- except at", np.uint8)[:n]
    result = evaluate(model, params, ids, stride=stride, batch_size=3)
    want = naive_evaluation(to_numpy(params), ids, stride or 16)
    assert result.tokens == n - 1
    assert result.loss == pytest.approx(want / (n - 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(want / (n - 1)), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(want / (n - 1) / math.log(2), rel=1e-5)


def test_evaluation_of_part_of_a_text(bytes_model):
    model, params = bytes_model
    ids = np.arange(160) % 251  # ten sequences, of which two are the first and the sixth
    part, parts = (
        evaluate(model, params, ids, max_sequences=2),
        [evaluate(model, params, ids[i : i + 17]) for i in (0, 80)],
    )
    assert part.tokens == 32
    assert part.loss == pytest.approx(np.mean([one.loss for one in parts]))
    assert part.bits_per_byte == pytest.approx(np.mean([one.bits_per_byte for one in parts]))
    assert evaluate(model, params, ids, max_sequences=11).tokens == 159


@pytest.mark.parametrize(("tokenizer", "known"), [("gpt2", 50257), ("bytes", 257)])
def test_ids_without_text_leave_the_bits_per_byte_unknown(tokenizer, known):
    config = TINY.replace(tokenizer=tokenizer, vocab_size=known + 2)
    model, params = make_model(config)
    ids = np.array([65, 98, known + 1, 99, 33])
    log_probs = jax.nn.log_softmax(reference.gpt(to_numpy(params), config, ids[None, :-1])[0])
    want = -float(np.mean(np.asarray(log_probs)[np.arange(4), ids[1:]]))
    result = evaluate(model, params, ids)
    assert (result.loss, result.perplexity) == (pytest.approx(want, rel=1e-5), pytest.approx(math.exp(want), rel=1e-4))
    assert (result.bits_per_byte, result.tokens) == (None, 4)
    # The first token is not predicted, so its bytes do not count.
    assert evaluate(model, params, np.array([known + 1, 65, 98])).bits_per_byte is not None


def test_the_command_leaves_out_the_bits_per_byte_where_they_are_unknown(tmp_path, capsys):
    save(tmp_path / "model", *make_model(BYTES.replace(vocab_size=259)))
    ids = np.array([65, 98, 258, 99], np.uint16)
    Tokens((Shard(ids),), "bytes", 259).save(tmp_path / "data")
    command = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    assert main(command) == 0
    assert re.fullmatch(r"loss [\d.]+ nats per token   perplexity [\d.]+   over 3 tokens\n", capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] is None


def test_the_command_evaluates_records_and_end_of_text_in_them(tmp_path, capsys):
    save(tmp_path / "model", *make_model(BYTES))
    (tmp_path / "a.jsonl").write_text('{"body": "ab<|endoftext|>c"}\n')
    command = [
        "evaluate",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "a.jsonl"),
        "--text-key",
        "body",
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "over 16 tokens" in out  # the seventeen that follow the first one, of which the last is the end
    assert "a.jsonl holds end-of-text as ordinary text: --allow-special makes it the token" in err
    assert main([*command, "--allow-special"]) == 0
    out, err = capsys.readouterr()
    assert "over 4 tokens" in out
    assert "holds end-of-text" not in err


def test_evaluation_refuses_what_it_cannot_do(bytes_model):
    model, params = bytes_model
    with pytest.raises(DataError, match="at least 2"):
        evaluate(model, params, np.array([1]))
    with pytest.raises(ValueError, match="stride"):
        evaluate(model, params, np.arange(40), stride=17)
