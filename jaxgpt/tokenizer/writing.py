"""Writes a tokenizer's files, for transformers and for `files.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxgpt.textfile import write_json
from jaxgpt.tokenizer import builtin
from jaxgpt.tokenizer.content import only_merges, placeholder
from jaxgpt.tokenizer.names import BUILTIN, NONE
from jaxgpt.tokenizer.vocabulary import Tokenizer

# What `write_tokenizer` may write.
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
# A key of tokenizer_config.json: the ids at which a text starts and ends, where no config.json beside it says so.
OWN_IDS = "jaxgpt_ids"


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, *, context_length: int, vocab_size: int = 0, own_ids: bool = False
) -> None:
    """Writes a tokenizer's files, `FILES` or some of them: tokenizer.json for current libraries, and for older ones, of
    byte pairs, the merges and the vocabulary. Writes nothing for a model that came without a tokenizer.

    Args:
        directory: where to.
        tokenizer: the tokenizer.
        context_length: the model's, which other programs want to know.
        vocab_size: the model's. Some programs expect a token for every id: those without one get `<|50258|>`, which no
            text becomes and `get_tokenizer` drops, unless the tokenizer could make it of a text (WordPiece, unigram).
        own_ids: whether to store the ids that start and end a text, because no config.json that has them will lie
            beside the files.
    """
    content = tokenizer.content
    if content.kind == NONE:
        return
    description = builtin.description_of(content)
    description = _with_placeholders(description, tokenizer.vocab_size, vocab_size)
    byte_pairs = content.kind in (*BUILTIN, "bpe")
    write_json(directory / "tokenizer.json", {"version": "1.0", **description})
    if byte_pairs:
        model = description["model"]
        lines = ["#version: 0.2", *model["merges"], ""]
        (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        write_json(directory / "vocab.json", model["vocab"])
    # The class of GPT-2 would add an end-of-text token to a vocabulary that has none.
    of_gpt2 = byte_pairs and content.end_of_text is not None
    options: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer" if of_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,  # older versions would drop spaces from what the model wrote
        **content.named,
    }
    if of_gpt2:
        end = next((token for token, i in description["model"]["vocab"].items() if i == content.end_of_text), None)
        options = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) | options
    if byte_pairs:
        options["add_prefix_space"] = description["pre_tokenizer"]["add_prefix_space"]
    if content.added:
        options["added_tokens_decoder"] = {
            str(token.id): {key: value for key, value in token._asdict().items() if key != "id"}
            for token in content.added
        }
    if own_ids:
        options[OWN_IDS] = {
            "end_of_text": content.end_of_text,
            "start": content.start,
            "stop_ids": list(content.stop_ids),
        }
    write_json(directory / "tokenizer_config.json", options)


def _with_placeholders(description: dict[str, Any], first: int, stop: int) -> dict[str, Any]:
    """The description with a token for each id from `first` to `stop` - 1, if they change nothing else."""
    model, added = description["model"], description["added_tokens"]
    if not only_merges(model):
        return description
    vocabulary, more = model["vocab"], {placeholder(i): i for i in range(first, stop)}
    # An added token that the vocabulary lacks is given the next id after it, whatever the file says.
    if more.keys() & vocabulary.keys() or not all(token["content"] in vocabulary for token in added):
        return description
    return {**description, "model": {**model, "vocab": {**vocabulary, **more}}}
