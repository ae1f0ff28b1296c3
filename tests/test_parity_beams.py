"""Beam search against transformers' own, ids and scores. Needs the extra [parity], takes a minute."""

from __future__ import annotations

import numpy as np
import pytest

import jaxgpt

pytestmark = [pytest.mark.parity, pytest.mark.exhaustive]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, C = 40, 32
RAGGED = [[5, 9, 2], [17, 3, 38, 31, 6, 0, 12], [33]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """transformers' GPT-2 with random weights, large enough that ids' probabilities differ, and the same as ours."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=C, n_embd=24, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_((0.6 if ".h." in name else 0.25) * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("beams") / "gpt2"
    theirs.save_pretrained(path)
    return theirs, jaxgpt.load(path)


def their_search(model, prompts, n, stops, **options):
    """(rows of new ids, up to and including the first stop id; scores)."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros((2, len(prompts), longest), dtype=torch.long)
    for r, prompt in enumerate(prompts):
        ids[r, longest - len(prompt) :], mask[r, longest - len(prompt) :] = torch.tensor(prompt), 1
    model.generation_config.eos_token_id = stops or None
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = []
    for row in found.sequences[:, longest:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows, found.sequences_scores.numpy()


# Many stop ids, so that searches end before their limit.
@pytest.mark.parametrize("stops", [[], [7], [7, 21, 30], list(range(20, 32))], ids=len)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_ids_and_scores_are_those_of_transformers(both, num_beams, early_stopping, stops):
    theirs, (model, params) = both
    found = []
    for length_penalty in (1.0, 2.0, -1.5) if stops else (1.0,):
        for prompts, n, most in ((RAGGED, 25, num_beams), (RAGGED[:1], 8, 2)):
            options = {
                "num_beams": num_beams,
                "early_stopping": early_stopping,
                "length_penalty": length_penalty,
                "num_return_sequences": most,
            }
            rows, scores = their_search(theirs, prompts, n, stops, **options)
            got = jaxgpt.beam_search(model, params, prompts, n, stop_ids=stops, **options)
            assert [new.tolist() for new in got.new_tokens] == rows, options
            np.testing.assert_allclose(got.scores, scores, rtol=2e-5, atol=2e-5)
            found += rows
    assert len(set(map(tuple, found))) > 5
    if len(stops) > 3:  # some searches end before their limit
        assert min(map(len, found)) < 8
