"""Completion in a shell (extra: completion). When TAB is pressed, the shell starts the command with the line in its
environment, and argcomplete answers from the subcommand's parser, so that what it offers is what there is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Container, Iterable

from jaxgpt.config import PRESETS

# The environment variable that tells a process to complete the line instead of running it.
VARIABLE = "_ARGCOMPLETE"
# As `weights.BUNDLED`, which takes JAX to import.
BUNDLED = ("shakespeare",)


def subcommand(known: Container[str]) -> str | None:
    """The subcommand in the line that is to be completed, if it has got that far."""
    return next((word for word in os.environ.get("COMP_LINE", "").split() if word in known), None)


def answer(parser: argparse.ArgumentParser, subparser: argparse.ArgumentParser) -> None:
    """Tells the shell what may come next, and ends the process."""
    import argcomplete

    for action in subparser._actions:
        if names := _names(action):
            action.completer = _either(names, argcomplete.FilesCompleter())  # type: ignore[attr-defined]
        elif action.dest == "set":
            action.completer = argcomplete.ChoicesCompleter(dict.fromkeys(_keys(), ""))  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _names(action: argparse.Action) -> list[str]:
    """The names that an argument takes, besides files."""
    from jaxgpt.training import recipes

    if action.dest == "config":
        return list(recipes())
    if action.dest == "model" and not action.option_strings:  # of `jaxgpt inspect`
        return [*PRESETS, *BUNDLED]
    return list(BUNDLED) if action.dest in ("model", "src", "init_from", "against") else []


def _keys() -> Iterable[str]:
    """What may stand before the value of --set, with the =."""
    from jaxgpt.fields import settings
    from jaxgpt.training import TABLES

    yield "model.preset="
    for table, config in TABLES.items():
        prefix = "" if table == "train" else f"{table}."
        yield from (f"{prefix}{declared.name}=" for declared in settings(config))


def _either(names: list[str], files: Callable[..., Iterable[str]]) -> Callable[..., list[str]]:
    return lambda prefix, **_: [*(name for name in names if name.startswith(prefix)), *files(prefix)]
