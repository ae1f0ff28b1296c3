"""Tokenizers of single characters, such as those of nanoGPT's character models."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.errors import DataError
from jaxgpt.tokenizer.content import Content
from jaxgpt.tokenizer.vocabulary import Tokenizer, id_array


def description(characters: list[str]) -> dict[str, Any]:
    """The content of a tokenizer.json: byte pairs without merges, on characters."""
    vocabulary = {character: i for i, character in enumerate(characters)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def build(content: Content) -> Tokenizer:
    """Builds the tokenizer of a `description`."""
    vocabulary: dict[str, int] = content.description["model"]["vocab"]

    def encode(text: str) -> NDArray[np.uint32]:
        try:
            return id_array([vocabulary[character] for character in text])
        except KeyError as error:
            raise DataError(
                f"the tokenizer has no character {error.args[0]!r}: it knows {len(vocabulary)}, such as "
                f"{''.join(list(vocabulary)[:20])!r}"
            ) from None

    return Tokenizer(content, [character.encode() for character in vocabulary], encode)
