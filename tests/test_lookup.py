"""Prompt-lookup decoding: the ids are those without it, bit for bit, and what it reads at once is what it should."""

from __future__ import annotations

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCALED, TINY, exhaustive, make_model, needs_compiler, random_ids

from jaxgpt import generate, generate_text, load, prepare, stream
from jaxgpt.config import ComputeConfig
from jaxgpt.errors import KernelError
from jaxgpt.generation import lookup
from jaxgpt.generation.history import History
from jaxgpt.measuring.scripts import Script, copying, misleading
from jaxgpt.model import GPT

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

CONFIG = TINY.replace(context_length=128)
# Readings of the weights in one test, without drafts and with: here, because its cases share their compiled code.
READINGS = collections.Counter()
REPEATED = [*range(20), *range(10)]


def script(text):
    return Script.of(text + [0] * (16 - len(text)))


def prepared(config=CONFIG, dtype=None, **compute):
    model, params = prepare(*make_model(config, **compute), dtype)
    assert model.compute.native_kernel
    return model, params


def assert_same(model, params, prompt, n, lookup=8, **options):
    """Generates with and without lookup. Returns the result with it."""
    want = generate(model, params, [prompt], n, **options)
    got = generate(model, params, [prompt], n, lookup=lookup, **options)
    np.testing.assert_array_equal(got.tokens[0], want.tokens[0])
    assert got.finish_reasons == want.finish_reasons
    assert want.looked_up == 0
    if want.logprobs is not None:
        for ours, plain in zip(
            jax.tree.leaves((got.logprobs, got.sampler_logprobs)),
            jax.tree.leaves((want.logprobs, want.sampler_logprobs)),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, plain)
    return got


SAMPLED = {"temperature": 0.3, "seed": 1, "logprobs": 3}
CONTROLS = {
    "top_k": 50,
    "repetition_penalty": 0.7,
    "top_p": 0.95,
    "no_repeat_ngram_size": 30,
    "frequency_penalty": -0.1,
    "min_new_tokens": 40,
}


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "config", "n", "options"),
    [
        ("float32", CONFIG, 90, SAMPLED),
        exhaustive("float32", CONFIG, 110, {**SAMPLED, **CONTROLS}),
        exhaustive("bfloat16", SCALED.replace(context_length=128), 110, {"cache_dtype": "bfloat16"}),
        exhaustive("float32", SCALED.replace(context_length=128), 110, {**SAMPLED, "cache_dtype": "int8"}),
        exhaustive("int8", CONFIG, 110, {"temperature": 0.2, "min_p": 0.05, "seed": 2}),
        exhaustive("float32", CONFIG, 110, {"temperature": 0.2, "seed": 3, "lookup": 32}),
        exhaustive("bfloat16", CONFIG, 110, {"temperature": 0.2, "top_p": 0.9, "seed": 4, "lookup": 2}),
    ],
)
def test_ids_and_logprobs_have_the_bits_of_one_at_a_time_also_past_the_context(built, dtype, config, n, options):
    got = assert_same(*prepared(config, dtype), REPEATED, n, **options)
    assert 0 < got.looked_up < n - 10


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_thousands_of_ids_are_the_same(built, dtype):
    model, params = prepared(CONFIG.replace(context_length=512), dtype)
    looked_up = 0
    for seed in range(8):
        prompt = random_ids(CONFIG, 1, 20 + seed, seed)[0].tolist()
        looked_up += assert_same(model, params, prompt, 400, temperature=0.15, seed=seed).looked_up
    assert looked_up > 300


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_texts_of_the_bundled_model_are_the_same(built, dtype):
    model, params = prepare(*load("shakespeare"), dtype)
    looked_up = 0
    for prompt in ("ROMEO:\nO Juliet, Juliet, O Juliet", "KING RICHARD III:\nWhat, what, what"):
        for options in ({"lookup": 3}, {"temperature": 0.7, "top_k": 20, "seed": 5}):
            looked_up += assert_same(model, params, list(prompt.encode()), 210, **options).looked_up
    assert looked_up > 0


@needs_compiler
@pytest.mark.parametrize(
    ("prompt", "text", "looked_up"),
    [
        # 3 with the prompt, 4 alone; drafts 5 6 7, which give 8 too; drafts 9 0 1, of which one is right, and 11.
        (
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2],
            [3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14],
            [0, 0, 0, 1, 2, 3, 3, 4, 4, 4, 4],
        ),
        # Drafts 5 0 1, of which the first is wrong.
        ([1, 2, 3, 4, 5, 0, 1, 2], [3, 4, 9, 10, 11], [0, 0, 0, 0, 0]),
        # Drafts up to the text's end.
        ([7, 8, 9, 7, 8], [9, 7, 8, 9, 7, 8, 9, 7, 8], [0, 0, 0, 1, 2, 3, 3, 4, 5]),
    ],
)
def test_drafts_are_drawn_up_to_the_first_that_is_wrong_and_one_id_more(built, prompt, text, looked_up):
    model, params = prepared()
    for n, expected in enumerate(looked_up, 1):
        result = generate(model, params, [prompt], n, sampler=script(text), lookup=4)
        assert (result.new_tokens[0].tolist(), result.looked_up) == (text[:n], expected)


@needs_compiler
def test_a_text_ends_at_a_stop_id_within_drafts(built):
    prompt, text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2], [3, 4, 5, 6, 7, 8, 9]
    result = generate(*prepared(), [prompt], 7, sampler=script(text), lookup=4, stop_ids=[6])
    assert (result.new_tokens[0].tolist(), result.finish_reasons, result.looked_up) == ([3, 4, 5, 6], ["stop"], 1)


def after_readings(N, chosen, readings):
    """What readings cost and draw where a match is always found: rows (drafts were read, ids drawn). With drafts,
    `chosen(i)` of them are right."""
    history = History.of([[1, 2, 3, 4, 1, 2, 3]], 64)
    state = SimpleNamespace(history=jax.device_put(history), memory=SimpleNamespace(length=7, slots=64))
    after = jax.jit(lambda drafting, drawn: drafting.after(state, drawn))
    drafting, rows = after(lookup._Drafting.first(N), 1), [(False, 1)]
    for i in range(readings):
        there = bool(drafting.there)
        rows.append((there, 1 + chosen(i) if there else 1))
        drafting = after(drafting, rows[-1][1])
    assert int(drafting.accepted) == sum(drawn - 1 for _, drawn in rows)
    return np.array(rows)


@pytest.mark.parametrize("N", [1, 7, 31])
def test_drafts_cost_at_most_what_was_granted_wherever_they_fail(N):
    rng = np.random.default_rng(N)
    cost = lookup.DRAFT_COST * N
    # Drafts that are right: none; sometimes all; all for a while, then none for a while; and always the first.
    sometimes = [N * (rng.random(200) < rate) for rate in (0, 0.1, 0.5)]
    for right in (*sometimes, N * (np.arange(200) % 40 < 20), np.ones(200)):
        there, drawn = after_readings(N, lambda i, right=right: int(right[i]), 200).T
        # What lookup took more than plain decoding up to each reading, in hundredths of a reading.
        more = np.cumsum(100 + cost * there - 100 * drawn)
        allowed = lookup.ALLOWANCE * np.cumsum(drawn)
        assert np.all(more <= allowed + cost)
        later = (more - allowed)[None] - (more - allowed)[:, None]  # of any stretch of the text
        assert later[np.triu_indices(201)].max() <= lookup.MOST_FAILURES * cost
        # And no credit is left unused.
        assert np.all(np.diff(np.flatnonzero(there), append=200) <= cost / lookup.ALLOWANCE + 1)


def test_drafts_that_fail_become_rare_and_return_at_once_where_they_are_right():
    there, _ = after_readings(7, lambda i: 0, 200).T
    assert np.diff(np.flatnonzero(there)).tolist() == [69, 70]
    there, _ = after_readings(7, lambda i: 7, 200).T
    assert there[1:].all()
    # Four failures after a stretch of right ones.
    there, _ = after_readings(7, lambda i: 7 * (i < 20), 60).T
    assert np.flatnonzero(there).tolist() == list(range(1, 25))


@needs_compiler
@pytest.mark.parametrize(("text", "most"), [(misleading(), None), (copying(128, 128, 97 + 128), 48)])
def test_readings_cost_at_most_what_is_allowed(built, monkeypatch, text, most):
    """Counts the readings of the weights with each number of ids. Without lookup there are 127 after the prompt's."""
    readings, after = READINGS, lookup._Drafting.after
    readings.clear()

    def counted(drafting, state, drawn):
        jax.debug.callback(lambda there: READINGS.update([bool(there)]), drafting.there)
        return after(drafting, state, drawn)

    monkeypatch.setattr(lookup._Drafting, "after", counted)
    model, params = prepared(CONFIG.replace(context_length=256, vocab_size=97 + 128))
    result = generate(model, params, [text[:128]], 128, sampler=Script.of(text[128:]), lookup=8)
    jax.effects_barrier()
    assert result.tokens[0].tolist() == text
    assert sum(readings.values()) == 127 - result.looked_up
    cost = sum(readings.values()) + lookup.DRAFT_COST * 7 / 100 * readings[True]
    assert cost <= 127 * (1 + lookup.ALLOWANCE / 100) + lookup.DRAFT_COST * 7 / 100
    if most is None:
        assert result.looked_up == 0
        assert readings[True] == 2
    else:
        assert sum(readings.values()) <= most


def test_no_four_ids_of_the_misleading_text_occur_twice():
    text = misleading()
    assert len(text) == 256
    assert len({tuple(text[i : i + 4]) for i in range(253)}) == 253


def test_drafts_follow_the_last_of_the_longest_matches():
    rng = np.random.default_rng(0)
    jitted = jax.jit(lookup.draft, static_argnums=1)
    none = 0
    for _ in range(300):
        text = rng.integers(0, 3, rng.integers(1, 40)).tolist()
        history = History.of([text], 64)
        history.ids_BxS[0, len(text) :] = rng.integers(0, 3, 64 - len(text))  # what must not be looked at
        ids, found = jax.device_get(jitted(history, 6))
        matches = []  # (length, column of the match's last id)
        for end in range(len(text) - 1):
            n = 0
            while n < min(end + 1, lookup.LONGEST) and text[end - n] == text[len(text) - 1 - n]:
                n += 1
            matches.append((n, end))
        n, end = max(matches, default=(0, 0))
        assert found == (n >= lookup.SHORTEST)
        none += not found
        if found:
            whole = list(text)
            for i in range(6):
                whole.append(whole[end + 1 + i])
            assert ids.tolist() == whole[len(text) :]
    assert 10 < none < 290


@needs_compiler
@pytest.mark.exhaustive
def test_streams_and_stop_strings_are_the_same(built):
    config = CONFIG.replace(vocab_size=257, tokenizer="bytes")
    model, params = prepared(config)
    plain = generate_text(model, params, "abcabcabc", 60)[0]
    middle = plain[30:33]
    for stop in (None, middle):
        want = generate_text(model, params, "abcabcabc", 60, stop=stop)[0]
        assert generate_text(model, params, "abcabcabc", 60, stop=stop, lookup=5)[0] == want
        assert "abcabcabc" + "".join(stream(model, params, "abcabcabc", 60, stop=stop, lookup=5)) == want
    assert len(want) < len(plain)


@pytest.mark.parametrize(
    ("value", "rows", "error", "message"),
    [
        (True, 1, ValueError, "lookup must be an integer of 1 or more, not True"),
        (1, 1, ValueError, "lookup must be from 2 to 32, the ids per reading, not 1"),
        (33, 1, ValueError, "lookup must be from 2 to 32, the ids per reading, not 33"),
        (8, 2, ValueError, "lookup continues one text at a time, not 2: call it once per text"),
        (8, 1, KernelError, r"lookup needs the C\+\+ kernel.*run `jaxgpt build-kernel`.*without JAXGPT_KERNEL=0"),
    ],
)
def test_lookup_is_refused_where_it_cannot_be(tiny, value, rows, error, message):
    with pytest.raises(error, match=message):
        generate(*tiny, [[1, 2]] * rows, 4, lookup=value)


@needs_compiler
def test_lookup_is_refused_for_weights_that_the_kernel_does_not_take(built):
    model, params = make_model()
    model = GPT(model.config, ComputeConfig(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r'jaxgpt.prepare\(model, params, "bfloat16"\)'):
        generate(model, params, [[1, 2]], 4, lookup=8)


@needs_compiler
def test_a_logit_that_is_not_finite_is_told_with_its_number(built):
    """NaN is in a position after those of the padded prompt, and drafts reach it."""
    model, params = prepared()
    prompt, text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2], [3, 4, 5, 6, 7, 8, 9]
    position = params["pos_emb"]["weight"].at[16].set(jnp.nan)
    broken = {**params, "pos_emb": {"weight": position}}
    with pytest.raises(FloatingPointError, match="new token 5 of prompt 0"):
        generate(model, broken, [prompt], 7, lookup=4, sampler=script(text))
