"""Opens what a model is trained or evaluated on: texts, records and token files, one by one or in directories."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.checks import short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.data.contents import TEXT_KEY, recognise
from jaxgpt.data.documents import open_documents
from jaxgpt.data.encoding import Counts, Encoder, encode
from jaxgpt.data.finding import find_splits
from jaxgpt.data.records import LeftOut, Records, RecordTokens, read_records, record_keys
from jaxgpt.data.shards import open_shard, read_index
from jaxgpt.data.sources import Corpus, Reference, Source, kind_of, template_of
from jaxgpt.data.token_files import open_bare, open_token_file, read_bytes
from jaxgpt.data.tokens import Shard, Tokens, id_type, sha256
from jaxgpt.errors import DataError
from jaxgpt.files import local, not_text
from jaxgpt.tokenizer import get_tokenizer

_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<path>.+)")
_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?nan|[+-]?inf)", re.IGNORECASE)


def open_corpus(
    data: Any,
    config: GPTConfig,
    *,
    validation: Any = None,
    tokenizer: str | Path | None = None,
    text_key: str | None = None,
    allow_special: bool = False,
    template: str = "",
    longest: int | None = None,
    skip_bad: bool = False,
) -> Corpus:
    """Opens what a model is to be trained on.

    Args:
        data: a source or several. A source is a path, `Tokens`, or a text such as "wiki=corpus/:0.7" with a name
            for it and its weight; a path is a file, a directory or a pattern of files.
        config: the model's config.
        validation: sources to validate on; of one that has a validation split, that is meant.
        tokenizer: what made the ids of files that do not say; by default those are refused.
        text_key: where a record of JSON or Parquet has its text: by default under "text". A record without that key
            that has a prompt and a response, or the turns of a chat, is read by a template.
        allow_special: whether special tokens in texts, such as `<|endoftext|>`, are tokens.
        template: how records are read, in place of the template that they are recognised to need: see `Template`.
        longest: the most ids that a record with a response may have; by default, what fits the model's context.
        skip_bad: whether to leave out records without a text, or without what a template needs, instead of raising.

    Raises:
        DataError: if there is no source, or one cannot be opened or has another tokenizer than the model; if only some
            have weights; if only some have records with a response, or they need different templates.
    """
    if text_key and template:
        raise DataError(f"a text key, {text_key!r}, is for texts, and a template for records: give one of them")
    longest = longest or config.context_length + 1
    how = _How(config, tokenizer, text_key, allow_special, template, longest, skip_bad)
    sources = tuple(_open(one, how) for one in _listed(data))
    if not sources:
        raise DataError("there is no data to train on: expected at least one source")
    weighted = [source.name for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        missing = next(source.name for source in sources if source.weight is None)
        raise DataError(f"{weighted[0]} has a weight and {missing} has none: give all sources one, or none")
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(
            f"two sources have the name {min(twice)!r}: give them names, as in --data NAME=PATH or Source(name, tokens)"
        )
    apart = []
    for one in _listed(validation):
        source = _open(one, how)
        if source.weight is not None:
            raise DataError(f"{source.name}: data to validate on is read once, so it has no weight")
        if source.validation is not None:
            source = dataclasses.replace(source, tokens=source.validation, validation=None)
        apart.append(source)
    corpus = Corpus(sources, tuple(apart))
    for source in (*sources, *apart):
        for name, tokens in ((source.name, source.tokens), (f"the validation of {source.name}", source.validation)):
            if tokens is not None and template_of(tokens) != corpus.template:
                first = f"{sources[0].name} and {name} cannot be mixed"
                raise DataError(f"{first}: {kind_of(sources[0].tokens)} and {kind_of(tokens)}")
    return corpus


def open_tokens(
    path: str | Path,
    config: GPTConfig,
    tokenizer: str | Path | None = None,
    text_key: str | None = None,
    *,
    allow_special: bool = False,
    template: str = "",
    longest: int | None = None,
    skip_bad: bool = False,
) -> Tokens:
    """Opens one source, a file, a directory or a pattern of files, for a model, and verifies it; with its validation
    split, if it has one. Text is encoded with the model's tokenizer.

    Args:
        path: where it is.
        config: the model's config.
        tokenizer, text_key, allow_special, template, longest, skip_bad: as for `open_corpus`.

    Raises:
        DataError: if it cannot be read, is damaged, was made by another tokenizer, or holds ids outside the model's
            vocabulary.
    """
    longest = longest or config.context_length + 1
    source = _open(path, _How(config, tokenizer, text_key, allow_special, template, longest, skip_bad))
    if source.weight is not None:
        raise DataError(f"{source.name}: a weight is for one of several sources to train on")
    tokens = source.tokens if source.validation is None else _join([source.tokens, source.validation])
    for shard in tokens.shards:
        shard.verify(config.vocab_size)
    return tokens


def read_text(
    path: str | Path,
    tokenizer: str | Path,
    text_key: str = TEXT_KEY,
    *,
    separate: bool | None = None,
    allow_special: bool = False,
    skip_bad: bool = False,
) -> Tokens:
    """Encodes the documents of a file.

    Args:
        path: the file: text, JSON or Parquet.
        tokenizer: anything that `get_tokenizer` takes.
        text_key: where a record has its text.
        separate: whether end-of-text follows each document; by default if these are records.
        allow_special: whether special tokens in texts, such as `<|endoftext|>`, are tokens.
        skip_bad: whether to leave out records without a text instead of raising.

    Raises:
        DataError: if it cannot be read or is not UTF-8 text; says what it looks like. For a record without a text.
    """
    made_by = get_tokenizer(tokenizer)
    with open_documents(path, text_key) as documents:
        encoder = Encoder(made_by, documents.records if separate is None else separate, allow_special, skip_bad)
        rows, counts = [np.zeros(0, id_type(made_by.vocab_size))], Counts()
        for block in encode(documents.blocks(made_by.find_cut), encoder):
            rows.append(block.ids_N)
            counts.add(block.counts)
    ids_N, left_out = np.concatenate(rows), LeftOut("without a text", counts.bad, counts.first_bad)
    shard = Shard(ids_N, sha256(ids_N), marked=counts.marked > 0)
    return Tokens((shard,), made_by.name, made_by.vocab_size, left_out.notes)


def check_tokens(tokens: Tokens, config: GPTConfig, source: str) -> None:
    """Raises DataError, naming `source`, unless the model's tokenizer made these tokens."""
    if tokens.tokenizer != config.tokenizer:
        raise DataError(
            f"{source}: made by tokenizer {short_repr(tokens.tokenizer)}, but the model has {config.tokenizer!r}: "
            "tokenize the text again with the model's"
        )


def _listed(data: Any) -> list[Any]:
    several = isinstance(data, (list, tuple)) and not isinstance(data, Reference)
    return [] if data is None else list(data) if several else [data]


class _How(NamedTuple):
    """How sources are read, as `open_corpus` is told."""

    config: GPTConfig
    tokenizer: str | Path | None
    text_key: str | None
    allow_special: bool
    template: str
    longest: int
    skip_bad: bool


def _open(given: Any, how: _How) -> Source:
    if isinstance(given, Source):
        source = given
    elif isinstance(given, Tokens):
        source = Source("the tokens", given)
    elif isinstance(given, (str, os.PathLike, Reference)):
        source = _open_path(given if isinstance(given, Reference) else parse(given), how)
    else:
        raise TypeError(f"data must be a path, Tokens, or a list of these, not {short_repr(given)}")
    if how.template and source.template != how.template:
        raise DataError(
            f"{source.path or source.name}: expected records for the template {how.template!r}, not "
            f"{kind_of(source.tokens)}"
        )
    for tokens in filter(None, (source.tokens, source.validation)):
        check_tokens(tokens, how.config, source.path or source.name)
    return source


def _open_path(given: Reference, how: _How) -> Source:
    name, path, weight, text_key, allow_special, skip_bad = given
    how = how._replace(
        text_key=how.text_key or text_key,
        allow_special=how.allow_special or allow_special,
        skip_bad=how.skip_bad or skip_bad,
    )
    place, validation, left_out = local(path), None, tuple[str, ...]()
    if os.path.isdir(place) and (index := read_index(place)) is not None:
        tokens = _join([open_shard(place, shard, index.tokenizer) for shard in index.shards])
    else:
        train, val, left_out = find_splits(path)
        tokens = _open_files(train, how)
        validation = _open_files(val, how) if val else None
    for one in filter(None, (tokens, validation)):
        left_out += one.left_out
    text_key = None if isinstance(tokens, RecordTokens) else how.text_key or TEXT_KEY
    where, flags = os.path.abspath(place), (how.allow_special, how.skip_bad)
    return Source(name, tokens, weight, validation, where, left_out, text_key, *flags)


def parse(given: str | os.PathLike[str]) -> Reference:
    """A source as --data has it: PATH, NAME=PATH, PATH:WEIGHT or NAME=PATH:WEIGHT. A path that
    exists as it is written is one."""
    text, name, weight = os.fspath(given), None, None
    if isinstance(given, str) and text and not os.path.exists(local(text)):
        if found := _WEIGHTED.fullmatch(text):
            text, weight = found["path"], float(found["weight"])
        if not os.path.exists(local(text)) and (found := _NAMED.fullmatch(text)):
            name, text = found["name"], found["path"]
    return Reference(name or Path(text).name or text, text, weight)


def _open_files(paths: list[Path], how: _How) -> Tokens:
    separate = True if len(paths) > 1 else None  # between the texts of two files is the end of a document
    return _join([_open_file(path, how, separate) for path in paths])


def _open_file(path: Path, how: _How, separate: bool | None) -> Tokens:
    try:
        odd = path.exists() and not path.is_file()  # it is read twice, and opening a pipe could block indefinitely
    except (OSError, ValueError) as error:  # a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if odd:
        raise DataError(f"{path}: is not a file (`jaxgpt tokenize` reads pipes)")
    if (tokens := open_token_file(path, how.tokenizer)) is not None:
        return tokens
    keys = [] if how.text_key else record_keys(path)
    if template := keys and (how.template or recognise(keys)):
        if how.allow_special:
            raise DataError(
                f"{path}: special tokens in the texts of prompts and responses are never tokens (--allow-special): the "
                "template alone says where a response ends"
            )
        records = read_records(path, how.config.tokenizer, template, how.longest, skip_bad=how.skip_bad)
        records.shards[0].verify(how.config.vocab_size)  # so that no batch needs to
        return records
    bare = path.suffix.lower() == ".bin" and not_text(read_bytes(path, 2**20)) != ""
    if not bare:
        key = how.text_key or TEXT_KEY
        return read_text(
            path,
            how.config.tokenizer,
            key,
            separate=separate,
            allow_special=how.allow_special,
            skip_bad=how.skip_bad,
        )
    index = path.with_suffix(".idx")
    if index.is_file() and (tokens := open_token_file(index, how.tokenizer)) is not None:
        return tokens
    if how.tokenizer is None:
        raise DataError(
            f"{path}: has no header that says what it holds: if these are uint16 ids, as nanoGPT writes them, say "
            "which tokenizer made them (--tokenizer NAME_OR_PATH)"
        )
    return open_bare(path, how.tokenizer)


def _join(tokens: Sequence[Tokens]) -> Tokens:
    """The tokens of several files, one after another.

    Raises:
        DataError: if they have different tokenizers, or only some have records with a response.
    """
    first = tokens[0]
    for other in tokens[1:]:
        where = f"{first.shards[0].path or 'text'} and {other.shards[0].path or 'text'}"
        if other.tokenizer != first.tokenizer:
            raise DataError(f"{where} were made by different tokenizers, {first.tokenizer} and {other.tokenizer}")
        if template_of(other) != template_of(first):
            raise DataError(f"{where} cannot be mixed: {kind_of(first)} and {kind_of(other)}")
    shards = tuple(shard for one in tokens for shard in one.shards)
    left_out = tuple(note for one in tokens for note in one.left_out)
    if isinstance(first, RecordTokens):
        records = Records.joined([one.records for one in tokens if isinstance(one, RecordTokens)])
        return dataclasses.replace(first, shards=shards, left_out=left_out, records=records)
    return Tokens(shards, first.tokenizer, max(one.vocab_size for one in tokens), left_out)
