"""Reads a tokenizer from its files. Nothing in a file is executed.

| files | what they are |
|---|---|
| tokenizer.json | Hugging Face's description of any tokenizer; preferred |
| vocab.json and merges.txt, or OpenAI's encoder.json and vocab.bpe | byte-level byte pairs |
| vocab.txt | BERT's WordPiece, one token per line |
| characters.json | a JSON list of the characters of a model that reads single ones |

nanoGPT keeps the characters of such a model in meta.pkl, which is never unpickled here. In your own Python, this makes
characters.json of it:

    import json, pickle
    itos = pickle.load(open("meta.pkl", "rb"))["itos"]
    json.dump([itos[i] for i in range(len(itos))], open("characters.json", "w"))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import DataError
from jaxgpt.textfile import read_json, read_text
from jaxgpt.tokenizer import builtin, bytepairs, characters
from jaxgpt.tokenizer.content import AddedToken, Content, only_merges, placeholder
from jaxgpt.tokenizer.names import BUILTIN
from jaxgpt.tokenizer.writing import OWN_IDS

# The files of each kind of tokenizer, by preference.
_SETS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("vocab.txt",),
    ("characters.json",),
)
# The classes of transformers (less "Fast") whose rules older files stand for; those of others are in their code alone.
_CLASSES = {
    "merges.txt": ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "CodeGenTokenizer"),
    "vocab.txt": ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
}
_ANY_CLASS = ("None", "PreTrainedTokenizer", "TokenizersBackend")
# Others, and what to do about them.
_AUTO = "transformers' AutoTokenizer.from_pretrained(directory).save_pretrained(directory) writes a tokenizer.json"
_REFUSED = {
    "meta.pkl": "a pickle, which is never loaded: write its characters to characters.json, in your own Python: "
    "json.dump([itos[i] for i in range(len(itos))], open('characters.json', 'w')), where itos is "
    "pickle.load(open('meta.pkl', 'rb'))['itos']",
    "spiece.model": f"a SentencePiece model: {_AUTO}",
    "sentencepiece.model": f"a SentencePiece model: {_AUTO}",
    "tokenizer.model": f"a SentencePiece model: {_AUTO}",
}

# Bytes. Parsed, JSON takes about 20 times as much memory; the largest vocabularies take half of this.
_LIMIT = 2**25
# Ids are below this: a typo or a hostile file cannot exhaust memory.
_MOST_IDS = 2**24
# A role of tokenizer_config.json is the name of the token that has it.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def are_in(directory: Path) -> bool:
    """Whether the files of a tokenizer lie in a directory."""
    return any(all((directory / name).is_file() for name in names) for names in _SETS)


def traces_are_in(directory: Path) -> bool:
    """Whether a directory has files of a tokenizer, although perhaps not all that are needed, or of an unknown kind."""
    return any((directory / name).is_file() for name in (*itertools.chain(*_SETS), *_REFUSED))


def read(path: Path) -> Content:
    """Reads the tokenizer in a directory, or in a tokenizer.json or characters.json.

    Raises:
        ConfigError: for a file that is not JSON.
        DataError: if there is no tokenizer, or the files contradict themselves; says how.
    """
    if path.name in _REFUSED and path.is_file():
        raise DataError(f"{path}: {_REFUSED[path.name]}")
    if path.is_dir():
        return _read_directory(path)
    content = read_json(path, _LIMIT)
    if isinstance(content, list):
        return _content(path, _characters(path, content), _Beside())
    if isinstance(content, dict) and "model" in content:
        return _content(path, content, _Beside())
    raise DataError(
        f"{path}: expected a tokenizer.json, or a list of characters; of other files, give the directory around them"
    )


def _read_directory(directory: Path) -> Content:
    names = next((names for names in _SETS if all((directory / name).is_file() for name in names)), None)
    if names is None:
        for name, reason in _REFUSED.items():
            if (directory / name).is_file():
                raise DataError(f"{directory / name}: {reason}")
        if (directory / "run.json").is_file() and are_in(directory / "tokenizer"):
            return _read_directory(directory / "tokenizer")
        expected = "; ".join(" and ".join(names) for names in _SETS)
        raise DataError(f"{directory}: holds no tokenizer; expected one of: {expected}")
    beside, path = _Beside.of(directory), directory / names[0]
    kind = str(beside.options.get("tokenizer_class"))
    if names[-1] in _CLASSES and kind.removesuffix("Fast") not in (*_CLASSES[names[-1]], *_ANY_CLASS):
        raise DataError(f"{directory / names[-1]}: says nothing of the rules of {short_repr(kind)}: {_AUTO}")
    if path.name == "vocab.txt":
        return _content(path, _word_piece(path, beside), beside)
    content = read_json(path, _LIMIT)
    if path.name == "characters.json":
        return _content(path, _characters(path, content), beside)
    if len(names) == 2:
        content = {"added_tokens": [], "model": {"vocab": content, "merges": _read_merges(directory / names[1])}}
        content |= {"pre_tokenizer": builtin.BYTE_LEVEL, "decoder": builtin.BYTE_LEVEL}
        content["model"]["type"] = "BPE"
    return _content(path, content, beside)


class _Beside:
    """What the other files in the directory say.

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

    @classmethod
    def of(cls, directory: Path) -> _Beside:
        self = cls()
        self.options = options = _object(directory / "tokenizer_config.json")
        # transformers ignores the other two files if this one lists the tokens.
        described = options.get("added_tokens_decoder")
        roles = dict(options)
        if described is None:
            roles |= _object(directory / "special_tokens_map.json")
        for role in _ROLES:
            token = roles.get(role)
            if (text := _text(token)) is not None:
                self.named[role] = text
                if isinstance(token, dict) and described is None:
                    self.added.append({**token, "id": None, "special": True})
        for role in ("additional_special_tokens", "extra_special_tokens"):
            more = roles.get(role)
            for token in more if isinstance(more, list) else more.values() if isinstance(more, dict) else []:
                if (text := _text(token)) is not None:
                    self.special.append(text)
        self.special += self.named.values()
        if isinstance(described, dict):
            self.added += [{**fields, "id": i} for i, fields in described.items() if isinstance(fields, dict)]
        else:
            for content, i in _object(directory / "added_tokens.json").items():
                special = content in self.special
                self.added.append({"id": i, "content": content, "special": special, "normalized": not special})
        config, generation = _object(directory / "config.json"), _object(directory / "generation_config.json")
        prefix, kind = options.get("add_prefix_space"), options.get("tokenizer_class")
        if isinstance(prefix, bool):
            self.prefix = prefix
        elif str(kind).startswith("GPT2Tokenizer") or (kind is None and config.get("model_type") == "gpt2"):
            self.prefix = False  # what transformers' class does, whatever tokenizer.json says
        self.own = options[OWN_IDS] if isinstance(options.get(OWN_IDS), dict) else None
        for fields in (generation, config):
            self.starts += _ids(fields.get("bos_token_id"))
            self.stops += _ids(fields.get("eos_token_id"))
        return self


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    content = read_json(path, _LIMIT)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, not {short_repr(content)}")
    return content


def _text(token: Any) -> str | None:
    """The text of a token that is written as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _read_merges(path: Path) -> list[str]:
    return [line for line in _lines(path) if line and not line.startswith("#version")]


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path, _LIMIT).split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None


def _characters(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: expected a list of characters, not {short_repr(content)}")
    ids: dict[str, int] = {}
    for i, character in enumerate(content):
        if not isinstance(character, str) or len(character) != 1 or not _encodable(character):
            raise DataError(f"{path}: entry {i} is {short_repr(character)}: expected one character")
        if ids.setdefault(character, i) != i:
            raise DataError(f"{path}: the character {character!r} has two ids, {ids[character]} and {i}")
    return characters.description(content)


def _word_piece(path: Path, beside: _Beside) -> dict[str, Any]:
    """BERT's tokenizer, as its class in transformers builds it from vocab.txt."""
    tokens = _lines(path)
    if not tokens[-1]:
        tokens.pop()
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if vocabulary.setdefault(token, i) != i:
            raise DataError(f"{path}: the token {short_repr(token)} has two ids, {vocabulary[token]} and {i}")
    options = beside.options
    roles = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    beside.named = {role: text for role, text in (roles | beside.named).items() if text in vocabulary}
    beside.special += beside.named.values()
    if "unk_token" not in beside.named:
        raise DataError(f"{path}: lacks the token {short_repr(roles['unk_token'])}, for what is not in the vocabulary")
    return {
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": options.get("tokenize_chinese_chars", True) is not False,
            "strip_accents": options.get("strip_accents"),
            "lowercase": options.get("do_lower_case", True) is not False,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": beside.named["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }


def _content(path: Path, description: Any, beside: _Beside) -> Content:
    """The content of a tokenizer.json and the files beside it, checked."""
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
    if not _encodable("".join(vocab)):
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


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _added_tokens(
    path: Path, description: Mapping[str, Any], beside: _Beside, vocabulary: Mapping[str, int]
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
    if not isinstance(content, str) or not content or not _encodable(content):
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
    path: Path, beside: _Beside, id_of: Mapping[str, int], vocab_size: int
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
    beside: _Beside,
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
