"""Documents that share a row are kept apart: each gets what it would get alone in a row of its own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCALED, TINY, exhaustive, make_model, random_ids, to_numpy

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.config import ComputeConfig
from jaxgpt.data import Source, Tokens
from jaxgpt.errors import ConfigError
from jaxgpt.model import GPT, Cache, reference
from jaxgpt.model import attention as attention_module
from jaxgpt.parallel import BATCH, MeshConfig, sharding
from jaxgpt.training import (
    TrainConfig,
    cross_entropy,
    dry_run,
    evaluate,
    init_state,
    jit_step,
    make_step,
    model_loss,
    train,
)
from jaxgpt.training.loss import IGNORE
from jaxgpt.training.packing import document_starts

pytestmark = pytest.mark.usefixtures("compiled_quickly")

END = 96
# A dense layer and a banded one.
BANDED = TINY.replace(attention_pattern="alternating", attention_window=5)
# The lengths of each row's documents, in 15 tokens: a cut one first (or none), empty ones, odd lengths; a document
# longer than the row, from its start or cut; a separator as the last token.
LENGTHS = [(3, 1, 1, 5, 5), (0, 15), (15,), (4, 10, 1)]


def packed(config=TINY):
    """Ids [4, 16] of which the first 15 are inputs."""
    ids_BxT1 = random_ids(config.replace(vocab_size=END), len(LENGTHS), 16)
    for row_T1, lengths in zip(ids_BxT1, LENGTHS, strict=True):
        row_T1[np.cumsum(lengths)[:-1]] = END
    ids_BxT1[2, 15] = END  # a label only
    return ids_BxT1


def documents_of(ids_BxT1, separator=END):
    """(inputs, labels) of each document, row by row."""
    documents = []
    for row in ids_BxT1:
        starts = [0, *(i for i in range(1, len(row) - 1) if row[i] == separator), len(row) - 1]
        documents += [(row[start:end], row[start + 1 : end + 1]) for start, end in itertools.pairwise(starts)]
    return documents


def one_per_row(documents):
    """Inputs and labels of documents, one per row, padded on the right, where nothing counts or is seen."""
    inputs, labels = (np.full((len(documents), 15), filler, np.int32) for filler in (0, IGNORE))
    for i, (its_inputs, its_labels) in enumerate(documents):
        inputs[i, : len(its_inputs)], labels[i, : len(its_labels)] = its_inputs, its_labels
    return inputs, labels


def reference_loss(params, config, documents):
    """The float64 loss of documents, each alone: (sum in nats, count)."""
    total = 0.0
    for inputs, labels in documents:
        probabilities = reference.softmax(reference.gpt(params, config, [inputs])[0])
        total -= np.log(probabilities[np.arange(len(labels)), labels]).sum()
    return total, sum(len(labels) for _, labels in documents)


@pytest.fixture
def several_blocks(monkeypatch):
    """Has attention compute two blocks of queries, one head of one row after another."""
    small = functools.partial(attention_module.blocked, query_block=8, group_scores=8 * 15)
    monkeypatch.setattr(attention_module, "blocked", small)


@pytest.mark.parametrize("file", ["before", "after"])
def test_a_document_starts_at_its_end_of_text(file):
    texts = [[1, 2], [3], [], [4, 5, 6]]
    row = [id for text in texts for id in ([END, *text] if file == "before" else [*text, END])]
    starts = [0, 0, 0, 3, 3, 5, 6, 6, 6, 6] if file == "before" else [0, 0, 2, 2, 4, 5, 5, 5, 5, 9]
    got = document_starts(jnp.array([row, [7] * len(row)]), END)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [starts, [0] * len(row)])


@pytest.mark.parametrize(
    ("config", "compute"),
    [
        exhaustive(TINY, {}, id="dense"),
        pytest.param(BANDED, {"scan_layers": True}, id="scanned, banded"),
        exhaustive(SCALED, {"scan_layers": True, "remat": "block"}, id="scanned, three scales, remat"),
        exhaustive(BANDED, {"remat": "dots"}, id="banded, remat dots"),
        exhaustive(TINY, {"scan_layers": True, "custom_derivatives": False}, id="scanned, JAX's derivatives"),
    ],
)
def test_logits_loss_and_gradient_are_those_of_each_document_alone(config, compute, several_blocks):
    model, params = make_model(config, **compute)
    ids, exact = packed(config), to_numpy(params)
    documents = documents_of(ids)
    assert sorted(len(inputs) for inputs, _ in documents) == [1, 1, 1, 3, 4, 5, 5, 10, 15, 15]

    @jax.jit  # one program for both: no token is the separator -1, so that each row is one document
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, inputs, labels, separator):
        logits = model.apply({"params": params}, inputs, start_BxT=document_starts(inputs, separator))
        return cross_entropy(logits, labels, model.compute.custom_derivatives)[0], logits

    unused = np.zeros((len(documents) - len(ids), 15), np.int32)
    inputs, labels = np.concatenate([ids[:, :-1], unused]), np.concatenate([ids[:, 1:], unused + IGNORE])
    (total, logits), grads = run(params, inputs, labels, END)
    (alone, _), its_grads = run(params, *one_per_row(documents), -1)
    want = np.concatenate([reference.gpt(exact, config, [its_inputs])[0] for its_inputs, _ in documents])
    np.testing.assert_allclose(logits[: len(ids)].reshape(want.shape), want, atol=2e-5)
    np.testing.assert_allclose(total, reference_loss(exact, config, documents)[0], rtol=1e-6)
    np.testing.assert_allclose(total, alone, rtol=1e-6)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5), grads, its_grads)


def test_forward_mode_gives_the_slope_of_the_float64_loss(several_blocks):
    config = TINY.replace(n_layers=1)
    model, params = make_model(config, custom_derivatives=False)
    ids = packed()
    rng, step, exact = np.random.default_rng(3), 1e-6, to_numpy(params)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)

    def loss(params):
        return model_loss(model, params, ids[:, :-1], ids[:, 1:], separator=END)[0]

    slope = jax.jit(lambda p, t: jax.jvp(loss, (p,), (t,))[1])(params, along)
    ahead, behind = (
        reference_loss(
            jax.tree.map(lambda p, t, s=s: p + s * step * t, exact, to_numpy(along)), config, documents_of(ids)
        )
        for s in (1, -1)
    )
    assert float(slope) == pytest.approx((ahead[0] - behind[0]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("scan_layers", [False, exhaustive(True)])
def test_the_weights_that_are_handed_out_stay_within_documents(scan_layers):
    model, params = make_model(BANDED, scan_layers=scan_layers)
    inputs = packed()[:, :-1]
    start_BxT = document_starts(inputs, END)
    _, state = jax.jit(lambda p: model.apply({"params": p}, inputs, start_BxT=start_BxT, mutable=["intermediates"]))(
        params
    )
    blocks = {name: part for name, part in state["intermediates"].items() if name.startswith("trf_blocks")}
    assert len(blocks) == (1 if scan_layers else 2)
    for weights in (block["att"]["weights"][0] for block in blocks.values()):
        weights = np.reshape(weights, (-1, *weights.shape[-4:]))  # of one layer or several
        same_BxTxS = np.equal(start_BxT[:, :, None], start_BxT[:, None])
        assert (weights[:, ~np.broadcast_to(same_BxTxS[:, None], weights.shape[1:])] == 0).all()
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


BYTES = TINY.replace(vocab_size=257, tokenizer="bytes", emb_dim=32, n_heads=8, n_layers=1)
CONFIG = TrainConfig(model=BYTES, batch_size=8, steps=100, warmup_steps=0, separate_documents=True)


@pytest.fixture(scope="module")
def batch():
    """Rows of texts with documents of random lengths, about 5."""
    rng = np.random.default_rng(0)
    return np.where(rng.random((8, 17)) < 0.2, 256, rng.integers(0, 256, (8, 17))).astype(np.int32)


@pytest.fixture(scope="module")
def single(batch):
    """A step on one device, of one micro-batch: (state before it, state after it, metrics)."""
    state = init_state(CONFIG)
    return state, *jax.jit(make_step(CONFIG))(state, batch)


def test_a_step_has_the_loss_of_the_documents_alone(batch, single):
    state, _, metrics = single
    documents, params = documents_of(batch, 256), to_numpy(state["params"])
    assert len(documents) > 20
    total, count = reference_loss(params, BYTES, documents)
    assert count == 8 * 16
    assert float(metrics["loss"]) == pytest.approx(total / count, rel=1e-6)
    assert reference.loss(params, BYTES, batch) != pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("accumulation", "mesh", "compute"),
    [
        (2, "data=2,fsdp=2,tensor=2", {}),
        exhaustive(4, "", {}),
        exhaustive(1, "fsdp=8", {}),
        exhaustive(1, "tensor=8", {}),
        exhaustive(2, "data=2,fsdp=2,tensor=2", {"scan_layers": True, "remat": "block"}),
    ],
)
def test_micro_batches_and_meshes_change_neither_loss_nor_gradient(batch, single, accumulation, mesh, compute):
    config = dataclasses.replace(
        CONFIG, grad_accumulation=accumulation, mesh=MeshConfig.parse(mesh), compute=ComputeConfig(**compute)
    )
    where = sharding.make_mesh(config.mesh) if mesh else None
    ids = batch
    if where is not None:
        ids = jax.device_put(batch, jax.sharding.NamedSharding(where, jax.sharding.PartitionSpec(BATCH, None)))
    _, want, want_metrics = single
    if compute:
        config_of_one = dataclasses.replace(config, grad_accumulation=1)
        want, want_metrics = jax.jit(make_step(config_of_one))(init_state(config), batch)
    state, metrics = jit_step(config, where)(init_state(config, mesh=where), ids)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5)
    # Adam's first moment is (1 - beta1) times the gradient.
    mine, theirs = (jaxgpt.model.leaves(side["opt_state"]) for side in (state, want))
    moments = [name for name in mine if "/mu/" in name]
    assert moments
    for name in moments:
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-6)


def text_tokens(documents=40):
    rng = np.random.default_rng(1)
    ids = [id for _ in range(documents) for id in (*rng.integers(97, 123, rng.integers(0, 12)).tolist(), 256)]
    return Tokens.from_ids(ids, "bytes")


def test_evaluate_keeps_documents_apart():
    model, params = make_model(BYTES)
    ids = np.array(text_tokens().ids_N[:60], np.int32)
    sequences = [ids[start : start + 12] for start in range(0, 59, 11)]
    total, count = reference_loss(to_numpy(params), BYTES, documents_of(sequences, 256))
    got = evaluate(model, params, ids, seq_len=11, separate_documents=True)
    assert (got.tokens, got.loss) == (count, pytest.approx(total / count, rel=1e-6))
    assert got.loss != pytest.approx(evaluate(model, params, ids, seq_len=11).loss, rel=1e-4)


RUN = dataclasses.replace(CONFIG, steps=2, log_interval=1, eval_interval=2, checkpoint_interval=2)


def test_a_run_says_that_documents_are_kept_apart_and_validates_so(tmp_path, capfd):
    tokens = text_tokens()
    result = train(RUN, tokens, tmp_path / "run")
    assert "attention and positions restart at each end-of-text (id 256)" in capfd.readouterr().err
    model, val_N = GPT(result.config, result.compute), tokens.split(RUN.val_fraction)[1]
    apart, together = (evaluate(model, result.params, val_N, separate_documents=s).loss for s in (True, False))
    assert result.val_loss == pytest.approx(apart, rel=1e-6)
    assert result.val_loss != pytest.approx(together, rel=1e-6)
    # The command reproduces the figure.
    val_tokens = Tokens.from_ids(val_N, "bytes")
    val_tokens.save(tmp_path / "val.tokens")
    arguments = ["evaluate", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "val.tokens"), "--json"]
    assert main([*arguments, "--separate-documents", "--dtype", "float32"]) == 0
    assert json.loads(capfd.readouterr().out)["loss"] == pytest.approx(apart, rel=1e-6)


def dry_run_notes(config, data):
    """What a dry run says before it compiles the step."""
    return "\n".join(itertools.takewhile(lambda said: not said.startswith("tokens:"), dry_run(config, data)))


def test_a_dry_run_says_so_too_and_where_nothing_is_to_be_kept_apart():
    one = Tokens.from_text("one text, and no end-of-text " * 20, "bytes")
    sources = [Source("several", text_tokens()), Source("one", one)]
    said = dry_run_notes(RUN, sources)
    assert "separate_documents: attention and positions restart at each end-of-text (id 256)" in said
    assert "one: no end-of-text in its first 580 tokens, so nothing there is kept apart" in said
    assert "several: no end-of-text" not in said
    assert "restart" not in dry_run_notes(dataclasses.replace(RUN, separate_documents=False), sources)


def characters(tmp_path):
    (tmp_path / "characters.json").write_text(json.dumps([chr(i) for i in range(97, 123)]))
    return jaxgpt.get_tokenizer(tmp_path).name


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vocab_size": 26, "tokenizer": characters}, "needs a tokenizer with an end-of-text token.* has none"),
        ({"tokenizer": "none"}, "needs a tokenizer with an end-of-text token.*none has none"),
        ({"vocab_size": 256}, "its id is 256, and the model has only 256 ids"),
    ],
    ids=["characters", "no tokenizer", "too few ids"],
)
def test_documents_without_an_end_of_text_cannot_be_kept_apart(tmp_path, fields, told):
    if fields.get("tokenizer") is characters:
        fields = {**fields, "tokenizer": characters(tmp_path)}
    config = dataclasses.replace(RUN, model=BYTES.replace(**fields))
    tokens = Tokens.from_ids([1, 2, 3] * 100, config.model.tokenizer)
    with pytest.raises(ConfigError, match=told):
        train(config, tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=told):
        make_step(config)
    model, params = make_model(config.model)
    with pytest.raises(ConfigError, match=told):
        evaluate(model, params, [1, 2, 3], separate_documents=True)


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        (np.zeros((1, 4), np.int32), r"start_BxT must have a start for each token, int32\[1, 5\], not int32\[1, 4\]"),
        (np.zeros(5, np.int32), r"int32\[1, 5\], not int32\[5\]"),
        (np.zeros((1, 5)), r"int32\[1, 5\], not float64\[1, 5\]"),
        ([[0] * 5], r"int32\[1, 5\], not \[\[0, 0, 0, 0, 0\]\]"),
    ],
)
def test_starts_that_do_not_fit_the_ids_are_refused(tiny, starts, told):
    model, params = tiny
    with pytest.raises(ValueError, match=told):
        model.apply({"params": params}, np.zeros((1, 5), np.int32), start_BxT=starts)


def test_starts_beside_a_cache_are_refused(tiny):
    model, params = tiny
    ids, starts = np.zeros((1, 5), np.int32), np.zeros((1, 5), np.int32)
    cache = Cache.empty(TINY, model.compute, jnp.zeros(1, jnp.int32), 16)
    with pytest.raises(ValueError, match="start_BxT is for whole rows, not for a cache"):
        model.apply({"params": params}, ids, cache=cache, start_BxT=starts, method="features")
