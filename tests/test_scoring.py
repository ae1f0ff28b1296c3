"""`score` against the float64 reference, for prompts and continuations of all lengths, however they are batched."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALTERNATING, TINY, exhaustive, make_model, make_model_that_draws, to_numpy

from jaxgpt import Cache, ComputeConfig, GPTConfig, MeshConfig, get_tokenizer, make_mesh, score, shard
from jaxgpt.model import reference
from jaxgpt.scoring import buckets, likelihood
from jaxgpt.scoring.buckets import Shape, choose_shapes, prompts_per_batch

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

CONTEXT = 48
CONFIG = TINY.replace(context_length=CONTEXT)
# Prompts shorter and longer than those that are read once for all continuations, and longer than the context; single
# continuations, those of one id, and one that fills the context.
LENGTHS = ((1, [3]), (5, [2, 1]), (20, [4, 7, 1]), (30, [1, 1]), (45, [1, 2, 9]), (60, [48, 1]), (16, [6] * 5))


def rows(config: GPTConfig = CONFIG, lengths=LENGTHS, seed: int = 0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, config.vocab_size, n) for n, _ in lengths]
    return prompts, [[rng.integers(0, config.vocab_size, n) for n in ns] for _, ns in lengths]


def by_definition(params, config, prompt, continuation) -> tuple[np.ndarray, bool]:
    """(log p of each id, whether all are the likeliest), from the last `context_length` ids before the last one."""
    ids = np.concatenate([prompt, continuation])[:-1][-config.context_length :]
    logits = reference.gpt(params, config, [ids])[0][-len(continuation) :]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[np.arange(len(continuation)), continuation], bool(np.all(logits.argmax(-1) == continuation))


@pytest.fixture(scope="module")
def model_and_params():
    return make_model(CONFIG)


@pytest.mark.parametrize(
    ("config", "scan_layers", "batch_tokens"),
    [
        (CONFIG, False, 4096),
        exhaustive(CONFIG, False, 64),
        exhaustive(CONFIG, True, 4096),
        (ALTERNATING.replace(context_length=CONTEXT, tie_embeddings=False), True, 100),
    ],
)
def test_scores_are_those_of_the_float64_reference(config, scan_layers, batch_tokens):
    model, params = make_model(config, scan_layers=scan_layers)
    prompts, continuations = rows()
    scored: list[int] = []
    scores = score(model, params, prompts, continuations, batch_tokens=batch_tokens, progress=scored.append)
    exact = to_numpy(params)
    for prompt, group, group_scores in zip(prompts, continuations, scores, strict=True):
        for continuation, got in zip(group, group_scores, strict=True):
            want, greedy = by_definition(exact, config, prompt, continuation)
            np.testing.assert_allclose(got.token_logprobs, want, atol=2e-5, rtol=0)
            assert got.logprob == pytest.approx(want.sum(), abs=2e-5)
            assert got.is_greedy == greedy
            assert got.tokens.tolist() == continuation.tolist()
    assert sum(scored) == sum(map(len, continuations))


def test_a_score_does_not_depend_on_the_others(model_and_params):
    prompts, continuations = rows()
    together = score(*model_and_params, prompts, continuations)
    for i, j in ((2, 1), (5, 0)):
        ((alone,),) = score(*model_and_params, [prompts[i]], [[continuations[i][j]]])
        np.testing.assert_allclose(alone.token_logprobs, together[i][j].token_logprobs, atol=5e-6, rtol=0)


def test_chunks_of_few_logits_give_the_same(model_and_params, monkeypatch):
    model, params = model_and_params
    prompts, continuations = rows(lengths=LENGTHS[:4])
    whole = score(model, params, prompts, continuations)
    likelihood._score.clear_cache()
    monkeypatch.setattr(likelihood, "LOGITS", 5 * CONFIG.vocab_size)
    chunked = score(model, params, prompts, continuations)
    for a, b in zip(itertools.chain(*whole), itertools.chain(*chunked), strict=True):
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=2e-6, rtol=0)
        assert a.is_greedy == b.is_greedy

    (part,) = likelihood._parts(prompts[2:3], continuations[2:3], CONTEXT, 4096)
    arrays = likelihood._arrays([part], Shape(32, 16, 4), 3)
    program = functools.partial(likelihood._score.__wrapped__, model, tails=4)
    # No array has more than a chunk's logits.
    assert max(widths(jax.make_jaxpr(program)(params, *arrays).jaxpr)) == 5
    likelihood._score.clear_cache()


def widths(jaxpr):
    """The number of rows of every value that is computed and has the vocabulary as its last axis."""
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from widths(inner)
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            if shape and shape[-1] == CONFIG.vocab_size:
                yield math.prod(shape[:-1])


def test_what_greedy_decoding_draws_is_greedy_and_nothing_else(model_and_params):
    model, params = model_and_params
    prompts, _ = rows(lengths=LENGTHS[:4])
    drawn = [reference.generate_greedy(to_numpy(params), CONFIG, prompt, 5)[-5:] for prompt in prompts]
    other = [[*new[:-1], (new[-1] + 1) % CONFIG.vocab_size] for new in drawn]
    for greedy, changed in score(model, params, prompts, [list(pair) for pair in zip(drawn, other, strict=True)]):
        assert greedy.is_greedy
        assert not changed.is_greedy
        assert greedy.logprob > changed.logprob


def test_a_prompt_is_read_once_for_all_of_its_continuations():
    prompts, continuations = rows(lengths=((30, [4, 4, 4]), (12, [4, 4]), (45, [9, 4])))
    parts = list(likelihood._parts(prompts, continuations, CONTEXT, 4096))
    # The second prompt is short, and the third is cropped differently for each continuation.
    assert [tuple(part.size) for part in parts] == [(30, 3, 3), (15, 0, 0), (15, 0, 0), (48, 0, 0), (48, 0, 0)]
    assert [len(part.continuations) for part in likelihood._parts(prompts[:1], continuations[:1], CONTEXT, 70)] == [
        2,
        1,
    ]


def hellaswag_lengths(items):
    rng = np.random.default_rng(0)
    for total in np.clip(rng.normal(80, 30, items), 24, 170).astype(int):
        tail = max(4, int(total * rng.uniform(0.2, 0.4)))
        yield int(total - tail), int(tail), 4


@pytest.mark.parametrize("items", [1, 20, 2000])
def test_a_call_has_few_shapes_and_little_padding(items):
    sizes = [Shape(*lengths) for lengths in hellaswag_lengths(items)]
    shapes = choose_shapes(sizes, 1024)
    assert all(np.all(np.array(shape) >= size) for shape, size in zip(shapes, sizes, strict=True))
    assert len(set(shapes)) <= buckets.MOST_SHAPES
    read = sum(p + n * k for p, n, k in shapes)
    needed = sum(p + n * k for p, n, k in sizes)
    assert read <= 1.4 * needed + buckets.MOST_SHAPES * buckets.TOKENS_PER_SHAPE
    for shape in set(shapes):
        for prompts in (1, 3, 50):
            size = prompts_per_batch(shape, prompts, 4096)
            assert size == 1 or size * shape.slots <= 1.25 * 4096 + 2 * shape.slots
            assert prompts_per_batch(shape, prompts, 4096, multiple=4) % 4 == 0
    assert choose_shapes([Shape(1000, 30, 2)], 1024)[0].prompt == 1024


def test_lengths_of_every_sort_have_few_shapes_soon(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = [
        Shape(*map(int, triple)) for triple in zip(*(rng.integers(1, m, 5000) for m in (900, 100, 9)), strict=True)
    ]
    compared = []
    monkeypatch.setattr(np, "argmin", lambda x, argmin=np.argmin: compared.append(x.size) or argmin(x))
    shapes = choose_shapes(sizes, 1024)
    assert len(set(shapes)) <= buckets.MOST_SHAPES
    assert all(np.all(np.array(shape) >= size) for shape, size in zip(shapes, sizes, strict=True))
    assert max(compared) <= buckets.MOST_PAIRED**2


def test_lengths_of_one_bucket_share_a_compilation(model_and_params):
    likelihood._score.clear_cache()
    for seed, lengths in enumerate(
        [((30, [4, 4, 4]), (20, [5, 5])), ((25, [3]), (31, [4, 4, 2])), ((17, [5] * 4),) * 2]
    ):
        score(*model_and_params, *rows(lengths=lengths, seed=seed))
    assert likelihood._score._cache_size() == 1


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("held", "taken"), [([4, 5, 6], [1]), ([4, 5, 6], [2, 0, 0, 1]), ([5], [0, 0]), ([6], [0])], ids=str
)
def test_rows_of_a_cache_can_be_taken(held, taken, scan_layers):
    compute = ComputeConfig(scan_layers=scan_layers)

    def cache_of(numbers):
        """A cache whose rows hold these numbers, and start in these slots."""
        cache = Cache.empty(TINY, compute, jnp.array(numbers), slots=9)

        def fill(kept):  # one row has no axis of its own
            numbers_BxHxSxK = np.ones((1, 3, 9, 8)) * np.reshape(numbers, (-1, 1, 1, 1))
            return np.broadcast_to(numbers_BxHxSxK if len(numbers) > 1 else numbers_BxHxSxK[0], kept.shape)

        return dataclasses.replace(cache, layers=jax.tree.map(fill, cache.layers), length=7)

    got, want = jax.tree.map(jnp.asarray, cache_of(held)).take(jnp.array(taken)), cache_of([held[i] for i in taken])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_text_has_the_tokens_that_it_has_after_its_prompt():
    config = TINY.replace(vocab_size=50257, tokenizer="gpt2", context_length=CONTEXT)
    model, params = make_model(config)
    prompts = ["The capital of France is", ""]
    continuations = [[" Paris", " a mystery"], ["The cat sat", "\n"]]
    encode = get_tokenizer("gpt2").encode
    ids = [[encode(text) for text in group] for group in continuations]
    texts = score(model, params, prompts, continuations)
    assert [[s.tokens.tolist() for s in group] for group in texts] == ids
    by_ids = score(model, params, [encode(prompts[0]), [50256]], ids)
    assert [[s.logprob for s in group] for group in texts] == [[s.logprob for s in group] for group in by_ids]
    for prompt, continuation in (("The capi", "tal of France"), ("It is ", "here")):
        with pytest.raises(ValueError, match=r"continuations\[0\]\[0\], '.*', begins inside a token .* before a space"):
            score(model, params, [prompt], [[continuation]])


@pytest.mark.parametrize(
    ("prompts", "continuations", "error", "message"),
    [
        ([[1]], [[[]]], ValueError, r"continuations\[0\]\[0\] is empty"),
        (["a"], [[""]], ValueError, r"continuations\[0\]\[0\] is empty"),
        ([[1], []], [[[1]], [[1]]], ValueError, r"prompts\[1\] is empty"),
        ([[1]], [[[1], [1] * 49]], ValueError, r"continuations\[0\]\[1\] has 49 ids, more than context_length=48"),
        ([[1]], [[[1, 97]]], ValueError, r"continuations\[0\]\[0\]\[1\] is 97, outside the vocabulary: 0 to 96"),
        ([[1.0]], [[[1]]], ValueError, r"prompts\[0\]\[0\] is 1.0 \(float\)"),
        ([[1], [2]], [[[1]]], ValueError, "2 prompts, but continuations of 1"),
        ("To be", [[" or"]], TypeError, "prompts must be a list with one entry per prompt, not 'To be'"),
        ([[1]], " or", TypeError, "continuations must be a list with one entry per prompt"),
        (["To be"], [" or"], TypeError, r"continuations\[0\] must be a list of continuations of prompts\[0\]"),
        ([[1]], [[3]], TypeError, r"continuations\[0\]\[0\] must be a text or a list of ids, not 3"),
        ([[1]], [[" or"]], TypeError, r"continuations\[0\]\[0\] is text, but its prompt is ids"),
    ],
)
def test_bad_prompts_and_continuations_are_refused_by_place(
    prompts, continuations, error, message, model_and_params, monkeypatch
):
    monkeypatch.setattr(likelihood, "_score", lambda *_, **__: pytest.fail("computed something"))
    with pytest.raises(error, match=message):
        score(*model_and_params, prompts, continuations)
    with pytest.raises(ValueError, match="batch_tokens must be 1 or more"):
        score(*model_and_params, [[1]], [[[1]]], batch_tokens=0)


def test_nothing_to_score_gives_nothing(model_and_params):
    assert score(*model_and_params, [], []) == []
    assert score(*model_and_params, [[1]], [[]]) == [[]]


def test_numbers_that_are_not_finite_are_an_error():
    model, params = make_model_that_draws(5, CONFIG)
    params["out_head"] = {"weight": params["out_head"]["weight"].at[3].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="continuation 0 of prompt 0"):
        score(model, params, [[1]], [[[2]]])


@pytest.mark.exhaustive
def test_a_mesh_gives_the_same_scores(model_and_params):
    model, params = model_and_params
    prompts, continuations = rows()
    alone = score(model, params, prompts, continuations)
    spread = score(model, shard(params, make_mesh(MeshConfig(data=2, tensor=3))), prompts, continuations)
    for a, b in zip(itertools.chain(*alone), itertools.chain(*spread), strict=True):
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-5, rtol=0)
