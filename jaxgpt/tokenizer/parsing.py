"""Checks the content of a tokenizer.json, and makes a `Content` of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.errors import DataError
from jaxgpt.tokenizer import builtin, bytepairs, characters
from jaxgpt.tokenizer.content import AddedToken, Content, only_merges, placeholder
from jaxgpt.tokenizer.names import BUILTIN
from jaxgpt.tokenizer.writing import OWN_IDS

# Ids are below this: a typo or a hostile file cannot exhaust memory.
_MOST_IDS = 2**24


class Beside:
    """What other files say about a tokenizer.

    Attributes:
        added: tokens by id, as they describe them.
        named: the text of the token that has a role.
        special: the texts of tokens that are special because a file lists them so.
        prefix: whether a space is put before each text; None if nothing says.
        options: tokenizer_config.json.
        own: the ids that `write_tokenizer` has stored.
        starts, stops: ids that config.json and generation_config.json give.
    """

    def __init__(self) -> None:
        self.added: list[dict[str, Any]] = []
        self.named: dict[str, str] = {}
        self.special: list[str] = []
        self.prefix: bool | None = None
        self.options: dict[str, Any] = {}
        self.own: dict[str, Any] | None = None
        self.starts: list[int] = []
        self.stops: list[int] = []


def content_of(path: Path, description: Any, beside: Beside) -> Content:
    """The content of a tokenizer.json and the files beside it, checked.

    Args:
        path: the file, for errors.
        description: its content.
        beside: what the files beside it say.

    Raises:
        DataError: if the description is none, or contradicts itself or the other files; says how.
    """
    model = description.get("model") if isinstance(description, dict) else None
    if not isinstance(model, dict):
        raise DataError(f"{path}: expected an object 'model'")
    vocabulary = _vocabulary(path, model)
    added = _added_tokens(path, description, beside, vocabulary)
    if only_merges(model) and (excess := _placeholders(vocabulary, added)):
        vocabulary = {token: i for token, i in vocabulary.items() if token not in excess}
        description = {**description, "model": {**model, "vocab": vocabulary}}
    id_of = vocabulary | {token.content: token.id for token in added}
    vocab_size, ids = len(id_of), set(id_of.values())
    if (gap := next((i for i in range(vocab_size) if i not in ids), None)) is not None:
        raise DataError(f"{path}: no token has the id {gap}, although there are ids up to {max(ids)}")
    end, start, stops = _ends(path, beside, id_of, vocab_size)
    kind, description = _kind(path, description, vocabulary, added, beside)
    if kind == "bpe":
        for known in map(builtin.content, BUILTIN):
            same = (end, start, stops) == (known.end_of_text, known.start, known.stop_ids)
            if same and vocab_size == known.vocab_size:
                parts = builtin.description(known.kind)
                if all(description[key] == part for key, part in parts.items()):
                    return known
        if not _in_order(description):
            kind = "hf"
    return Content(kind, description, vocab_size, end, start, stops, beside.named)


def _vocabulary(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    """The ids of a model's tokens; a unigram model lists them in order."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        try:
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        except (TypeError, ValueError):
            vocab = None
        if vocab is not None and len(vocab) < len(model["vocab"]):
            raise DataError(f"{path}: a token is listed twice")
    if not isinstance(vocab, dict) or not all(isinstance(token, str) for token in vocab):
        raise DataError(f"{path}: expected an object 'vocab' from tokens to ids")
    owner: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < _MOST_IDS:
            raise DataError(
                f"{path}: the id of {short_repr(token)} is {short_repr(i)}: expected an integer below {_MOST_IDS:,}"
            )
        if owner.setdefault(i, token) != token:
            raise DataError(f"{path}: id {i} belongs to two tokens, {short_repr(owner[i])} and {short_repr(token)}")
    if not encodable("".join(vocab)):
        raise DataError(f"{path}: a token holds a lone surrogate, which is no character")
    return vocab


def _placeholders(vocabulary: Mapping[str, int], added: list[AddedToken]) -> set[str]:
    """The tokens of the highest ids that are but placeholders, as `write_tokenizer` writes them."""
    owner, known = {i: token for token, i in vocabulary.items()}, {token.content for token in added}
    found: set[str] = set()
    i = max([*owner, *(token.id for token in added)], default=-1)
    while owner.get(i) == placeholder(i) and owner[i] not in known:
        found.add(owner[i])
        i -= 1
    return found


def encodable(text: str) -> bool:
    """Whether a text is free of lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _added_tokens(
    path: Path, description: Mapping[str, Any], beside: Beside, vocabulary: Mapping[str, int]
) -> list[AddedToken]:
    """The added tokens of all files, and the special ones that only have a role."""
    listed = description.get("added_tokens") or []
    if not isinstance(listed, list) or not all(isinstance(fields, dict) for fields in listed):
        raise DataError(f"{path}: expected a list of objects 'added_tokens'")
    tokens: dict[str, AddedToken] = {}
    for fields in [*listed, *beside.added]:
        token = _added_token(path, fields, vocabulary, beside.special, tokens)
        if token is not None:
            tokens.setdefault(token.content, token)
    for content in [*beside.special, builtin.END_OF_TEXT]:
        if content not in tokens and content in vocabulary:
            tokens[content] = AddedToken(vocabulary[content], content, special=True)
    owner = {i: token for token, i in vocabulary.items()}
    for token in tokens.values():
        if owner.setdefault(token.id, token.content) != token.content:
            raise DataError(
                f"{path}: id {token.id} belongs to two tokens, {short_repr(owner[token.id])} and "
                f"{short_repr(token.content)}"
            )
    return sorted(tokens.values())


def _added_token(
    path: Path,
    fields: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    special: Iterable[str],
    known: Mapping[str, AddedToken],
) -> AddedToken | None:
    """One added token; None if nothing gives it an id."""
    content, i = fields.get("content"), fields.get("id")
    if isinstance(i, str) and i.isdecimal() and len(i) < 10:  # the keys of added_tokens_decoder
        i = int(i)
    if not isinstance(content, str) or not content or not encodable(content):
        raise DataError(f"{path}: an added token is {short_repr(content)}: expected a text")
    own = vocabulary.get(content, known[content].id if content in known else None)
    if i is None and own is None:
        return None
    i = own if i is None else i
    if type(i) is not int or not 0 <= i < _MOST_IDS or own not in (None, i):
        also = "" if own is None else f", and elsewhere {own}"
        raise DataError(f"{path}: the id of the added token {short_repr(content)} is {short_repr(i)}{also}")
    flags = {}
    for flag in ("special", "single_word", "lstrip", "rstrip", "normalized"):
        value = fields.get(flag, False)
        if not isinstance(value, bool):
            raise DataError(f"{path}: {flag} of the added token {short_repr(content)} is {short_repr(value)}")
        flags[flag] = value
    return AddedToken(i, content, **flags | {"special": flags["special"] or content in special})


def _ends(
    path: Path, beside: Beside, id_of: Mapping[str, int], vocab_size: int
) -> tuple[int | None, int | None, tuple[int, ...]]:
    """(end_of_text, start, stop_ids)."""
    if (own := beside.own) is not None:
        end, start, stops = own.get("end_of_text"), own.get("start"), own.get("stop_ids")
        known = [*(i for i in (end, start) if i is not None), *(stops if isinstance(stops, list) else [None])]
        if not isinstance(stops, list) or not all(type(i) is int and 0 <= i < vocab_size for i in known):
            raise DataError(f"{path.parent}: {OWN_IDS} of tokenizer_config.json is {short_repr(own)}")
        return end, start, tuple(stops)
    # config.json may still have transformers' defaults, beyond a small vocabulary.
    starts, stops = ([i for i in ids if 0 <= i < vocab_size] for ids in (beside.starts, beside.stops))
    end = id_of.get(beside.named.get("eos_token", builtin.END_OF_TEXT), next(iter(stops), None))
    if end is not None:
        stops = [end, *stops]
    start = next(iter(starts), id_of.get(beside.named.get("bos_token", "")))
    return end, None if start == end else start, tuple(dict.fromkeys(stops))


def _kind(
    path: Path,
    description: dict[str, Any],
    vocabulary: dict[str, int],
    added: list[AddedToken],
    beside: Beside,
) -> tuple[str, dict[str, Any]]:
    """The kind, and the description in its own form."""
    model, pre = description["model"], description.get("pre_tokenizer")
    byte_pairs = model.get("type", "BPE") == "BPE" and "merges" in model
    merges = _merges(path, model, vocabulary) if byte_pairs else []
    plain = byte_pairs and not (
        description.get("normalizer")
        or any(model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges"))
        or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    )
    bare = pre is None and not merges and not added and model.get("unk_token") is None
    if plain and bare and _type(description.get("decoder")) == "Fuse" and all(len(token) == 1 for token in vocabulary):
        return "chars", characters.description(sorted(vocabulary, key=vocabulary.__getitem__))
    if plain and isinstance(pre, dict) and _type(pre) == "ByteLevel" and pre.get("use_regex", True) is True:
        prefix = pre.get("add_prefix_space", True) is not False if beside.prefix is None else beside.prefix
        complete = vocabulary.keys() >= set(builtin.gpt2_alphabet().values())
        if complete and _type(description.get("decoder")) == "ByteLevel":
            canonical = dict.fromkeys(reversed([" ".join(pair) for pair in merges]))  # of equal ones, the last counts
            own = builtin.byte_level(vocabulary, list(canonical)[::-1], added, prefix)
            processor = description.get("post_processor")  # kept for other programs, unless it does nothing
            return "bpe", own | ({} if _type(processor) in (None, "ByteLevel") else {"post_processor": processor})
        description = {**description, "pre_tokenizer": {**pre, "add_prefix_space": prefix}}
    kept = {key: value for key, value in description.items() if key not in ("truncation", "padding")}
    return "hf", {**kept, "added_tokens": [token._asdict() for token in added]}


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _in_order(description: dict[str, Any]) -> bool:
    try:
        bytepairs.ranks_of(tuple(map(bytepairs.split_pair, description["model"]["merges"])))
    except bytepairs.OutOfOrderError:
        return False
    return True


def _merges(path: Path, model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[bytepairs.Pair]:
    merges = model["merges"]
    if not isinstance(merges, list):
        raise DataError(f"{path}: expected a list 'merges', not {short_repr(merges)}")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise DataError(f"{path}: the merge {short_repr(merge)} is not two tokens")
        left, right = pair
        if lost := [token for token in (left, right, left + right) if token not in vocabulary]:
            raise DataError(
                f"{path}: the merge {short_repr(merge)} needs the token {short_repr(lost[0])}, which has no id"
            )
        pairs.append((left, right))
    return pairs
