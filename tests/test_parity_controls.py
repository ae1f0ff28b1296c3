"""Parity of the controls with transformers' logits processors, and of the options with those of its `generate`. Needs
the extra [parity]."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgpt
from jaxgpt.generation.history import History
from jaxgpt.generation.sampling import REMOVED

pytestmark = [pytest.mark.parity, pytest.mark.exhaustive]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, PROMPT, NEW = 11, 4, 7

PROCESSORS = {
    "repetition": (
        lambda: jaxgpt.RepetitionPenalty(1.3),
        lambda: transformers.RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "encouraged repetition": (
        lambda: jaxgpt.RepetitionPenalty(0.6),
        lambda: transformers.RepetitionPenaltyLogitsProcessor(0.6),
    ),
    "1-gram": (lambda: jaxgpt.NoRepeatNgram(1), lambda: transformers.NoRepeatNGramLogitsProcessor(1)),
    "2-gram": (lambda: jaxgpt.NoRepeatNgram(2), lambda: transformers.NoRepeatNGramLogitsProcessor(2)),
    "3-gram": (lambda: jaxgpt.NoRepeatNgram(3), lambda: transformers.NoRepeatNGramLogitsProcessor(3)),
    "bad words": (
        lambda: jaxgpt.BadWords([[5], [0, 1], [1, 2, 0]]),
        lambda: transformers.NoBadWordsLogitsProcessor([[5], [0, 1], [1, 2, 0]], eos_token_id=10),
    ),
    "bias": (
        lambda: jaxgpt.LogitBias({3: -1.5, 7: 2.0}),
        lambda: transformers.SequenceBiasLogitsProcessor({(3,): -1.5, (7,): 2.0}),
    ),
    "minimum": (
        lambda: jaxgpt.MinNewTokens(3),
        lambda: transformers.MinNewTokensLengthLogitsProcessor(PROMPT, 3, [9, 10]),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_control_does_what_transformers_processor_does(name):
    ours, theirs = (make() for make in PROCESSORS[name])
    rng = np.random.default_rng(0)
    ids_BxS = rng.integers(0, 3, (5, PROMPT + NEW)).astype(np.int32)
    history = History.of(list(ids_BxS[:, :PROMPT]), PROMPT + NEW).replace(stop_ids=jnp.array([9, 10, -1, -1]))
    changed = 0
    for token_B in ids_BxS[:, PROMPT:].T:
        history = history.append(jnp.asarray(token_B))
        logits_BxV = rng.normal(size=(5, V)).astype(np.float32)
        text_BxT = torch.from_numpy(ids_BxS[:, : int(history.length)]).long()
        want = theirs(text_BxT, torch.from_numpy(logits_BxV.copy())).numpy()
        got = np.asarray(ours.control(jnp.asarray(logits_BxV), history))
        np.testing.assert_array_equal(got == REMOVED, np.isneginf(want))
        np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-6)
        changed += int(np.any(want != logits_BxV))
    assert changed >= 2


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' GPT-2 of a small size, and the same model here."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=60, eos_token_id=60
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(8) if parameter.ndim == 2 else parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(path)
    return theirs, jaxgpt.load(path, tokenizer="none")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [1, 2]], "no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 20},
    ],
    ids=str,
)
def test_greedy_ids_agree_for_the_same_options(both, options):
    theirs, (model, params) = both
    prompt = np.random.default_rng(1).integers(0, 60, (1, 5))
    ids = torch.from_numpy(prompt)
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, pad_token_id=0, **options
    )
    got = jaxgpt.generate(model, params, prompt, 40, stop_ids=[60], **options)
    assert got.tokens[0].tolist() == want[0].tolist()
