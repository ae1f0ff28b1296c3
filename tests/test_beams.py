"""Beam search against its definition, prompt by prompt, in float64 NumPy."""

from __future__ import annotations

import functools
import itertools
import logging
import re

import jax
import numpy as np
import pytest
from helpers import TINY, exhaustive, make_model, to_numpy

from jaxgpt import BeamSearchResult, beam_search, generate, generate_text, prepare
from jaxgpt.generation import beams
from jaxgpt.generation.sampling import Greedy
from jaxgpt.model import reference

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

RAGGED = [[5, 9, 2], [17, 3, 88, 41, 6, 0, 12], [33]]


def log_probs(params, config, ids_RxT):
    """[R, V], of the id after each row."""
    logits = reference.gpt(params, config, np.array(ids_RxT))[:, -1]
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def defined(params, config, prompt, n, *, num_beams, length_penalty=1.0, early_stopping=False, stop_ids=()):
    """[(score, new ids)], the best first."""

    def best(hypotheses):
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis[0])[:num_beams]

    running, finished = [(0.0, [])], []
    for length in range(1, n + 1):
        next_RxV = log_probs(params, config, [prompt + new for _, new in running])
        extensions = [
            (total + row[token], [*new, token])
            for (total, new), row in zip(running, next_RxV, strict=True)
            for token in range(config.vocab_size)
        ]
        for total, new in best(extensions):
            if new[-1] in stop_ids or length == n:
                finished.append((total / length**length_penalty, new))
        finished = best(finished)
        running = best(hypothesis for hypothesis in extensions if hypothesis[1][-1] not in stop_ids)
        if len(finished) == num_beams:
            at = n if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0][0] / at**length_penalty <= finished[-1][0]:
                break
    return finished


@pytest.mark.parametrize("num_beams", [3, exhaustive(1), exhaustive(6)])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_rows_and_scores_are_those_of_the_definition(tiny, num_beams, early_stopping):
    model, params = tiny
    exact, ends = to_numpy(params), set()
    # With the first stop ids every way to stop early gives other rows.
    for length_penalty, stop_ids, n in (
        (1.0, range(0, 97, 4), 9),
        (2.5, range(40, 80), 9),
        (-1.0, range(45), 9),
        (0.0, [], 4),
    ):
        options = {
            "num_beams": num_beams,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "stop_ids": stop_ids,
        }
        got = beam_search(model, params, RAGGED, n, num_return_sequences=num_beams, **options)
        want = [defined(exact, model.config, prompt, n, **options) for prompt in RAGGED]
        assert [new.tolist() for new in got.new_tokens] == [new for found in want for _, new in found]
        np.testing.assert_allclose(got.scores, [score for found in want for score, _ in found], rtol=1e-5, atol=1e-5)
        assert [row[:length].tolist() for row, length in zip(got.tokens, got.prompt_lengths, strict=True)] == [
            prompt for prompt in RAGGED for _ in range(num_beams)
        ]
        ends |= {(len(new), new[-1] in stop_ids) for found in want for _, new in found}
    # Some end before the limit, some at it, with a stop id and without.
    assert len(ends) > 4
    assert any(not stopped for _, stopped in ends)


def test_with_as_many_beams_as_ids_the_best_pairs_of_all_are_found(tiny):
    model, params = tiny
    exact, V = to_numpy(params), model.config.vocab_size
    first_V = log_probs(exact, model.config, [RAGGED[0]])[0]
    then_VxV = log_probs(exact, model.config, [[*RAGGED[0], token] for token in range(V)])
    totals_VxV = first_V[:, None] + then_VxV
    want = np.argsort(-totals_VxV, axis=None)[:20]
    got = beam_search(model, params, RAGGED[:1], 2, num_beams=V, num_return_sequences=20, length_penalty=0)
    assert [new.tolist() for new in got.new_tokens] == [[int(at // V), int(at % V)] for at in want]
    np.testing.assert_allclose(got.scores, totals_VxV.flat[want], rtol=1e-5)


@pytest.mark.exhaustive
def test_one_beam_without_stop_ids_is_greedy(tiny):
    found = beam_search(*tiny, RAGGED, 9, num_beams=1)
    assert isinstance(found, BeamSearchResult)
    assert [row.tolist() for row in found.tokens] == [row.tolist() for row in generate(*tiny, RAGGED, 9).tokens]


def test_other_options_and_lengths_of_a_bucket_compile_nothing(caplog):
    model, params = make_model(TINY.replace(context_length=64), seed=2)

    def compiled(length, n, **options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            beam_search(model, params, [list(range(length)), [1]], n, num_beams=2, **options)
        return re.findall(r"Compiling jit\((\w+)\)", caplog.text)

    assert {"start", "advance"} <= set(compiled(3, 5))
    options = itertools.product([0.5, -1.0], [True, "never"], [[], range(9)], [(16, 32), (1, 2)])
    for penalty, early, stops, (length, n) in options:
        assert compiled(length, n, length_penalty=penalty, early_stopping=early, stop_ids=stops) == []


def test_a_search_ends_once_it_is_settled(tiny, monkeypatch):
    steps, advance = [], beams.advance
    monkeypatch.setattr(beams, "advance", lambda *args: steps.append(1) or advance(*args))
    beam_search(*tiny, RAGGED, 9, num_beams=3)
    assert len(steps) == 8
    beam_search(*tiny, RAGGED, 9, num_beams=3, stop_ids=range(90), early_stopping=True)
    assert len(steps) == 8 + beams.STEPS - 1


@pytest.mark.usefixtures("compiled_fully")
def test_a_step_does_not_copy_the_cache():
    model, params = make_model(TINY.replace(context_length=128, emb_dim=64, n_heads=4))
    rules = beams.Rules(np.int32(9), np.float32(1), np.zeros(97, bool), np.bool_(False), np.int32(0))
    first = functools.partial(beams.start, model, new=32, cache_dtype=None, num_beams=3)
    state = jax.eval_shape(first, params, np.ones((1, 80), np.int32), np.array([80], np.int32), rules)
    text = beams.advance.lower(model, params, state, rules).compile().as_text()
    ops = [op for shape, op in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text) if shape == "3,4,112,16"]
    assert ops.count("dynamic-update-slice") == 2 * 2 * model.config.n_layers  # what moves, and what is new
    assert not {"copy", "convert", "transpose", "gather"} & set(ops)


def test_zero_new_tokens_give_the_prompts_back(tiny):
    found = beam_search(*tiny, RAGGED, 0, num_beams=3, num_return_sequences=2)
    assert [row.tolist() for row in found.tokens] == [prompt for prompt in RAGGED for _ in range(2)]
    assert found.scores.tolist() == [0.0] * 6


def test_logits_that_are_not_finite_are_an_error_that_names_the_step(tiny):
    model, params = tiny
    # Prompt 1 has seven ids: its second new id is the first to be read at position 8, from which the next one follows.
    weight = params["pos_emb"]["weight"].at[8].set(np.nan)
    poisoned = {**params, "pos_emb": {"weight": weight}}
    assert len(beam_search(model, poisoned, RAGGED, 2, num_beams=3).new_tokens[1]) == 2
    with pytest.raises(FloatingPointError, match="new token 2 of prompt 1 are NaN or infinite"):
        beam_search(model, poisoned, RAGGED, 5, num_beams=3)


def test_texts_from_beams():
    model, params = make_model(TINY.replace(vocab_size=257, tokenizer="bytes"), seed=3)
    found = beam_search(
        model, params, [list(b"Ab"), list(b"x")], 8, num_beams=3, num_return_sequences=2, stop_ids=[256]
    )
    want = [bytes(i for i in row if i < 256).decode(errors="replace") for row in found.tokens]
    search = functools.partial(generate_text, model, params, ["Ab", "x"], 8, num_beams=3)
    assert search(num_return_sequences=2) == want
    assert search() == want[::2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer of 1 or more, not 0"),
        ({"num_beams": 2.0}, "num_beams must be an integer of 1 or more, not 2.0"),
        ({"num_beams": True}, "num_beams must be an integer of 1 or more, not True"),
        ({"num_beams": 98}, "num_beams=98 must be at most 97"),
        (
            {"num_beams": 95, "stop_ids": [1, 2, 3]},
            "num_beams=95 must be at most 94, the number of ids that are not stop",
        ),
        ({"num_return_sequences": 3}, "num_return_sequences=3 must be at most num_beams=2"),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer of 1 or more, not 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number from -10 to 10, not nan"),
        ({"length_penalty": "1"}, "length_penalty must be a number from -10 to 10, not '1'"),
        ({"length_penalty": 10**400}, "length_penalty must be a number from -10 to 10, not an integer of"),
        ({"early_stopping": 1}, 'early_stopping must be False, True or "never", not 1'),
        ({"early_stopping": "always"}, "early_stopping must be False, True or \"never\", not 'always'"),
        ({"stop_ids": [97]}, r"stop_ids\[0\] is 97"),
        ({"cache_dtype": "int4"}, '"bfloat16", "int8" or None, not .int4'),
        ({"max_new_tokens": 15}, "2 ids and max_new_tokens=15 exceed context_length=16"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"sampler": Greedy()}, "beam_search has no option 'sampler': it only ranks what the model says"),
        ({"temperature": 0.8}, "beam_search has no option 'temperature': it only ranks what the model says"),
        ({"beyond_context": "recompute"}, "'beyond_context': no prompt may grow past the context"),
        ({"lenght_penalty": 1.0}, "'lenght_penalty'; did you mean 'length_penalty'"),
    ],
)
def test_bad_beams_are_refused_before_any_compute(tiny, monkeypatch, options, message):
    monkeypatch.setattr(beams, "start", lambda *args, **kwargs: pytest.fail("computed"))
    asked = {"prompts": [[1, 2], [3]], "max_new_tokens": 4, "num_beams": 2, **options}
    with pytest.raises(TypeError if "has no option" in message or message[0] == "'" else ValueError, match=message):
        beam_search(*prepare(*tiny), **asked)


def test_beams_are_refused_where_ids_are_drawn(tiny):
    with pytest.raises(TypeError, match=r"'num_beams': use jaxgpt\.beam_search"):
        generate(*tiny, [[1]], 4, num_beams=2)
    model, params = make_model(TINY.replace(vocab_size=257, tokenizer="bytes"))
    with pytest.raises(TypeError, match=r"'length_penalty': use jaxgpt\.beam_search"):
        generate_text(model, params, "A", 4, length_penalty=1.0)
    with pytest.raises(ValueError, match="num_beams must be an integer of 1 or more, not 0"):
        generate_text(model, params, "A", 4, num_beams=0)
    with pytest.raises(TypeError, match="beam_search has no option 'sampler'"):
        generate_text(model, params, "A", 4, num_beams=2, sampler=Greedy())
