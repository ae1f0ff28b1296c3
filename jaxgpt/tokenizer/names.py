"""The names of tokenizers. A config stores a tokenizer's name, and a token file states it.

"gpt2" and "bytes" are in the package. Any other tokenizer is named by its content, such as "bpe-0123456789abcdef": its
kind (`bpe`: byte-level byte pairs; `chars`: characters; `hf`: one that Hugging Face's library runs), and the start of a
hash of all that affects which ids a text gets, what text they give, and which of them start and end a text. "none" is
the tokenizer of a model that came without one.
"""

from __future__ import annotations

import re
from typing import Any

BUILTIN = ("gpt2", "bytes")
NONE = "none"
NAME_FORM = "gpt2, bytes, none, or a tokenizer's name by content, such as bpe-0123456789abcdef"

_BY_CONTENT = re.compile(r"(bpe|chars|hf)-[0-9a-f]{16}")


def is_name(name: Any) -> bool:
    """Whether this has the form of a tokenizer's name, as opposed to a path or the name of a model on the hub."""
    return isinstance(name, str) and (name in (*BUILTIN, NONE) or _BY_CONTENT.fullmatch(name) is not None)
