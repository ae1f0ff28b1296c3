"""Reads TOML and JSON files that users write, limited in size, and values typed on the command line; writes JSON."""

from __future__ import annotations

import collections
import json
import tomllib
from pathlib import Path
from typing import Any

from jaxgpt.checks import first_line, short_repr
from jaxgpt.errors import ConfigError
from jaxgpt.files import decode_text, local

# Bytes. Parsed, JSON takes about 20 times as much memory.
_JSON_LIMIT, _TOML_LIMIT = 2**24, 2**16
# Most dots in a line of TOML: a key of n parts (a.b.c has three) costs `tomllib` O(n^2) time and memory.
_TOML_DOTS = 256


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parses a TOML file; if it is missing or malformed, raises a ConfigError that names it."""
    try:
        text = read_text(path, _TOML_LIMIT)
        if max(line.count(".") for line in text.split("\n")) > _TOML_DOTS:
            raise ValueError(f"a line has more than {_TOML_DOTS} dots")
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {first_line(error)}") from None


def read_json(path: str | Path, limit: int = _JSON_LIMIT) -> Any:
    """Parses a JSON file of at most `limit` bytes; if it is missing or malformed, raises a ConfigError naming it."""
    try:
        return _parsed(read_text(path, limit))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {first_line(error)}") from None


def parse_json(name: Any, data: bytes) -> Any:
    """Parses the content of a JSON file; if it is malformed, raises a ConfigError naming it."""
    try:
        return _parsed(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: cannot be read as JSON: {first_line(error)}") from None


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=without_duplicates)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; raises ValueError for a key given twice, of which `json` takes the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {short_repr(key)} appears twice")
    return result


def read_text(path: str | Path, limit: int) -> str:
    """The text of a UTF-8 file of at most `limit` bytes; raises OSError, or a ValueError that says what it is."""
    path = local(path)
    if path.exists() and not path.is_file():  # opening a pipe could block forever
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        # Python allocates at once what a read may return; 2^16 for files whose size the system does not know.
        data = file.read(min(limit, max(path.stat().st_size, 2**16)) + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return decode_text(data)


def parse_value(text: str) -> Any:
    """Parses a value typed on the command line, as JSON or else as a plain string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a bare word is a string: --set optimizer=muon
