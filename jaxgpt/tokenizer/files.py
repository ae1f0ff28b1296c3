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
from pathlib import Path
from typing import Any

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import DataError
from jaxgpt.textfile import read_json, read_text
from jaxgpt.tokenizer import builtin, characters
from jaxgpt.tokenizer.content import Content
from jaxgpt.tokenizer.parsing import Beside, content_of, encodable
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
        return content_of(path, _characters(path, content), Beside())
    if isinstance(content, dict) and "model" in content:
        return content_of(path, content, Beside())
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
    beside, path = _beside(directory), directory / names[0]
    kind = str(beside.options.get("tokenizer_class"))
    if names[-1] in _CLASSES and kind.removesuffix("Fast") not in (*_CLASSES[names[-1]], *_ANY_CLASS):
        raise DataError(f"{directory / names[-1]}: says nothing of the rules of {short_repr(kind)}: {_AUTO}")
    if path.name == "vocab.txt":
        return content_of(path, _word_piece(path, beside), beside)
    content = read_json(path, _LIMIT)
    if path.name == "characters.json":
        return content_of(path, _characters(path, content), beside)
    if len(names) == 2:
        content = {"added_tokens": [], "model": {"vocab": content, "merges": _read_merges(directory / names[1])}}
        content |= {"pre_tokenizer": builtin.BYTE_LEVEL, "decoder": builtin.BYTE_LEVEL}
        content["model"]["type"] = "BPE"
    return content_of(path, content, beside)


def _beside(directory: Path) -> Beside:
    """What the files in a directory say beside its tokenizer.json, or what takes its place."""
    beside = Beside()
    beside.options = options = _object(directory / "tokenizer_config.json")
    # transformers ignores the other two files if this one lists the tokens.
    described = options.get("added_tokens_decoder")
    roles = dict(options)
    if described is None:
        roles |= _object(directory / "special_tokens_map.json")
    for role in _ROLES:
        token = roles.get(role)
        if (text := _text(token)) is not None:
            beside.named[role] = text
            if isinstance(token, dict) and described is None:
                beside.added.append({**token, "id": None, "special": True})
    for role in ("additional_special_tokens", "extra_special_tokens"):
        more = roles.get(role)
        for token in more if isinstance(more, list) else more.values() if isinstance(more, dict) else []:
            if (text := _text(token)) is not None:
                beside.special.append(text)
    beside.special += beside.named.values()
    if isinstance(described, dict):
        beside.added += [{**fields, "id": i} for i, fields in described.items() if isinstance(fields, dict)]
    else:
        for content, i in _object(directory / "added_tokens.json").items():
            special = content in beside.special
            beside.added.append({"id": i, "content": content, "special": special, "normalized": not special})
    config, generation = _object(directory / "config.json"), _object(directory / "generation_config.json")
    prefix, kind = options.get("add_prefix_space"), options.get("tokenizer_class")
    if isinstance(prefix, bool):
        beside.prefix = prefix
    elif str(kind).startswith("GPT2Tokenizer") or (kind is None and config.get("model_type") == "gpt2"):
        beside.prefix = False  # what transformers' class does, whatever tokenizer.json says
    beside.own = options[OWN_IDS] if isinstance(options.get(OWN_IDS), dict) else None
    for fields in (generation, config):
        beside.starts += _ids(fields.get("bos_token_id"))
        beside.stops += _ids(fields.get("eos_token_id"))
    return beside


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
        if not isinstance(character, str) or len(character) != 1 or not encodable(character):
            raise DataError(f"{path}: entry {i} is {short_repr(character)}: expected one character")
        if ids.setdefault(character, i) != i:
            raise DataError(f"{path}: the character {character!r} has two ids, {ids[character]} and {i}")
    return characters.description(content)


def _word_piece(path: Path, beside: Beside) -> dict[str, Any]:
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
