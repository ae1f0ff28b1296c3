"""What a tokenizer is, as plain values: the description that it is built, named, written and sent elsewhere by."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgpt.tokenizer.names import BUILTIN, NONE


class AddedToken(NamedTuple):
    """A token that is found in a text as it is written, before the rest is split.

    Attributes:
        id: its id.
        content: its text.
        special: whether it is ordinary text unless the caller allows special tokens.
        single_word: whether it counts only where no letter or digit adjoins it.
        lstrip, rstrip: whether it takes the whitespace before or after it along.
        normalized: whether it is looked for after all those that are not, and in normalized text.
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


def placeholder(i: int) -> str:
    """The text that stands for an id without a token."""
    return f"<|{i}|>"


def only_merges(model: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json's model makes a token of several characters only by its merges, so that further tokens
    in the vocabulary change no text's ids."""
    return model.get("type", "BPE") == "BPE" and "merges" in model and not model.get("ignore_merges")


@dataclasses.dataclass(frozen=True, eq=False)
class Content:
    """A tokenizer's content.

    Attributes:
        kind: "gpt2", "bytes", "bpe", "chars", "hf" or "none"; `registry.py` says what builds each.
        description: the tokenizer as the content of a tokenizer.json. Of "gpt2" and "bytes", which are written by
            `builtin.py`, and of "none", it is empty.
        vocab_size: ids are below this.
        end_of_text: the id that ends a text and separates texts, if there is one.
        start: the id that an empty prompt starts from, if it is not `end_of_text`.
        stop_ids: the ids at which generation ends.
        named: roles, such as "pad_token", and the text of the token that has it. They decide nothing here, and are
            written for other programs.
    """

    kind: str
    description: dict[str, Any]
    vocab_size: int
    end_of_text: int | None
    start: int | None
    stop_ids: tuple[int, ...]
    named: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def name(self) -> str:
        """The name; equal for contents that give every text the same ids, every id the same text, and end alike."""
        if self.kind in (*BUILTIN, NONE):
            return self.kind
        # The post-processor adds tokens around a text, which is not done here, and the others cut or pad it.
        free = ("version", "post_processor", "truncation", "padding")
        parts = {key: value for key, value in self.description.items() if key not in free and value is not None}
        canonical = [parts, self.end_of_text, self.start, list(self.stop_ids)]
        digest = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:16]}"

    @property
    def added(self) -> list[AddedToken]:
        """The added tokens, in order of their ids."""
        return [AddedToken(**fields) for fields in self.description.get("added_tokens", [])]
