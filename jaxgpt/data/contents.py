"""What is taken from a record of JSON or Parquet: the text under a key, or a prompt and the response to it.

| records with | are read as | of which is learned |
|---|---|---|
| `prompt` and `response` | `{prompt}{response}` | the response |
| `messages`, of a chat | `### {role}:\\n{content}`, a blank line between turns | what `assistant` says |
| `text` | a text | everything |

The first two are templates; the setting `template` of a run may be another. See `Template`.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from jaxgpt.checks import short_repr
from jaxgpt.errors import ConfigError, DataError

# Where a record has its text, if nothing else is said.
TEXT_KEY = "text"
# Characters that a text of a record may have.
LIMIT = 2**25
# What {response} stands for: the first of these keys that a record has.
RESPONSES = ("response", "output", "completion")
# Where a record has its turns, and whose turns are learned.
TURNS, ASSISTANT = "messages", "assistant"
PROMPT_AND_RESPONSE, CHAT = "{prompt}{response}", "### {role}:\n{content}"
# Between paragraphs of a template, and between turns.
_BLANK_LINE = "\n\n"

_BLOCK = 2**20


class BadRecordError(DataError):
    """A record that is left out if that was asked."""


class Content(Protocol):
    """What is taken from a record.

    Attributes:
        keys: what may be read of it.
        hint: what to do about a key that it lacks.
        whole: whether each of its `parts` is a text; otherwise they are one, in blocks.
    """

    @property
    def keys(self) -> Collection[str]: ...
    @property
    def hint(self) -> str: ...
    @property
    def whole(self) -> bool: ...

    def missing(self, keys: Collection[str]) -> str | None:
        """A key that is needed and is not among these."""

    def parts(self, record: Mapping[str, Any]) -> Iterable[str]:
        """Its texts.

        Raises:
            BadRecordError: if it does not have them.
        """


class Nothing:
    """The content of a file of which only the keys are asked for."""

    keys, hint, whole = (), "", True

    def missing(self, keys: Collection[str]) -> str | None:
        return None

    def parts(self, record: Mapping[str, Any]) -> Iterable[str]:
        return ("",)


@dataclasses.dataclass(frozen=True)
class UnderKey:
    """The text under a key."""

    key: str
    hint = "--text-key says where the text is, and a template how a prompt and a response are made of several keys"
    whole = False

    @property
    def keys(self) -> Collection[str]:
        return (self.key,)

    def missing(self, keys: Collection[str]) -> str | None:
        return None if self.key in keys else self.key

    def parts(self, record: Mapping[str, Any]) -> Iterable[str]:
        text = _text(record, self.key)
        return (text[i : i + _BLOCK] for i in range(0, len(text), _BLOCK))


class Template:
    """Makes of a record what is read and what is learned, in turns: `parts` is a prompt, its response, and, of a chat,
    what is read next, and so on.

    It is a format string that ends in what is learned, because end-of-text follows. Either it ends in `{response}`, and
    names any other keys of the record; a paragraph whose fields are all empty is left out, such as the last but one of
    the book's chapter 7, where a record has no input:

        ### Instruction:
        {instruction}

        ### Input:
        {input}

        ### Response:
        {response}

    Or it ends in `{content}`, has `{role}`, and stands for one turn of a chat. A blank line comes between turns, and
    end-of-text after each that is learned. What follows the last of these is left out.

    Args:
        text: the format string. `{{` and `}}` are braces.

    Raises:
        ConfigError: if it is none, or does not end in one `{response}` or `{content}`.
    """

    hint = "the template names it"
    whole = True

    def __init__(self, text: str):
        self.text = text
        self._paragraphs = [(paragraph, _fields(paragraph, text)) for paragraph in text.split(_BLANK_LINE)]
        fields = [field for _, names in self._paragraphs for field in names]
        learned = next((name for name in ("response", "content") if text.endswith(f"{{{name}}}")), None)
        if learned is None or fields[-1:] != [learned] or fields.count(learned) > 1:
            raise ConfigError(
                f"template {short_repr(text)} must end in {{response}}, which is learned, and have it once, such as "
                "'{prompt}{response}'; or, for the turns of a chat, in {content}"
            )
        self._chat = learned == "content"
        if self._chat and set(fields) != {"role", "content"}:
            raise ConfigError(f"template {short_repr(text)} of a chat's turn must name {{role}} and {{content}} alone")
        self._needed = (TURNS,) if self._chat else tuple(dict.fromkeys(fields[:-1]))

    @property
    def keys(self) -> Collection[str]:
        return self._needed if self._chat else (*self._needed, *RESPONSES)

    def missing(self, keys: Collection[str]) -> str | None:
        needed = [key for key in self._needed if key not in keys]
        response = [] if self._chat or any(key in keys for key in RESPONSES) else ["response"]
        return next(iter(needed + response), None)

    def parts(self, record: Mapping[str, Any]) -> Iterable[str]:
        return self._turns(record[TURNS]) if self._chat else self._prompt_and_response(record)

    def _prompt_and_response(self, record: Mapping[str, Any]) -> Iterable[str]:
        response = next(key for key in RESPONSES if key in record)
        learned = _learned(_text(record, response), response)
        values = {key: _text(record, key) for key in self._needed} | {"response": ""}
        kept = [
            paragraph.format_map(values)
            for paragraph, fields in self._paragraphs
            if not fields or "response" in fields or any(values[field] for field in fields)
        ]
        return _BLANK_LINE.join(kept), learned

    def _turns(self, turns: Any) -> Iterable[str]:
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise BadRecordError(f"expected a list of turns under {TURNS!r}, not {short_repr(turns)}")
        parts: list[str] = []
        read = ""
        for i, turn in enumerate(turns):
            if missing := {"role", "content"} - turn.keys():
                raise BadRecordError(f"turn {i + 1} has no key {min(missing)!r}")
            role = _text(turn, "role")
            read += _BLANK_LINE * (i > 0) + self.text.format_map({"role": role, "content": ""})
            if role == ASSISTANT:
                parts += [read, _learned(_said(turn), "content")]
                read = ""
            else:
                read += _said(turn)
        if not parts:
            raise BadRecordError(f"no turn of the role {ASSISTANT!r}, so nothing to learn")
        return parts


def recognise(keys: Collection[str]) -> str:
    """The template for records with these keys, by default; "" if they are texts."""
    if TEXT_KEY in keys:
        return ""
    if TURNS in keys:
        return CHAT
    return PROMPT_AND_RESPONSE if "prompt" in keys else ""  # without a response it is a bad record, but one of these


def _fields(paragraph: str, template: str) -> list[str]:
    """The names in braces.

    Raises:
        ConfigError: unless they are plain names of keys.
    """
    try:
        parsed = [part[1:] for part in string.Formatter().parse(paragraph) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"template {short_repr(template)} is not a format string: {error}") from None
    for field, specification, conversion in parsed:
        if not field or field.isdigit() or set(field) & set(".[") or specification or conversion:
            raise ConfigError(f"template {short_repr(template)} must name keys in braces, such as {{prompt}}")
    return [str(field) for field, _, _ in parsed]


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(text := record[key], str):
        raise BadRecordError(f"expected a text under {key!r}, not {short_repr(text)}")
    if len(text) > LIMIT:
        raise BadRecordError(f"longer than {LIMIT:,} characters, the most that a record may have")
    return text


def _said(turn: Mapping[str, Any]) -> str:
    """What is said in a turn: a text or, as OpenAI's format also has it, a list of parts, each of which has one."""
    if not isinstance(parts := turn["content"], list):
        return _text(turn, "content")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRecordError(f"expected parts of the type 'text' under 'content', not {short_repr(part)}")
    return _text({"content": "".join(part["text"] for part in parts)}, "content")


def _learned(text: str, key: str) -> str:
    if not text:
        raise BadRecordError(f"the response, under {key!r}, is empty")
    return text
