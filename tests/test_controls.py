"""Controls, which look at the text, against their definitions in float64: alone, and in the decoding loop."""

from __future__ import annotations

import functools
import logging
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_model, to_numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.generation import decode
from jaxgpt.generation.controls import (
    BadWords,
    FrequencyPenalty,
    LogitBias,
    MinNewTokens,
    NoRepeatNgram,
    PresencePenalty,
    RepetitionPenalty,
)
from jaxgpt.generation.decode import scan_generate
from jaxgpt.generation.history import History
from jaxgpt.generation.options import CONTROLS, FILTERS, SAMPLING, from_options
from jaxgpt.generation.sampling import REMOVED, Greedy, Temperature, TopK, TopP
from jaxgpt.generation.session import Generation, generate
from jaxgpt.model import reference

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

V, SLOTS = 9, 16
KEY = jax.random.key(7)


def controlled(parts, logits, prompt, new, stop_ids):
    """The logits [V] of one row in float64, and -inf for what is removed, written from the definitions."""
    logits, text = np.array(logits, np.float64), [*prompt, *new]
    for part in parts:
        if isinstance(part, RepetitionPenalty):
            for i in set(text):
                logits[i] = logits[i] * part.penalty if logits[i] < 0 else logits[i] / part.penalty
        elif isinstance(part, PresencePenalty):
            for i in set(new):
                logits[i] -= part.penalty
        elif isinstance(part, FrequencyPenalty):
            for i in new:
                logits[i] -= part.penalty
        elif isinstance(part, NoRepeatNgram):
            n = part.n
            for i in range(len(text) - n + 1):
                if text[i : i + n - 1] == text[len(text) - n + 1 :]:
                    logits[text[i + n - 1]] = -np.inf
        elif isinstance(part, BadWords):
            for *before, last in part.words:
                if len(before) <= len(text) and text[len(text) - len(before) :] == before:
                    logits[last] = -np.inf
        elif isinstance(part, LogitBias):
            for i, bias in part.biases:
                logits[i] += bias
        elif isinstance(part, MinNewTokens) and len(new) < part.n:
            logits[list(stop_ids)] = -np.inf
    return logits


ids = st.integers(0, V - 1)
PARTS = st.one_of(
    st.builds(RepetitionPenalty, st.sampled_from([0.5, 1, 1.3, 5.0])),
    st.builds(PresencePenalty, st.sampled_from([-2, -0.3, 0, 1.5])),
    st.builds(FrequencyPenalty, st.sampled_from([-0.7, 0, 0.25, 2])),
    st.builds(NoRepeatNgram, st.sampled_from([1, 2, 3, 4, 50, 10**12])),
    st.builds(BadWords, st.lists(st.lists(ids, min_size=1, max_size=3), min_size=2, max_size=2)),
    st.builds(LogitBias, st.dictionaries(ids, st.sampled_from([-100.0, -0.5, 3]), min_size=2, max_size=2)),
    st.builds(MinNewTokens, st.integers(0, 4)),
)
# Few ids, so that a text repeats itself.
TEXTS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), ids), min_size=3, max_size=3)


@settings(max_examples=12)
@given(parts=st.lists(PARTS, min_size=1, max_size=3), texts=TEXTS, drawn=st.integers(0, 5), seed=st.integers(0, 99))
@example(parts=[NoRepeatNgram(3)], texts=[([0, 1, 2, 0, 1], 0), ([1, 0], 0), ([2], 0)], drawn=0, seed=0)
@example(parts=[BadWords([[0, 1, 2], [5]])], texts=[([0, 1], 0), ([1], 0), ([0, 0, 1], 0)], drawn=0, seed=0)
@example(parts=[MinNewTokens(3)], texts=[([0], 0), ([1], 0), ([2], 0)], drawn=2, seed=0)
@example(parts=[MinNewTokens(2)], texts=[([0], 0), ([1], 0), ([2], 0)], drawn=2, seed=0)
def test_every_combination_of_controls_gives_the_logits_of_its_definition(parts, texts, drawn, seed):
    rng = np.random.default_rng(seed)
    prompts = [prompt for prompt, _ in texts]
    new_BxN = rng.integers(0, 3, (len(texts), drawn)).astype(np.int32)
    logits_BxV = rng.normal(size=(len(texts), V)).astype(np.float32) * 3
    history = History.of(prompts, SLOTS)
    for token_B in new_BxN.T:
        history = history.append(jnp.asarray(token_B))
    stops = [4, 7]
    history = history.replace(stop_ids=jnp.array([*stops, -1, -1]))
    sampler = functools.reduce(operator.or_, parts)
    got_BxV = np.asarray(sampler.control(jnp.asarray(logits_BxV), history))
    for logits, prompt, new, got in zip(logits_BxV, prompts, new_BxN.tolist(), got_BxV, strict=True):
        expected = controlled(parts, logits, prompt, new, stops)
        removed = np.isneginf(expected)
        assert (got[removed] < REMOVED / 100).all()
        np.testing.assert_allclose(got[~removed], expected[~removed], rtol=1e-5, atol=1e-5)


RAGGED = [[5, 9, 2], [17, 3, 88, 41, 6, 0, 12], list(range(40, 60))]
STOPS = [69, 8]
# Each of them decides some of the ids that the tiny model draws (which a test checks).
OPTIONS = {
    "logit_bias": {3: 1.5, 88: -1.0},
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[61], [64, 69]],
    "min_new_tokens": 4,
}


def naive(model, params, prompt, n, options, filters=None, key=None):
    """Each id from the last `context_length` ids, and controls that see the whole text."""
    params, new, parts = to_numpy(params), [], [CONTROLS[name](value) for name, value in options.items()]
    for i in range(n):
        text = [*prompt, *new][-model.config.context_length :]
        logits = controlled(parts, reference.gpt(params, model.config, [text])[0, -1], prompt, new, STOPS)
        logits = np.float32(np.maximum(logits, REMOVED))
        token = np.argmax(logits) if filters is None else filters(jnp.asarray(logits), jax.random.fold_in(key, i))
        new.append(int(token))
        if new[-1] in STOPS:
            break
    return new


def new_ids(result):
    return [row.tolist() for row in result.new_tokens]


def test_controls_see_the_whole_text_within_and_past_the_context(tiny):
    expected = [naive(*tiny, prompt, 30, OPTIONS) for prompt in RAGGED]
    assert new_ids(generate(*tiny, RAGGED, 30, stop_ids=STOPS, **OPTIONS)) == expected
    assert [len(row) for row in expected] == [30, 8, 14]
    for name in OPTIONS:  # each decides something here
        others = {other: value for other, value in OPTIONS.items() if other != name}
        assert [naive(*tiny, prompt, 30, others) for prompt in RAGGED] != expected, name
    run = Generation(*tiny, RAGGED[1:2], 30, stop_ids=STOPS, chunk=4, **OPTIONS)  # alone, in pieces
    assert [int(i) for (new,) in run for i in new] == expected[1]


def test_controls_draw_with_the_same_keys_and_come_before_filters(tiny):
    filters, prompts = Temperature(1.5) | TopK(40) | TopP(0.9), RAGGED[:2]
    draw, keys = jax.jit(filters.__call__), [jax.random.fold_in(KEY, r) for r in range(2)]
    expected = [naive(*tiny, row, 9, OPTIONS, draw, key) for row, key in zip(prompts, keys, strict=True)]
    words = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, **OPTIONS}
    assert new_ids(generate(*tiny, prompts, 9, seed=7, stop_ids=STOPS, **words)) == expected
    assert expected != [naive(*tiny, row, 9, {}, draw, key) for row, key in zip(prompts, keys, strict=True)]

    logits, history = jnp.linspace(-3, 3, 2 * V).reshape(2, V), History.of([[V - 1], [2]], SLOTS)
    orders = RepetitionPenalty(9.0) | Temperature(0.5), Temperature(0.5) | RepetitionPenalty(9.0)
    keys = jax.random.split(KEY, 2)
    assert orders[0](logits, keys, history).tolist() == orders[1](logits, keys, history).tolist()
    assert (Greedy() | RepetitionPenalty(9.0))(logits, None, history).tolist() == [V - 2, V - 1]


def test_the_pure_generator_has_controls_too(tiny):
    prompts, sampler = np.array([row[:3] for row in RAGGED]), from_options(**OPTIONS)
    expected = new_ids(generate(*tiny, prompts, 9, sampler=sampler))
    assert jax.jit(lambda ids: scan_generate(*tiny, ids, 9, sampler=sampler))(prompts).tolist() == expected


@pytest.mark.exhaustive
def test_the_pure_generator_sees_what_is_beyond_the_context(tiny):
    prompt = np.arange(15)[None]
    expected = new_ids(generate(*tiny, prompt, 5, no_repeat_ngram_size=1))
    assert scan_generate(*tiny, prompt, 5, sampler=from_options(no_repeat_ngram_size=1)).tolist() == expected


def test_a_sampler_that_does_not_see_the_text_has_no_history(tiny, monkeypatch):
    states, prefill = [], decode.prefill
    monkeypatch.setattr(
        decode, "prefill", lambda *args, **options: states.append(prefill(*args, **options)) or states[-1]
    )
    generate(*tiny, [[1]], 1, logit_bias={5: 1.0})
    generate(*tiny, [[1]], 1, presence_penalty=0.5)
    assert states[0].history is None
    assert states[1].history.ids_BxS.shape == (1, 64)


def test_numbers_of_controls_compile_nothing(caplog):
    model, params = make_model(TINY.replace(n_layers=1), seed=5)

    def compiled(**options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            generate(model, params, [[1, 2]], 3, **options)
        return re.findall(r"Compiling jit\((prefill|decode_tokens)\)", caplog.text)

    options = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "logit_bias": {3: 1.0}, "bad_words_ids": [[1, 2]]}
    assert compiled(**options) == ["prefill", "decode_tokens"]
    others = {"repetition_penalty": 2, "no_repeat_ngram_size": 9, "logit_bias": {8: -1}, "bad_words_ids": [(7, 3)]}
    assert compiled(**others) == []


def test_where_every_id_is_removed_all_are_equally_likely():
    history = History.of([list(range(V))], SLOTS)
    sampler, logits = NoRepeatNgram(1) | Temperature(0.5), jnp.arange(V, dtype=jnp.float32)[None]
    np.testing.assert_allclose(jax.nn.softmax(sampler.filter(sampler.control(logits, history))), 1 / V)
    assert (NoRepeatNgram(1) | Greedy())(logits, None, history).tolist() == [0]


def test_the_options_mean_these_samplers():
    assert repr(from_options()) == "Greedy()"
    assert repr(from_options(repetition_penalty=1.2, temperature=None, top_k=0)) == "RepetitionPenalty(1.2) | Greedy()"
    assert repr(from_options(top_k=5)) == "Temperature(1.0) | TopK(5)"
    assert repr(from_options(min_p=0.1, top_p=0.5, temperature=0.7)) == "Temperature(0.7) | TopP(0.5) | MinP(0.1)"
    assert repr(from_options(temperature=0, top_k=5, min_new_tokens=2)) == "MinNewTokens(2) | Greedy()"
    everything = {**dict.fromkeys(FILTERS, 1), **OPTIONS}
    assert set(everything) == set(SAMPLING)
    assert repr(from_options(**everything)) == (
        "LogitBias({3: 1.5, 88: -1.0}) | RepetitionPenalty(1.1) | PresencePenalty(0.3) | FrequencyPenalty(0.1) | "
        "NoRepeatNgram(2) | BadWords(((61,), (64, 69))) | MinNewTokens(4) | Temperature(1.0) | TopK(1) | TopP(1.0) | "
        "MinP(1.0)"
    )
    assert eval(repr(from_options(**OPTIONS))) == from_options(**OPTIONS)
    assert hash(from_options(**OPTIONS)) == hash(from_options(**OPTIONS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, not 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2, not 2.1"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be from -2 to 2, not '1'"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size must be an integer of 1 or more, not 0"),
        ({"no_repeat_ngram_size": 2.0}, "no_repeat_ngram_size"),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of 0 or more, not -1"),
        ({"logit_bias": {97: 1.0}}, "logit_bias has the id 97, outside the vocabulary: 0 to 96"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias.* is -1"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias.* is 'a'"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\] must be a finite number, not nan"),
        ({"logit_bias": [5]}, r"logit_bias must be a dict from ids to numbers, not \[5\]"),
        ({"bad_words_ids": [[1], []]}, r"bad_words_ids\[1\] is empty"),
        ({"bad_words_ids": []}, "bad_words_ids holds no word"),
        ({"bad_words_ids": [[1, 97]]}, r"bad_words_ids\[0\]\[1\] is 97, outside the vocabulary: 0 to 96"),
        ({"bad_words_ids": ["word"]}, r"bad_words_ids\[0\] must be a list of ids, not 'word'"),
        ({"bad_words_ids": 5}, "bad_words_ids must be a list of lists of ids, not 5"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 0.8}, "needs a key: .* or seed=0"),
    ],
)
def test_controls_out_of_range_are_refused_before_any_compute(tiny, monkeypatch, options, message):
    monkeypatch.setattr(decode, "prefill", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        generate(*tiny, [[1, 2]], 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": Greedy(), "temperature": 0.5}, r"temperature and sampler=Greedy\(\) exclude each other"),
        ({"seed": 0, "key": KEY}, "key and seed exclude each other"),
        ({"stop": ["a"]}, "'stop': use generate_text or stream"),
        ({"repetition_penalti": 1.5}, "did you mean 'repetition_penalty'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tiny, options, message):
    with pytest.raises(TypeError, match=message):
        generate(*tiny, [[1, 2]], 4, **options)


def test_a_sampler_has_no_other_options():
    with pytest.raises(TypeError, match="no sampler has the option 'top_a'; there are temperature, top_k"):
        from_options(top_a=1)
