"""Packed documents kept apart (`separate_documents`): a sequence of tokens holds parts of several documents, and each
part is read as if it were alone, with attention and positions of its own.

One rule finds them: a document starts at its end-of-text token. That is how GPT-2 reads a text (end-of-text is what an
empty prompt starts from), and it is right wherever a file has the token:

- before each document (llm.c, modded-nanogpt): a document is what the file says;
- after each document (nanoGPT, `jaxgpt tokenize`): the token is the label of a document's last token, from which the
  model learns to end, and as an input it is the first token of the next document, whose text is predicted from it and
  from nothing before it.

So every label counts, and the loss does not depend on which of the two a file has. A sequence that starts within a
document starts with a document that is cut: its first token is at position 0. An empty document, two such tokens in a
row, is a document of that one token.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.config import GPTConfig
from jaxgpt.errors import ConfigError
from jaxgpt.tokenizer import get_tokenizer


def separator_id(config: GPTConfig) -> int:
    """The id at which documents start: end-of-text.

    Raises:
        ConfigError: if the model's tokenizer has no end-of-text, or the model has fewer ids.
    """
    end_of_text = get_tokenizer(config.tokenizer).end_of_text
    if end_of_text is None:
        raise ConfigError(
            f"separate_documents needs a tokenizer with an end-of-text token, at which documents start, and "
            f"{config.tokenizer} has none: leave it out, or choose another tokenizer"
        )
    if end_of_text >= config.vocab_size:
        raise ConfigError(
            f"separate_documents needs end-of-text, at which documents start: its id is {end_of_text}, and the model "
            f"has only {config.vocab_size} ids: leave it out, or raise model.vocab_size"
        )
    return end_of_text


def document_starts(ids_BxT: Array, separator: int) -> Array:
    """Where the document of each token starts, `GPT`'s `start_BxT`: the index in its row of the last separator up to
    and including the token itself, or 0; int32."""
    index_1xT = jnp.arange(ids_BxT.shape[1], dtype=jnp.int32)[None]
    return lax.cummax(jnp.where(ids_BxT == separator, index_1xT, 0), axis=1)
