"""Text files that users write: TOML and JSON, read with limits, and values typed on the command line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from jaxgpt.checks import first_line
from jaxgpt.errors import ConfigError

# Bytes. Parsed, JSON takes some twenty times as much memory.
_JSON_LIMIT, _TOML_LIMIT = 2**24, 2**16
# In a line of TOML: for a key of n parts (a.b.c has three) `tomllib` needs time and memory in proportion to n squared.
_TOML_DOTS = 256


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parses a TOML file; a missing or malformed one is a ConfigError that names it."""
    try:
        text = _read_text(path, _TOML_LIMIT)
        if max(line.count(".") for line in text.split("\n")) > _TOML_DOTS:
            raise ValueError(f"a line has more than {_TOML_DOTS} dots")
        return tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {first_line(error)}") from None


def read_json(path: str | Path) -> Any:
    """Parses a JSON file; a missing or malformed one is a ConfigError that names it."""
    try:
        return json.loads(_read_text(path, _JSON_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {first_line(error)}") from None


def _read_text(path: str | Path, limit: int) -> str:
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a pipe could wait for ever
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return data.decode("utf-8")


def parse_value(text: str) -> Any:
    """A value as typed on the command line: JSON, or else a plain string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a bare word is a string: --set optimizer=muon
