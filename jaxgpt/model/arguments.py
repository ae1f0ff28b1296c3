"""Checks of the two arguments that almost every function takes: a model and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.model.gpt import GPT


def check_model(call: str, model: Any, params: Any) -> None:
    """Raises a TypeError that shows the right call unless these are a `GPT` and a tree of its parameters.

    Args:
        call: how the caller is called, such as "generate(model, params, prompts, max_new_tokens)".
        model, params: what it was given.
    """
    if not isinstance(model, GPT):
        if isinstance(params, GPT):
            raise TypeError(f"the model comes first and its parameters second: {call}")
        if isinstance(model, tuple) and any(isinstance(part, GPT) for part in model):
            raise TypeError(f"got a model and its parameters as one argument: unpack them, model, params = ...; {call}")
        raise TypeError(
            f"model must be a jaxgpt.GPT, not {_name(model)}: {call}, with model, params = jaxgpt.load(...)"
        )
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be the model's parameters, a dict of arrays, not {_name(params)}: {call}")
    if "tok_emb" not in params:
        if "params" in params:
            raise TypeError(
                f"params holds the parameters one level down, as model.init returns them: pass params['params']; {call}"
            )
        found = ", ".join(map(short_repr, list(params)[:5])) or "nothing"
        raise TypeError(
            f"params must be the model's parameters, with 'tok_emb' and so on, but it holds {found}: {call}"
        )


def _name(value: Any) -> str:
    return short_repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
