"""Text in, text out: the tokenizer around `jaxgpt.generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt.checks import short_repr, whole_number
from jaxgpt.config import GPTConfig
from jaxgpt.generation.beams import beam_search
from jaxgpt.generation.session import Generation, GenerationResult, generate
from jaxgpt.model import GPT, check_model
from jaxgpt.tokenizer import StreamDecoder, get_tokenizer

# Few tokens, so that text appears as it is drawn; more than one, so that the host costs little time.
STREAM_CHUNK = 4


def generate_text(
    model: GPT,
    params: Any,
    prompts: str | Sequence[str],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] | None = None,
    num_beams: int = 1,
    **options: Any,
) -> list[str]:
    """`generate`, or `beam_search`, from text to text, with the model's tokenizer.

    Args:
        model: the model; `model.config.tokenizer` names the tokenizer.
        params: its parameters.
        prompts: one text or several. An empty one starts from end-of-text, or what the tokenizer starts from.
        max_new_tokens: maximum ids to add per text.
        stop_ids: as in `generate`; default: those of the tokenizer, as a rule end-of-text.
        num_beams: above 1, `beam_search` with so many beams.
        options: passed on to `generate`, or to `beam_search`.

    Returns:
        Each prompt with its continuation, or with each of its `num_return_sequences`, without the stop token. An id
        that the tokenizer does not have, because the model's vocabulary is larger, is shown as `<|50258|>`.

    Raises:
        ValueError, FloatingPointError: as `generate` does; also for a text with tokens that the model does not have.
        DataError, MissingExtraError: if the tokenizer cannot encode a text.
    """
    check_model("generate_text(model, params, prompts, max_new_tokens)", model, params)
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else [prompts]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(
                f"prompts must be one text or a list of texts, not {short_repr(text)} (jaxgpt.generate takes ids)"
            )
    stop_ids = default_stop_ids(model.config) if stop_ids is None else stop_ids
    rows = [encode_prompt(model.config, text) for text in texts]
    run: Callable[..., GenerationResult] = generate
    if whole_number("num_beams", num_beams, 1) > 1:
        run = functools.partial(beam_search, num_beams=num_beams)
    result = run(model, params, rows, max_new_tokens, stop_ids=stop_ids, **options)
    texts = [text for text in texts for _ in range(len(result.tokens) // len(rows))]
    return [text + decode_new(model.config, new, stop_ids) for text, new in zip(texts, result.new_tokens, strict=True)]


def stream(
    model: GPT,
    params: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[str]:
    """The text that `generate` would add to one prompt, in pieces as it is drawn.

    A piece never ends inside a character: bytes of an incomplete one wait for the next token.

    Args:
        model: the model; `model.config.tokenizer` names the tokenizer.
        params: its parameters.
        prompt: text, or ids. An empty text starts from end-of-text.
        max_new_tokens: maximum ids to draw.
        stop_ids: as in `generate`; default: those of the tokenizer, as a rule end-of-text. A stop id itself gives no
            text.
        options: passed on to `generate`.

    Raises:
        ValueError, FloatingPointError: as `generate_text` does; for bad arguments at the call, before the first piece.
    """
    check_model("stream(model, params, prompt, max_new_tokens)", model, params)
    if not isinstance(prompt, str) and any(isinstance(part, str) for part in prompt):
        raise TypeError("stream continues one prompt, a text or a list of ids: call it once per text")
    ids = encode_prompt(model.config, prompt) if isinstance(prompt, str) else prompt
    stop_ids = default_stop_ids(model.config) if stop_ids is None else stop_ids
    run = Generation(model, params, [ids], max_new_tokens, stop_ids=stop_ids, chunk=STREAM_CHUNK, **options)
    if len(run.prompts) > 1:
        raise ValueError("num_return_sequences must be 1 for a stream, which gives one text: call it once per text")
    return text_pieces(run)


def text_pieces(run: Generation) -> Iterator[str]:
    """The new text of a generation with one row, as it is drawn."""
    decoder = StreamDecoder(get_tokenizer(run.model.config.tokenizer))
    for (new,) in run:
        if piece := decoder.feed(_without_stop(new, run.stop_ids)):
            yield piece
    if piece := decoder.finish():
        yield piece


def encode_prompt(config: GPTConfig, text: str) -> list[int]:
    """A prompt's ids; an empty text is one end-of-text (or the id that the tokenizer starts from), because a model must
    read something.

    Raises:
        ValueError: if the model's vocabulary is smaller than its tokenizer's and lacks one of them; names it. If the
            text is empty, and the tokenizer has no id to start from.
        DataError, MissingExtraError: if the tokenizer cannot encode the text.
    """
    tokenizer = get_tokenizer(config.tokenizer)
    ids = tokenizer.encode(text)
    if not ids:
        if tokenizer.start is None:
            raise ValueError(
                f"the prompt {short_repr(text)} has no tokens, and tokenizer {config.tokenizer!r} has none to start "
                "from: give another text, or ids"
            )
        ids = [tokenizer.start]
    if max(ids) >= config.vocab_size:
        lacking = next(i for i in ids if i >= config.vocab_size)
        raise ValueError(
            f"the prompt {short_repr(text)} {'has' if text else 'starts from'} the token "
            f"{tokenizer.decode([lacking])!r}, id {lacking} of tokenizer {config.tokenizer!r}, but the model's ids end "
            f"at {config.vocab_size - 1}: give another text, or the ids themselves"
        )
    return ids


def default_stop_ids(config: GPTConfig) -> tuple[int, ...]:
    """End-of-text, and what else the tokenizer's files let a text end with, without ids that the model lacks."""
    return tuple(i for i in get_tokenizer(config.tokenizer).stop_ids if i < config.vocab_size)


def decode_new(config: GPTConfig, ids: Sequence[int] | np.ndarray, stop_ids: Sequence[int]) -> str:
    """The text of drawn ids, without a stop id at their end; with placeholders, because a model may draw ids that its
    tokenizer does not have."""
    return get_tokenizer(config.tokenizer).decode(_without_stop(ids, stop_ids), placeholders=True)


def _without_stop(ids: Sequence[int] | np.ndarray, stop_ids: Sequence[int]) -> list[int]:
    ids = [int(i) for i in ids]
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
