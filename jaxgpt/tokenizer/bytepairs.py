"""Byte-level byte pairs of any vocabulary, through tiktoken, with exactly the ids of Hugging Face's tokenizers.

The two programs differ. Hugging Face's merges the pairs in its list, the earliest in the list first. tiktoken merges
any two adjacent tokens whose concatenation is in its table, the lowest rank first, and its rank is its id. With the
list `b c`, `a b`, `ab c` and the text "abc", the first merges b and c and ends, while the second, given all three
tokens, goes on and merges a and bc.

The table that `ranks_of` makes leads tiktoken to the same tokens. It holds the token t = l + r of the pair at position
k if and only if byte pairs alone, with the pairs accepted before k, end at [l, r] on the bytes of t; its rank is k.
This is why:

- In a list where each pair comes after the pairs that make its parts, new tokens only make pairs of higher positions
  possible. So both programs merge in rounds: all of position 0, then all of position 1, ..., each from left to right.
- Merges are never undone. If l and r are adjacent in a text after the rounds before k, then no merge crossed the ends
  of t's bytes, so within those, each program chose among the same pairs in the same order as on the bytes of t alone.
  Hence on those bytes alone it ends at [l, r] too. A pair for which that is not so never occurs, and may be left out.
- Likewise, any two adjacent tokens whose concatenation is t are, after the rounds before k, where the bytes of t alone
  end. So they are l and r, and tiktoken merges nothing but listed pairs.

By induction over the rounds, both programs hold the same tokens after each. A token that is left out still decodes.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from jaxgpt.tokenizer.builtin import gpt2_alphabet, gpt2_encoder
from jaxgpt.tokenizer.content import Content
from jaxgpt.tokenizer.vocabulary import Tokenizer, id_array

Pair = tuple[str, str]

# A rank after all others.
_NEVER = 2**63


class OutOfOrderError(ValueError):
    """A list in which a pair comes before those that make its parts, so that merging does not go in rounds."""


def build(content: Content) -> Tokenizer:
    """Builds the tokenizer of a `builtin.byte_level` description; raises OutOfOrderError as `ranks_of` does."""
    vocabulary: dict[str, int] = content.description["model"]["vocab"]
    ranked = ranks_of(tuple(map(split_pair, content.description["model"]["merges"])))
    ids = id_array([vocabulary[token] for token in ranked])
    encode_ranks = gpt2_encoder({token: rank for rank, token in enumerate(to_bytes(ranked))})

    def encode(text: str) -> NDArray[np.uint32]:
        return ids[encode_ranks(text)]

    tokens: list[bytes | None] = [None] * content.vocab_size
    for i, token in zip(vocabulary.values(), to_bytes(vocabulary), strict=True):
        tokens[i] = token
    for added in content.added:
        tokens[added.id] = added.content.encode()
    if not content.description["pre_tokenizer"]["add_prefix_space"]:
        return Tokenizer(content, tokens, encode)
    return Tokenizer(content, tokens, lambda text: encode(text if text.startswith(" ") else f" {text}"))


def split_pair(merge: str) -> Pair:
    """The two tokens of a merge as a file writes it."""
    left, right = merge.split(" ")
    return left, right


def to_bytes(tokens: Iterable[str]) -> list[bytes]:
    """The bytes of tokens that are written in GPT-2's alphabet; a token with other characters stands for itself."""
    byte_of = {character: byte for byte, character in gpt2_alphabet().items()}
    return [
        bytes([byte_of[character] for character in token]) if byte_of.keys() >= set(token) else token.encode()
        for token in tokens
    ]


@functools.lru_cache(maxsize=1)  # who reads a file asks whether this works before building
def ranks_of(merges: tuple[Pair, ...]) -> list[str]:
    """Returns the tokens to give to tiktoken, in order of rank: the single bytes, then one per pair that can occur.

    Of a pair that is listed several times, only the last counts, as in Hugging Face's program.

    Raises:
        OutOfOrderError: if a pair comes before those that make its parts.
    """
    pairs = list(dict.fromkeys(reversed(merges)))[::-1]
    tokens = list(gpt2_alphabet().values())
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    halves: list[tuple[int, int] | None] = [None] * len(tokens)
    made: dict[tuple[int, int], int] = {}
    to_come = Counter(left + right for left, right in pairs)
    for left, right in pairs:
        token = left + right
        to_come[token] -= 1
        for part in (left, right):
            if part not in rank_of and to_come[part]:
                raise OutOfOrderError(f"the pair {left!r}, {right!r} comes before those that make {part!r}")
        if token in rank_of or left not in rank_of or right not in rank_of:
            continue
        pair = rank_of[left], rank_of[right]
        if _stay_apart(*pair, halves, made):
            rank_of[token] = made[pair] = len(tokens)
            halves.append(pair)
            tokens.append(token)
    return tokens


def _stay_apart(
    left: int, right: int, halves: Sequence[tuple[int, int] | None], made: dict[tuple[int, int], int]
) -> bool:
    """Whether byte pairs alone end at [left, right] on the bytes of both, given that they do at [left] and at [right].

    Only a merge across the boundary could prevent that. The tokens on its two sides, x and y, grow from single bytes to
    `left` and `right`, x each time at the rank of the token that it becomes, and y likewise. What merges first is the
    lowest of those ranks and that of x and y together; at equal ranks, what is further to the left.
    """
    growing_left, growing_right = [left], [right]
    while pair := halves[growing_left[-1]]:
        growing_left.append(pair[1])
    while pair := halves[growing_right[-1]]:
        growing_right.append(pair[0])
    x, y = growing_left.pop(), growing_right.pop()
    while True:
        x_grows = growing_left[-1] if growing_left else _NEVER
        y_grows = growing_right[-1] if growing_right else _NEVER
        across = made.get((x, y), _NEVER)
        if across < x_grows and across <= y_grows and across < _NEVER:
            return False
        if x_grows == y_grows == _NEVER:
            return True
        if x_grows <= y_grows:
            x = growing_left.pop()
        else:
            y = growing_right.pop()
