"""Our exports to Hugging Face's format, read by transformers and CTranslate2. Needs the extra [parity]; a minute."""

from __future__ import annotations

import contextlib
import json
import logging
import re

import jax
import numpy as np
import pytest
from helpers import TINY, make_model
from test_parity_tokenizers import unigram, word_piece
from test_tokenizer_files import ADDED, NAMED, described, saved, spelling

from jaxgpt import weights
from jaxgpt.generation import default_stop_ids, generate, generate_text
from jaxgpt.model import resize_embeddings
from jaxgpt.tokenizer import get_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("compiled_quickly")]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT, CONTEXT = "ROMEO: a", 32
BYTES = TINY.replace(tokenizer="bytes", vocab_size=257, context_length=CONTEXT)


def with_tokenizer(directory, **fields):
    tokenizer = get_tokenizer(directory)
    return make_model(
        BYTES.replace(tokenizer=tokenizer.name, vocab_size=tokenizer.vocab_size, tie_embeddings=False, **fields), seed=2
    )


def added_tokens(tmp_path):
    special = [("<s>", {"special": True}), ("</s>", {"special": True})]
    description = described(spelling("ROMEO", " a"), added=[*special, *ADDED])
    return with_tokenizer(saved(tmp_path, description, tokenizer_config=NAMED))


def characters(tmp_path):
    (tmp_path / "characters.json").write_text(json.dumps(sorted(set(PROMPT + "\n bcdé中"))))
    return with_tokenizer(tmp_path / "characters.json")


def several_stop_ids(tmp_path):
    """A chat model: its turns end with a special token, which it draws as its seventh."""
    description = described(spelling("ROMEO"), added=[("<|end|>", {"special": True}), ("<|turn|>", {"special": True})])
    end, turn = (fields["id"] for fields in description["added_tokens"])
    files = {"tokenizer_config": {"eos_token": "<|end|>"}, "config": {"eos_token_id": [end, turn]}}
    model, params = with_tokenizer(saved(tmp_path, description, **files))
    ids = [get_tokenizer(model.config.tokenizer).encode(PROMPT)]
    drawn = generate(model, params, ids, 20, stop_ids=[]).new_tokens[0].tolist()
    first = next(i for i, token in enumerate(drawn) if i > 5 and token not in drawn[:i])
    head = params["out_head"]["weight"]
    params["out_head"] = {"weight": head.at[turn].set(1.01 * head[drawn[first]])}
    result = generate(model, params, ids, 20, stop_ids=default_stop_ids(model.config))
    assert result.new_tokens[0].tolist() == [*drawn[:first], turn]
    return model, params


MODELS = {
    "padded": lambda tmp_path: make_model(BYTES.replace(tokenizer="gpt2", vocab_size=50304)),
    "untied": lambda tmp_path: make_model(BYTES.replace(tie_embeddings=False)),
    "no biases": lambda tmp_path: make_model(BYTES.replace(bias=False, qkv_bias=False, activation="gelu")),
    "silu": lambda tmp_path: make_model(BYTES.replace(activation="silu")),
    "relu": lambda tmp_path: make_model(BYTES.replace(activation="relu", ffn_dim=40)),
    "bfloat16": lambda tmp_path: make_model(BYTES, param_dtype="bfloat16"),
    "resized": lambda tmp_path: resize_embeddings(*make_model(BYTES), 264),
    "resized, untied": lambda tmp_path: resize_embeddings(*make_model(BYTES.replace(tie_embeddings=False)), 264),
    "ids without text": lambda tmp_path: make_model(BYTES.replace(vocab_size=1000)),
    "added tokens": added_tokens,
    "several stop ids": several_stop_ids,
    # Not for CTranslate2, whose converter ignores the scale, has no tanh, and needs tokens as bos, eos and unk.
    "scaled by layer": lambda tmp_path: make_model(
        BYTES.replace(scale_attn_by_inverse_layer_idx=True, n_layers=6, tie_embeddings=False)
    ),
    "tanh": lambda tmp_path: make_model(BYTES.replace(activation="tanh")),
    "characters": characters,
    "word pieces": lambda tmp_path: with_tokenizer(word_piece(tmp_path)),
    "unigram": lambda tmp_path: with_tokenizer(unigram(tmp_path)),
}
FOR_CTRANSLATE2 = {
    "bundled": lambda tmp_path: weights.load("shakespeare"),
    "GPT-2's vocabulary": lambda tmp_path: make_model(BYTES.replace(tokenizer="gpt2", vocab_size=50257)),
    **dict(list(MODELS.items())[:-5]),
}


@contextlib.contextmanager
def silence():
    """Fails if transformers logs a warning; Python's own are errors anyway."""
    records, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("transformers")
    handler.emit = records.append
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not records, [record.getMessage() for record in records]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export_without_a_word_and_writes_our_text(name, tmp_path):
    model, params = MODELS[name](tmp_path)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    with silence():
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        pipeline = transformers.pipeline("text-generation", str(tmp_path / "hf"), dtype=torch.float32)
        # Of tokenizers that are not ours, transformers joins the texts of prompt and answer in its own way.
        as_ids = {"return_tensors": True} if model.config.tokenizer.startswith("hf-") else {}
        (answer,) = pipeline(PROMPT, add_special_tokens=False, **as_ids)
    assert not any(report.values()), report
    assert theirs.dtype == getattr(torch, model.compute.param_dtype)
    ids = get_tokenizer(model.config.tokenizer).encode(PROMPT)
    new = model.config.context_length - len(ids)
    assert tokenizer.encode(PROMPT, add_special_tokens=False) == ids
    if as_ids:
        expected = generate(model, params, [ids], new, stop_ids=default_stop_ids(model.config)).tokens[0].tolist()
    else:
        expected = generate_text(model, params, PROMPT, new)[0]
    assert [*answer.values()] == [expected]


@pytest.mark.parametrize("config", [BYTES, TINY], ids=["text", "ids"])
def test_the_code_on_the_card_runs(config, tmp_path, capsys):
    weights.save(tmp_path / "hf", *make_model(config), format="huggingface")
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    theirs, ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    printed = []
    for code in (theirs, ours):
        with silence():
            exec(code.replace("path/of/this/directory", str(tmp_path / "hf")), {})
        printed.append(capsys.readouterr().out)
    if config == BYTES:
        assert printed[1].startswith(printed[0].removesuffix("\n"))  # theirs ends with the context
    else:
        ids = [re.findall(r"\d+", text) for text in printed]
        assert ids[0][:3] == ["0", "1", "2"]
        assert ids[0] == ids[1][: len(ids[0])]


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_loads_and_saves_again_is_the_same_model(name, tmp_path):
    model, params = MODELS[name](tmp_path)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    with silence():
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
        transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    loaded, ours = weights.load(tmp_path / "hf")
    again, theirs = weights.load(tmp_path / "again")
    assert again == loaded
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), theirs, ours)


@pytest.mark.parametrize("name", FOR_CTRANSLATE2)
def test_ctranslate2_draws_our_greedy_ids(name, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    model, params = FOR_CTRANSLATE2[name](tmp_path)
    weights.save(tmp_path / "hf", model, params, format="huggingface")
    with silence():
        ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32")
    ids, stops = get_tokenizer(model.config.tokenizer).encode(PROMPT), default_stop_ids(model.config)
    (answer,) = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids)],
        max_length=20,
        sampling_topk=1,
        include_prompt_in_result=False,
        end_token=tokenizer.convert_ids_to_tokens(stops),
        return_end_token=True,
    )
    assert answer.sequences_ids[0] == generate(model, params, [ids], 20, stop_ids=stops).new_tokens[0].tolist()
