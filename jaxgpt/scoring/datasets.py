"""The files of published benchmarks, as examples to score."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import DataError
from jaxgpt.files import decode_text
from jaxgpt.scoring.pairs import Pair, encode_pair, rolling_windows, sliding_windows
from jaxgpt.tokenizer import get_tokenizer


class Example(NamedTuple):
    """One example of a benchmark.

    Attributes:
        pairs: contexts and continuations to score. The choices of a question have one context.
        data: what the metrics need besides: (right choice, length of each choice), or (words, bytes, tokens).
    """

    pairs: list[Pair]
    data: Any = None


class Reading(NamedTuple):
    """How to read a benchmark for a model.

    Attributes:
        path: its file.
        tokenizer: the name of the model's tokenizer.
        context_length: the model's.
        stride: of sliding windows.
    """

    path: Path
    tokenizer: str
    context_length: int
    stride: int


def hellaswag(reading: Reading) -> Iterator[Example]:
    """hellaswag_val.jsonl, with lm-evaluation-harness's text: the activity, and brackets removed. A choice's length is
    its characters."""
    for record in _records(reading.path, {"activity_label": str, "ctx_a": str, "ctx_b": str}):
        query = _without_brackets(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
        endings, label = _endings(record)
        choices = [_without_brackets(ending) for ending in endings]
        pairs = [encode_pair(get_tokenizer(reading.tokenizer).encode, query, f" {choice}") for choice in choices]
        yield Example(pairs, (label, [len(choice) for choice in choices]))


def hellaswag_llmc(reading: Reading) -> Iterator[Example]:
    """hellaswag_val.jsonl with llm.c's text, or llm.c's own hellaswag_val.bin. A choice's length is its tokens."""
    with reading.path.open("rb") as file:
        if int.from_bytes(file.read(4), "little") == _LLMC:
            yield from _llmc_examples(reading)
            return
    encode = get_tokenizer(reading.tokenizer).encode
    for record in _records(reading.path, {"ctx": str}):
        context, (endings, label) = encode(record["ctx"]), _endings(record)
        pairs: list[Pair] = [(context, encode(f" {ending}")) for ending in endings]
        yield Example(pairs, (label, [len(tokens) for _, tokens in pairs]))


def lambada_openai(reading: Reading) -> Iterator[Example]:
    """OpenAI's lambada_test.jsonl: the last word of each text."""
    for number, record in enumerate(_records(reading.path, {"text": str}), 1):
        context, space, word = record["text"].rpartition(" ")
        if not context or not word:
            raise DataError(f"{reading.path}, line {number}: the text has no last word: {short_repr(record['text'])}")
        yield Example([encode_pair(get_tokenizer(reading.tokenizer).encode, context, space + word)])


def wikitext(reading: Reading) -> Iterator[Example]:
    """wiki.test.raw, one example per article, detokenized."""
    return _articles(reading, detokenized)


def wikitext_verbatim(reading: Reading) -> Iterator[Example]:
    """wiki.test.raw, one example per article, as it is."""
    return _articles(reading, str)


def wikitext_guide(reading: Reading) -> Iterator[Example]:
    """wiki.test.raw as one text, joined as in Hugging Face's guide; one example per window."""
    # The data set that the guide loads has a row per line, with the line's end, but blank lines are empty.
    lines = [line if line.strip() else "" for line in io.StringIO(_text(reading.path))]
    ids = get_tokenizer(reading.tokenizer).encode("\n\n".join(lines))
    for pair in sliding_windows(ids, reading.stride, reading.context_length):
        yield Example([pair], (0, 0, len(pair[1])))


def detokenized(text: str) -> str:
    """WikiText with the spaces removed that its tokenization added, by lm-evaluation-harness's rules."""
    for pattern, replacement in _DETOKENIZING:
        text = re.sub(pattern, replacement, text)
    return text


# In this order, each over the whole text. The second is meant to be without the slashes, but the published figures were
# computed with them.
_DETOKENIZING = [
    ("s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (r" @\.@ ", "."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u00b0 ", "\u00b0"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def _articles(reading: Reading, prepare: Callable[[str], str]) -> Iterator[Example]:
    tokenizer = get_tokenizer(reading.tokenizer)
    encode, start = tokenizer.encode, tokenizer.start
    for article in articles(_text(reading.path)):
        ids = encode(prepare(article))
        # Without an id to start from, an article's first id is not predicted.
        first, ids = (ids[0], ids[1:]) if start is None else (start, ids)
        # Words and bytes are those of the text before detokenizing, whatever is scored.
        words, size = len(re.split(r"\s+", article)), len(article.encode())
        yield Example(list(rolling_windows(ids, first, reading.context_length)), (words, size, len(ids)))


def articles(text: str) -> Iterator[str]:
    """WikiText's articles: each starts with a line such as `= Title =`."""
    lines: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "".join(lines).strip():
                yield "\n".join(lines)
            lines = []
        lines.append(line)
    if "".join(lines).strip():
        yield "\n".join(lines)


def _without_brackets(text: str) -> str:
    """A text of HellaSwag without WikiHow's mark-up."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _endings(record: dict[str, Any]) -> tuple[list[str], int]:
    endings, label = record.get("endings"), record.get("label")
    if not isinstance(endings, list) or not endings or not all(isinstance(e, str) and e.strip() for e in endings):
        raise DataError(f"{record['where']}: 'endings' must be a list of texts, not {short_repr(endings)}")
    if isinstance(label, str) and label.isdecimal():  # as in the data set on the hub
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise DataError(
            f"{record['where']}: 'label' must be from 0 to {len(endings) - 1}, not {short_repr(label)}: the test set "
            "has no labels, so use the validation set"
        )
    return endings, label


def _text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _records(path: Path, fields: dict[str, type]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, checked to have these fields; each also has "where", its place for messages."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {first_line(error)}") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, not {short_repr(record)}")
        for name, kind in fields.items():
            if not isinstance(record.get(name), kind):
                raise DataError(f"{where}: {name!r} must be a text, not {short_repr(record.get(name))}")
        yield {**record, "where": where}


# What llm.c's file of HellaSwag begins with, and each example in it.
_LLMC, _LLMC_EXAMPLE = 20240522, 65535


def _llmc_examples(reading: Reading) -> Iterator[Example]:
    """The examples of llm.c's hellaswag_val.bin, whose ids are GPT-2's.

    After a header of 256 int32 (magic, version 1, examples, bytes of the longest), an example is, in uint16: 65535,
    its bytes, its number, the right choice, the number of choices, the context and each choice; of these last, the
    length comes first.
    """
    path = reading.path
    if reading.tokenizer != "gpt2":
        raise DataError(f"{path}: holds ids of the tokenizer 'gpt2', but the model has {reading.tokenizer!r}")
    data = path.read_bytes()
    if len(data) < 1024 or len(data) % 2 or int.from_bytes(data[4:8], "little") != 1:
        raise DataError(f"{path}: damaged: not llm.c's file of version 1")
    values, at = np.frombuffer(data, "<u2", offset=1024), 0

    def take(count: int) -> list[int]:
        nonlocal at
        if count < 0 or at + count > len(values):
            raise DataError(f"{path}: damaged: it ends within example {number} of {examples}")
        at += count
        return values[at - count : at].tolist()

    number, examples = 0, int.from_bytes(data[8:12], "little")
    for number in range(examples):
        mark, _, _, label, choices = take(5)
        if mark != _LLMC_EXAMPLE or not 0 <= label < choices:
            raise DataError(f"{path}: damaged: no example {number} where it should begin")
        context, *endings = (take(take(1)[0]) for _ in range(1 + choices))
        yield Example([(context, ending) for ending in endings], (label, [len(ending) for ending in endings]))
    if at != len(values):
        raise DataError(f"{path}: damaged: {2 * (len(values) - at)} bytes after its {examples} examples")
