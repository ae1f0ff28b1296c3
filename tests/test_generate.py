"""The generator against the plain loop, which makes a full forward pass per token, in float64 NumPy."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ALTERNATING,
    SCALED,
    TINY,
    exhaustive,
    grid,
    make_model,
    make_model_that_draws,
    stack_blocks,
    to_numpy,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.config import ComputeConfig
from jaxgpt.generation import decode
from jaxgpt.generation.controls import RepetitionPenalty
from jaxgpt.generation.decode import scan_generate
from jaxgpt.generation.sampling import Greedy, MinP, Temperature, TopK, TopP
from jaxgpt.generation.session import Generation, bucket, generate
from jaxgpt.generation.text import StopStrings, completions, generate_text, stream, text_pieces
from jaxgpt.model import reference
from jaxgpt.model.gpt import GPT
from jaxgpt.tokenizer import get_tokenizer

pytestmark = pytest.mark.usefixtures("compiled_quickly_by_default")

RAGGED = [[5, 9, 2], [17, 3, 88, 41, 6, 0, 12], [33], list(range(40, 60))]
BYTES = TINY.replace(vocab_size=257, tokenizer="bytes")
SAMPLER = Temperature(1.5) | TopK(40) | TopP(0.95)
KEY = jax.random.key(7)


def naive(model, params, prompt, n, sampler=None, key=None):
    """Computes each id from the last `context_length` ids alone."""
    sampler, params, ids = sampler or Greedy(), to_numpy(params), list(prompt)
    for i in range(n):
        logits = reference.gpt(params, model.config, [ids[-model.config.context_length :]])[0, -1]
        ids.append(int(draw(sampler, np.float32(logits), key, i)))
    return ids


@functools.partial(jax.jit, static_argnames=("sampler",))
def draw(sampler, logits, key, i):
    return sampler(logits, None if key is None else jax.random.fold_in(key, i))


def rows(result):
    return [row.tolist() for row in result.tokens]


@pytest.fixture(scope="module")
def bytes_model():
    return make_model(BYTES, seed=3)


@pytest.mark.parametrize("variant", ["as is", "scan_layers", exhaustive("untied, no biases"), "alternating", "scaled"])
def test_tokens_equal_the_plain_loop_within_and_past_the_context(variant):
    others = {
        "untied, no biases": TINY.replace(tie_embeddings=False, bias=False, qkv_bias=False),
        "alternating": ALTERNATING,
        "scaled": SCALED,
    }
    config = others.get(variant, TINY)
    model, params = make_model(config, seed=1)
    expected = [naive(model, params, row, 64, SAMPLER, jax.random.fold_in(KEY, r)) for r, row in enumerate(RAGGED)]
    if variant == "scan_layers":
        model, params = GPT(config, ComputeConfig(scan_layers=True)), stack_blocks(params, config.n_layers)
    got = generate(model, params, RAGGED, 64, sampler=SAMPLER, key=KEY)
    assert rows(got) == expected
    assert len({tuple(row[-30:]) for row in expected}) == len(RAGGED)  # the rows differ


def test_greedy_equals_the_plain_loop(tiny):
    assert rows(generate(*tiny, RAGGED[:2], 24)) == [naive(*tiny, row, 24) for row in RAGGED[:2]]


prompts = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=40), min_size=3, max_size=3)


@settings(max_examples=20)
@given(prompts=prompts, n=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
@example(prompts=RAGGED[:3], n=30, seed=0)
def test_each_row_of_a_ragged_batch_is_that_prompt_alone(tiny, prompts, n, seed):
    key = jax.random.key(seed)
    together = rows(generate(*tiny, prompts, n, sampler=SAMPLER, key=key))
    for r, (prompt, row) in enumerate(zip(prompts, together, strict=True)):
        assert row[: len(prompt)] == prompt
        assert len(row) == len(prompt) + n
        row_key = jax.random.fold_in(key, r)[None]
        assert rows(generate(*tiny, [prompt], n, sampler=SAMPLER, key=row_key)) == [row]


@settings(max_examples=20)
@given(prompts=prompts, n=st.integers(0, 40), seed=st.integers(0, 2**32 - 1), data=st.data())
@example(prompts=RAGGED[:3], n=30, seed=0, data=None)
def test_stop_ids_end_their_own_rows_and_change_nothing_else(tiny, prompts, n, seed, data):
    run = functools.partial(generate, *tiny, prompts, n, sampler=SAMPLER, key=jax.random.key(seed))
    free = [new.tolist() for new in run().new_tokens]
    # Most frequent first: a row that draws a stop id twice ends with the first.
    drawn = [token for token, _ in Counter(token for row in free for token in row).most_common()] or [0]
    choose = st.lists(st.one_of(st.sampled_from(drawn), st.integers(0, 96)), max_size=4)
    for stops in [drawn[:1], drawn[:4], [96, drawn[-1]]] if data is None else [drawn[:1], data.draw(choose)]:
        stopped = run(stop_ids=stops)
        for row, new in zip(free, stopped.new_tokens, strict=True):
            ends = [i for i, token in enumerate(row) if token in stops]
            assert new.tolist() == (row[: ends[0] + 1] if ends else row)


def test_rows_may_change_places_with_their_keys(tiny):
    together = rows(generate(*tiny, RAGGED[:3], 20, sampler=SAMPLER, key=KEY))
    keys = jnp.stack([jax.random.fold_in(KEY, r) for r in (2, 0, 1)])
    shuffled = rows(generate(*tiny, [RAGGED[r] for r in (2, 0, 1)], 20, sampler=SAMPLER, key=keys))
    assert shuffled == [together[r] for r in (2, 0, 1)]
    assert not keys.is_deleted()


@pytest.mark.parametrize(
    ("prompts", "n"),
    [
        pytest.param(RAGGED[:2], 8, id="ragged"),
        exhaustive(RAGGED[1:2], 8, id="one"),
        exhaustive(RAGGED, 40, id="past the context"),
    ],
)
def test_several_rows_per_prompt_are_those_of_the_prompt_repeated(tiny, prompts, n):
    run = functools.partial(generate, *tiny, max_new_tokens=n, sampler=SAMPLER, stop_ids=[5])
    got = run(prompts, key=KEY, num_return_sequences=3)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    want = run(repeated, key=KEY)
    assert rows(got) == rows(want)
    assert got.prompt_lengths == want.prompt_lengths
    assert len({tuple(row) for row in rows(got)}) == len(repeated)
    keys = jax.random.split(KEY, len(repeated))
    assert rows(run(prompts, key=keys, num_return_sequences=3)) == rows(run(repeated, key=keys))


def test_several_rows_per_prompt_read_it_once(tiny, monkeypatch):
    read, prefill = [], decode.prefill
    monkeypatch.setattr(
        decode,
        "prefill",
        lambda model, params, ids, *rest, **kw: read.append(ids) or prefill(model, params, ids, *rest, **kw),
    )
    generate(*tiny, RAGGED[:2], 2, sampler=SAMPLER, key=KEY, num_return_sequences=3)
    assert [ids.shape for ids in read] == [(2, 16)]


IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", exhaustive("unsafe_rbg")])
def test_neighbours_and_order_do_not_matter_whatever_the_implementation_of_the_key(tiny, implementation):
    run = functools.partial(generate, *tiny, max_new_tokens=9, sampler=SAMPLER)
    with jax.default_prng_impl(implementation):
        key, prompts = jax.random.key(3), RAGGED[:3]
        together = rows(run(prompts, key=key))
        keys = [jax.random.fold_in(key, r) for r in range(3)]
        assert [rows(run([prompt], key=keys[r][None]))[0] for r, prompt in enumerate(prompts)] == together
        assert rows(run(prompts[::-1], key=jnp.stack(keys[::-1]))) == together[::-1]
        assert rows(run(prompts, key=jax.random.PRNGKey(3))) == together
        same = np.array([RAGGED[1][:3]] * 3)
        expected = [new.tolist() for new in run(same, key=key).new_tokens]
        assert jax.jit(lambda ids: scan_generate(*tiny, ids, 9, sampler=SAMPLER, key=key))(same).tolist() == expected
    if implementation != "unsafe_rbg":  # which derives other keys from a key
        assert together == rows(run(prompts, key=jax.random.key(3, impl="threefry2x32")))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sampler_draws_for_each_row_what_its_key_draws_alone(implementation):
    keys, logits = jax.random.split(jax.random.key(1, impl=implementation), 5), jnp.zeros((5, 1000))
    assert SAMPLER(logits, keys).tolist() == [int(SAMPLER(logits[0], key)) for key in keys]
    assert len(set(SAMPLER(logits, keys).tolist())) > 1


def test_all_words_of_a_key_count():
    draw = functools.partial(Temperature(1.0), jnp.zeros(100_000))
    keys = [
        jax.random.wrap_key_data(np.uint32(words), impl="rbg") for words in ([1, 2, 1, 2], [1, 2, 1, 3], [1, 2, 3, 2])
    ]
    assert len({int(draw(key)) for key in keys}) == 3


def test_an_int_is_the_key_of_that_seed(tiny):
    run = functools.partial(generate, *tiny, RAGGED, 9, sampler=SAMPLER)
    assert rows(run(key=5)) == rows(run(key=np.int64(5))) == rows(run(key=jax.random.key(5)))
    assert rows(run(key=2**64 + 5)) == rows(run(key=5)) != rows(run(key=2**32 + 5))
    assert rows(run(key=-1)) == rows(run(key=2**64 - 1))
    ids = np.array([[1, 2], [3, 4]])
    by_int, by_key = (scan_generate(*tiny, ids, 5, sampler=SAMPLER, key=key) for key in (5, jax.random.key(5)))
    assert by_int.tolist() == by_key.tolist()


def test_draws_are_a_function_of_the_key(tiny):
    run = functools.partial(generate, *tiny, [[1, 2, 3]], 12, sampler=SAMPLER)
    assert rows(run(key=jax.random.key(1))) == rows(run(key=jax.random.key(1)))
    assert rows(run(key=jax.random.key(1))) != rows(run(key=jax.random.key(2)))
    assert rows(run(key=jax.random.PRNGKey(1))) == rows(run(key=jax.random.key(1)))


def test_lengths_of_one_bucket_compile_once(caplog):
    model, params = make_model(TINY.replace(context_length=64), seed=2)

    def compiled(lengths, counts, batch=2):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for length, n in zip(lengths, counts, strict=True):
                generate(model, params, [list(range(length))] * (batch - 1) + [[1]], n, stop_ids=range(n % 5))
        return re.findall(r"Compiling jit\((\w+)\)", caplog.text)

    for batch in (2, 3, 4):  # the number of stop ids is bucketed too: up to four share a bucket
        first = compiled([10], [40], batch)
        assert first.count("prefill") == 1
        assert first.count("decode_tokens") == 1
        assert compiled(range(1, 11), [1, 2, 31, 32, 33, 34, 20, 50, 7, 54], batch) == []


def test_samplers_of_one_structure_compile_once_whatever_their_numbers(caplog):
    model, params = make_model(TINY.replace(context_length=64, n_layers=1), seed=4)

    def compiled(*samplers):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for seed, sampler in enumerate(samplers):
                generate(model, params, [[1, 2], [3]], 40, sampler=sampler, key=seed)
        found = re.findall(r"Compiling jit\((\w+)\)", caplog.text)
        return found.count("prefill"), found.count("decode_tokens")

    values = [(0.1, 5, 0.5, 0.1), (1, 1, 0.999, 0), (2.5, 97, 0.9, 1), (1e-40, 10**12, 1e-50, 0.03)]
    chains = [Temperature(t) | TopK(k) | TopP(p) | MinP(m) for t, k, p, m in values]
    assert compiled(chains[0]) == (1, 1)
    assert compiled(*chains[1:]) == (0, 0)


def test_buckets_double_up_to_the_largest():
    assert [bucket(n, 16, 100) for n in (1, 16, 17, 33, 64, 65, 100)] == [16, 16, 32, 64, 64, 100, 100]


def test_nothing_is_drawn_once_every_row_has_ended(tiny, monkeypatch):
    stop = generate(*tiny, [[1, 2]], 3).new_tokens[0][0]
    monkeypatch.setattr(decode, "decode_tokens", lambda *args, **kwargs: pytest.fail("decoded after the end"))
    assert generate(*tiny, [[1, 2]], 30, stop_ids=[stop]).new_tokens[0].tolist() == [stop]


def test_steps_past_the_last_one_change_nothing(tiny):
    model, params = tiny
    read = functools.partial(
        decode.prefill, model, params, np.ones((2, 4), np.int32), np.array([4, 2], np.int32), np.int32(4), None
    )
    state = read(np.zeros(0, np.int32), slots=16, sampler=Greedy())
    state, (ids, _) = decode.decode_tokens(model, params, state, 3, chunk=8, sampler=Greedy())
    assert int(state.drawn) == 4
    assert int(state.memory.length) == 4 + 3
    assert ids.shape == (2, 8)


def test_parameters_survive(tiny):
    model, params = tiny
    generate(model, params, [[1]], 20)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("n", [30, 4])
def test_logits_that_are_not_finite_are_an_error_that_names_the_step(n):
    model, params = make_model(TINY.replace(tie_embeddings=False), seed=1)
    options = {"sampler": Temperature(2.0), "key": KEY}
    draws = [new.tolist() for new in generate(model, params, [[9], [1, 2]], 30, **options).new_tokens]
    # An id that row 1 draws first, and that produces NaN when it is read.
    step = next(i for i, token in enumerate(draws[1]) if i > 4 and token not in draws[0] + draws[1][:i] + [0, 1, 2, 9])
    poisoned = {**params, "tok_emb": {"weight": params["tok_emb"]["weight"].at[draws[1][step]].set(np.nan)}}
    if n <= step:
        assert [new.tolist() for new in generate(model, poisoned, [[9], [1, 2]], n, **options).new_tokens] == [
            row[:n] for row in draws
        ]
    else:
        with pytest.raises(FloatingPointError, match=f"new token {step + 1} of prompt 1 are NaN or infinite"):
            generate(model, poisoned, [[9], [1, 2]], n, **options)


def test_infinite_logits_alone_are_an_error(tiny):
    model, params = tiny
    norm = {**params["final_norm"], "scale": params["final_norm"]["scale"] * 1e38}
    with pytest.raises(FloatingPointError, match="new token 0 of prompt 0"):
        generate(model, {**params, "final_norm": norm}, [[1]], 2)


def test_bfloat16_model_and_cache():
    model, params = make_model(TINY, seed=1, dtype="bfloat16")
    result = generate(model, params, RAGGED[:2], 12, cache_dtype="bfloat16")
    assert [len(new) for new in result.new_tokens] == [12, 12]
    again = generate(model, params, RAGGED[:2], 12, cache_dtype="bfloat16")
    assert rows(result) == rows(again)


def test_result_counts_and_times(tiny):
    result = generate(*tiny, [[1, 2], [3]], 8)
    assert result.prompt_lengths == [2, 1]
    assert [row.dtype for row in result.tokens] == [np.int32, np.int32]
    assert result.seconds > 0
    assert result.tokens_per_second is None  # one piece of each kind of work


def log_softmax(logits):
    logits = np.float64(logits)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())


def test_logprobs_are_those_of_the_reference_before_and_after_the_sampler(tiny):
    model, params = tiny
    sampler, K = RepetitionPenalty(1.4) | Temperature(1.5) | TopK(3), 5
    options = {"sampler": sampler, "key": KEY}
    options, prompts = {**options, "logprobs": K}, RAGGED[:2]
    free = generate(*tiny, prompts, 20, **options).new_tokens
    result = generate(*tiny, prompts, 20, stop_ids=[int(free[1][14])], **options)
    exact = to_numpy(params)
    for r, (row, new) in enumerate(zip(result.tokens, result.new_tokens, strict=True)):
        assert new.tolist() == free[r].tolist()[: len(new)]
        assert result.logprobs[r].top.shape == result.sampler_logprobs[r].top_ids.shape == (len(new), K)
        for n, token in enumerate(new):
            text = row[: len(prompts[r]) + n]
            logits = reference.gpt(exact, model.config, [text[-model.config.context_length :]])[0, -1]
            shaped = logits.copy()
            seen = np.unique(text)
            shaped[seen] = np.where(shaped[seen] < 0, shaped[seen] * 1.4, shaped[seen] / 1.4)
            shaped[shaped < np.sort(shaped)[-3]] = -np.inf
            for got, expected in ((result.logprobs[r], logits), (result.sampler_logprobs[r], shaped / 1.5)):
                expected = log_softmax(expected)
                best = np.argsort(-expected, kind="stable")[: K if got is result.logprobs[r] else 3]
                assert got.top_ids[n][: len(best)].tolist() == best.tolist()
                np.testing.assert_allclose(got.top[n], np.sort(expected)[::-1][:K], atol=2e-5)
                np.testing.assert_allclose(got.drawn[n], expected[token], atol=2e-5)
    assert min(len(new) for new in result.new_tokens) < 20


def test_logprobs_may_be_those_of_the_drawn_ids_alone_or_of_all(tiny):
    none, alone, every = (generate(*tiny, RAGGED[:2], 1, logprobs=K) for K in (None, 0, 97))
    assert none.logprobs is none.sampler_logprobs is None
    assert rows(none) == rows(alone) == rows(every)
    assert [row.top.shape for row in alone.logprobs] == [(1, 0), (1, 0)]
    for few, many, new in zip(alone.logprobs, every.logprobs, alone.new_tokens, strict=True):
        np.testing.assert_array_equal(few.drawn, many.drawn)
        np.testing.assert_array_equal(many.top_ids[:, 0], new)  # greedily
        np.testing.assert_allclose(np.exp(many.top).sum(-1), 1, atol=1e-5)
    assert generate(*tiny, [[1]], 0, logprobs=2).logprobs[0].top.shape == (0, 2)


# --- as one pure function


@pytest.mark.parametrize("n", [exhaustive(1), exhaustive(9), 30])
@pytest.mark.parametrize(
    ("config", "scan_layers"),
    [
        exhaustive(TINY, False, id="dense"),
        pytest.param(ALTERNATING, True, id="alternating scan"),
        exhaustive(SCALED, True, id="scaled scan"),
    ],
)
def test_scan_generate_equals_generate(config, scan_layers, n):
    model, params = make_model(config, scan_layers=scan_layers)
    prompts = np.array([[4, 5, 6, 7], [9, 8, 7, 6]])
    run = jax.jit(functools.partial(scan_generate, model, sampler=SAMPLER), static_argnames=("max_new_tokens",))
    expected = generate(model, params, prompts, n, sampler=SAMPLER, key=KEY).new_tokens
    assert run(params, prompts, max_new_tokens=n, key=KEY).tolist() == [row.tolist() for row in expected]


def test_scan_generate_crops_prompts_beyond_the_context(tiny):
    prompt = np.arange(20)[None]
    expected = generate(*tiny, prompt, 3).new_tokens[0].tolist()
    assert scan_generate(*tiny, prompt, 3)[0].tolist() == expected


@pytest.mark.exhaustive  # test_export.py does nearly the same
def test_generator_exports_for_every_platform(tiny):
    model, params = tiny
    run = jax.jit(lambda params, ids: scan_generate(model, params, ids, 20))
    ids = jnp.ones((2, 5), jnp.int32)
    exported = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(params, ids)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.call(params, ids).tolist() == scan_generate(model, params, ids, 20).tolist()


@grid(2, dtype=["float32", "bfloat16"], batch=[1, 2], config={"dense": TINY, "alternating": ALTERNATING})
@pytest.mark.usefixtures("compiled_fully")
def test_a_step_neither_copies_nor_converts_the_cache(batch, dtype, config):
    model, params = make_model(config.replace(context_length=128, emb_dim=64, n_heads=4), dtype=dtype)
    none = np.zeros(0, np.int32)
    read = functools.partial(
        decode.prefill, model, slots=112, sampler=Greedy()
    )  # no weight has as many elements as such a cache
    args = np.ones((batch, 16), np.int32), np.full(batch, 5, np.int32), np.int32(5), None, none
    state = jax.eval_shape(read, params, *args)
    text = decode.decode_tokens.lower(model, params, state, np.int32(9), chunk=32, sampler=Greedy()).compile().as_text()
    writes, others = 0, []
    for shape, op in re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", text):
        if np.prod([int(n) for n in shape.split(",")]) == batch * 4 * 112 * 16:
            writes += op == "dynamic-update-slice"
            others += [op] if op in ("copy", "convert", "transpose") else []
    assert writes == 2 * model.config.n_layers
    assert others == []


# --- text


def test_stream_gives_the_text_of_generate(bytes_model):
    model, params = bytes_model
    options = {"sampler": Temperature(1.0), "key": KEY}
    pieces = list(stream(model, params, "Ab", 30, **options))
    assert len(pieces) > 3
    assert "Ab" + "".join(pieces) == generate_text(model, params, "Ab", 30, **options)[0]


def test_several_texts_per_prompt(bytes_model):
    run = functools.partial(generate_text, *bytes_model, max_new_tokens=9, sampler=Temperature(1.0), key=KEY)
    assert run(["Ab", "xyz"], num_return_sequences=2) == run(["Ab", "Ab", "xyz", "xyz"])


def test_stream_never_splits_a_character():
    class Script:
        model, stop_ids = GPT(BYTES), (256,)

        def __iter__(self):
            for ids in ([0xE2, 0x82], [0xAC, 0x41], [0xF0], [0x9F], [0x98], [0x80, 256]):
                yield [np.array(ids)]

    assert list(text_pieces(Script())) == ["€A", "😀"]


def test_stream_ends_an_unfinished_character():
    class Script:
        model, stop_ids = GPT(BYTES), ()

        def __iter__(self):
            yield [np.array([0x41, 0xE2, 0x82])]

    assert list(text_pieces(Script())) == ["A", "\ufffd"]


def cut(text, stop):
    """The text before the stop string that is complete first, and of those the longest."""
    for end in range(len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))], True
    return text, False


few = st.text("ab", min_size=1, max_size=4)


@given(pieces=st.lists(st.text("ab", max_size=5), max_size=8), stop=st.lists(few, max_size=3))
@example(pieces=["abab", "c"], stop=["abc"])
@example(pieces=["abcd"], stop=["abcd", "c", "bc"])
def test_stop_strings_are_found_whatever_the_pieces_and_nothing_of_them_is_shown(pieces, stop):
    whole, found = cut("".join(pieces), stop)
    text, shown = StopStrings(stop), ""
    for i, piece in enumerate(pieces):
        shown += text.feed(piece)
        assert whole.startswith(shown)
        held = cut("".join(pieces[: i + 1]), stop)[0][len(shown) :]
        assert not held or any(string.startswith(held) for string in stop)  # nothing waits without need
    assert (shown + text.finish(), text.found) == (whole, found)


@pytest.mark.parametrize("n", [12, exhaustive(40)])  # past the context too
def test_stop_strings_end_their_own_texts_and_change_nothing_else(bytes_model, n):
    prompts, run = (
        ["Ab", "xyz", "no"],
        functools.partial(generate_text, *bytes_model, max_new_tokens=n, temperature=1.0),
    )
    free = [text[len(p) :] for p, text in zip(prompts, run(prompts, seed=3), strict=True)]
    for stop in ([free[0][5:8]], [free[1][9:11], free[0][-3:]], free[2][:2]):
        ends = [cut(text, [stop] if isinstance(stop, str) else stop)[0] for text in free]
        assert ends != free
        expected = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        assert run(prompts, stop=stop, seed=3) == expected
        key = jax.random.fold_in(jax.random.key(3), 2)[None]
        assert "".join(stream(*bytes_model, "no", n, stop=stop, temperature=1.0, key=key)) == ends[2]


def test_a_stop_string_ends_the_ids_with_the_one_that_completes_it(bytes_model, monkeypatch):
    model, params = bytes_model
    ids = generate(model, params, [[65]], 24).new_tokens[0]
    text, calls, decode_tokens = get_tokenizer("bytes").decode(ids), [], decode.decode_tokens
    monkeypatch.setattr(
        decode, "decode_tokens", lambda *args, **options: calls.append(1) or decode_tokens(*args, **options)
    )
    run = Generation(model, params, [[65]], 24, chunk=4)
    assert completions(run, [text[2:4]]) == [cut(text, [text[2:4]])[0]]
    new, result = run.result().new_tokens[0], run.result()
    assert new.tolist() == ids[: len(new)].tolist()
    assert text[2:4] in get_tokenizer("bytes").decode(new)
    assert text[2:4] not in get_tokenizer("bytes").decode(new[:-1])
    assert result.finish_reasons == ["stop"]
    assert len(calls) <= 2  # nothing is drawn once every row has ended


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        ("", ValueError, r"stop\[0\] is empty"),
        (["a", ""], ValueError, r"stop\[1\] is empty"),
        ([5], TypeError, r"a text or a list of texts, not 5 \(stop_ids takes ids\)"),
        (5, TypeError, "not 5"),
        ([None], TypeError, "not None"),
    ],
)
def test_bad_stop_strings_are_refused_before_any_compute(bytes_model, monkeypatch, stop, error, message):
    monkeypatch.setattr(decode, "prefill", lambda *args, **kwargs: pytest.fail("computed"))
    for text in (generate_text, stream):
        with pytest.raises(error, match=message):
            text(*bytes_model, "Ab", 4, stop=stop)


def test_finish_reasons_say_what_ended_a_row(tiny):
    free = generate(*tiny, RAGGED[:2], 9)
    assert free.finish_reasons == ["length", "length"]
    last = next(i for i in free.new_tokens[0] if i not in free.new_tokens[1])
    assert generate(*tiny, RAGGED[:2], 9, stop_ids=[last]).finish_reasons == ["stop", "length"]


def test_empty_text_starts_from_end_of_text_and_stops_at_it(bytes_model):
    model, params = bytes_model
    end = get_tokenizer("bytes").end_of_text
    ids = generate(model, params, [[end]], 6, stop_ids=[end]).new_tokens[0].tolist()
    assert generate_text(model, params, ["", "Ab"], 6)[0] == get_tokenizer("bytes").decode([i for i in ids if i != end])


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("gpt2", 50259), exhaustive("bytes", 259)])
def test_an_id_without_text_is_drawn_as_a_placeholder(tokenizer, vocab_size):
    added = vocab_size - 1
    model, params = make_model_that_draws(added, TINY.replace(tokenizer=tokenizer, vocab_size=vocab_size))
    assert generate_text(model, params, ["Ab", ""], 2) == [f"Ab<|{added}|><|{added}|>", f"<|{added}|><|{added}|>"]
    assert "".join(stream(model, params, "Ab", 2)) == f"<|{added}|><|{added}|>"
    assert generate_text(model, params, "Ab", 2, stop_ids=[added]) == ["Ab"]


def test_a_model_without_an_id_for_end_of_text_generates():
    model, params = make_model(BYTES.replace(vocab_size=256), seed=3)
    ids = generate(model, params, [[65, 98]], 6).new_tokens[0]
    assert generate_text(model, params, "Ab", 6) == ["Ab" + get_tokenizer("bytes").decode(ids)]
    assert "Ab" + "".join(stream(model, params, "Ab", 6)) == generate_text(model, params, "Ab", 6)[0]


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "prompt", "lacking"),
    [
        ("gpt2", 100, "Every", "has the token 'Every', id 6109"),
        ("bytes", 256, "", "starts from the token '<|endoftext|>', id 256"),
    ],
)
def test_a_text_with_tokens_that_the_model_lacks_is_refused(tokenizer, vocab_size, prompt, lacking):
    model, params = make_model(TINY.replace(tokenizer=tokenizer, vocab_size=vocab_size))
    expected = re.escape(f"{lacking} of tokenizer '{tokenizer}', but the model's ids end at")
    for text in (generate_text, stream):
        with pytest.raises(ValueError, match=expected):
            text(model, params, prompt, 2)


# --- bad input


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], [3, 97]], r"prompts\[1\]\[1\] is 97, outside the vocabulary: 0 to 96"),
        ([[-1]], r"prompts\[0\]\[0\] is -1"),
        ([[2**70]], r"prompts\[0\]\[0\] is 1180591620717411303424"),
        ([[10**5000]], r"prompts\[0\]\[0\] is an integer of 16610 bits, outside the vocabulary"),
        (np.array([[1, 2], [99, 0]]), r"prompts\[1\]\[0\] is 99"),
        (np.array([[1, 2**33 + 5]]), r"prompts\[0\]\[1\] is 8589934597"),
        (np.array([[1.0, 2.0]]), r"prompts\[0\] must hold integers in one dimension, not float64"),
        (np.array([[True, False]]), "not bool"),
        (jnp.array([[1.0]]), "not float32"),
        ([[1, 2.0]], r"prompts\[0\]\[1\] is 2.0 \(float\)"),
        ([[1, True]], r"prompts\[0\]\[1\] is True \(bool\)"),
        ([[1, "a"]], r"prompts\[0\]\[1\] is 'a' \(str\)"),
        ([[1], []], r"prompts\[1\] is empty"),
        (np.zeros((1, 0), np.int32), r"prompts\[0\] is empty"),
        ([], "no prompts"),
        ([1, 2], r"prompts\[0\] is 1, not a list of ids"),
        (np.array([1, 2]), r"\[B, T\], not \[2\]"),
        ("text", "not text: jaxgpt.generate_text"),
        (["text"], r"prompts\[0\] is 'text'"),
        ([[[1]]], r"prompts\[0\]\[0\] is \[1\] \(list\)"),
        (None, "not None"),
    ],
)
def test_bad_prompts_are_refused_before_any_compute(tiny, monkeypatch, prompts, message):
    monkeypatch.setattr(decode, "prefill", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompts, 4)


@pytest.mark.parametrize("n", [-1, 2.0, "3", None, True])
def test_bad_max_new_tokens_is_refused(tiny, n):
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of 0 or more"):
        generate(*tiny, [[1]], n)


def test_zero_new_tokens_give_the_prompts_back(tiny, monkeypatch):
    monkeypatch.setattr(decode, "prefill", lambda *args, **kwargs: pytest.fail("computed"))
    assert rows(generate(*tiny, RAGGED, 0)) == RAGGED
    assert list(stream(*make_model(BYTES), "Ab", 0, stop="b")) == []
    assert generate_text(*make_model(BYTES), ["Ab", "c"], 0) == ["Ab", "c"]


def test_integers_of_any_kind_are_ids(tiny):
    expected = rows(generate(*tiny, [[1, 2, 3]], np.int64(4)))
    for prompts in (np.array([[1, 2, 3]], np.uint8), jnp.array([[1, 2, 3]]), [(1, 2, np.int16(3))], [np.arange(1, 4)]):
        assert rows(generate(*tiny, prompts, 4)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": TopK(5)}, r"TopK\(5\) draws at random and needs a key"),
        ({"sampler": TopK(5), "key": jax.random.split(KEY, 3)}, r"one per row \(2\), not keys of shape \[3\]"),
        ({"logprobs": -1}, "logprobs must be an integer of 0 or more, not -1"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 98}, "logprobs must be at most the vocabulary's 97 ids, not 98"),
        ({"stop_ids": [97]}, r"stop_ids\[0\] is 97"),
        ({"stop_ids": 5}, "stop_ids must be a list of ids, not 5"),
        ({"stop_ids": [1.5]}, r"stop_ids\[0\] is 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer of 1 or more, not 0"),
        ({"num_return_sequences": 2.0}, "num_return_sequences must be an integer of 1 or more, not 2.0"),
        ({"num_return_sequences": 2}, r"num_return_sequences=2 needs a random sampler.*Greedy\(\) gives the same row"),
        ({"beyond_context": "crop"}, "beyond_context"),
        ({"cache_dtype": "int4"}, '"bfloat16", "int8" or None, not .int4'),
        ({"beyond_context": "error", "max_new_tokens": 15}, "2 ids and max_new_tokens=15 exceed context_length=16"),
    ],
)
def test_bad_options_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, [[1, 2], [3]], **{"max_new_tokens": 4, **options})


def test_strictness_allows_what_fits(tiny):
    assert len(generate(*tiny, [[1, 2]], 14, beyond_context="error").tokens[0]) == 16


def test_stream_refuses_bad_arguments_at_the_call(bytes_model):
    with pytest.raises(ValueError, match="max_new_tokens"):
        stream(*bytes_model, "a", -1)
    with pytest.raises(ValueError, match="num_return_sequences must be 1 for a stream"):
        stream(*bytes_model, "a", 4, sampler=SAMPLER, key=KEY, num_return_sequences=2)
