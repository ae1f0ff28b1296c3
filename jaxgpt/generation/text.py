"""Text in, text out: the tokenizer around `jaxgpt.generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt.checks import short_repr, whole_number
from jaxgpt.config import GPTConfig
from jaxgpt.generation.beams import beam_search
from jaxgpt.generation.session import CHUNK, Generation, watched
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
    stop: str | Sequence[str] | None = None,
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
        stop: one or more strings; a text ends right before the first that is complete in it. They may cross tokens, and
            the prompt does not count.
        stop_ids: as in `generate`; default: those of the tokenizer, as a rule end-of-text.
        num_beams: above 1, `beam_search` with so many beams, which knows no stop strings.
        options: passed on to `generate`: the sampler, or the same in words (`temperature=0.8, seed=0`); or to
            `beam_search`.

    Returns:
        Each prompt with its continuation, or with each of its `num_return_sequences`, without the stop token or string.
        An id that the tokenizer does not have, because the model's vocabulary is larger, is shown as `<|50258|>`.

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
    stop = check_stop(stop)
    if whole_number("num_beams", num_beams, 1) > 1:
        if stop:
            raise ValueError("stop and num_beams exclude each other: a search ends at stop_ids alone")
        found = beam_search(model, params, rows, max_new_tokens, num_beams=num_beams, stop_ids=stop_ids, **options)
        new = [decode_new(model.config, ids, stop_ids) for ids in found.new_tokens]
    else:
        chunk = STREAM_CHUNK if stop else CHUNK  # few tokens are drawn past a stop string
        run = Generation(model, params, rows, max_new_tokens, stop_ids=stop_ids, chunk=chunk, **options)
        new = completions(run, stop)
    return [texts[i * len(texts) // len(new)] + completion for i, completion in enumerate(new)]


def stream(
    model: GPT,
    params: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int,
    *,
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[str]:
    """The text that `generate` would add to one prompt, in pieces as it is drawn.

    A piece never ends inside a character: bytes of an incomplete one wait for the next token. Nor does it hold the
    beginning of a stop string: that waits too.

    Args:
        model: the model; `model.config.tokenizer` names the tokenizer.
        params: its parameters.
        prompt: text, or ids. An empty text starts from end-of-text.
        max_new_tokens: maximum ids to draw.
        stop: as in `generate_text`.
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
    stop = check_stop(stop)
    run = Generation(model, params, [ids], max_new_tokens, stop_ids=stop_ids, chunk=STREAM_CHUNK, **options)
    if len(run.prompts) > 1:
        raise ValueError("num_return_sequences must be 1 for a stream, which gives one text: call it once per text")
    return text_pieces(run, stop)


def text_pieces(run: Generation, stop: Sequence[str] = ()) -> Iterator[str]:
    """The new text of a generation with one row, as it is drawn."""
    for (piece,) in _pieces(run, run, stop):
        if piece:
            yield piece


def completions(run: Generation, stop: Sequence[str] = ()) -> list[str]:
    """The new text of every row of a generation, which is run to its end."""
    rows = zip(*_pieces(run, watched(run), stop), strict=True)
    return ["".join(pieces) for pieces in rows] or [""] * len(run.prompts)


def _pieces(run: Generation, drawn: Iterable[list[np.ndarray]], stop: Sequence[str]) -> Iterator[list[str]]:
    """The new text of each row, as it is drawn; nothing if none is to be drawn."""
    rows: list[_RowText] = []
    for new in drawn:
        rows = rows or [_RowText(run, r, stop) for r in range(len(new))]
        yield [row.feed(ids) for row, ids in zip(rows, new, strict=True)]
    if rows:
        yield [row.finish() for row in rows]


class _RowText:
    """The text of one row of a generation, which it ends at a stop string."""

    def __init__(self, run: Generation, r: int, stop: Sequence[str]):
        self._run, self._r = run, r
        self._decoder = StreamDecoder(get_tokenizer(run.model.config.tokenizer))
        self._stop = StopStrings(stop)
        self._read = 0  # ids

    def feed(self, ids: np.ndarray) -> str:
        """The text that these ids complete, as far as it is certain to belong to the row."""
        ids_N = _without_stop(ids, self._run.stop_ids)
        if not self._stop.strings:
            return self._decoder.feed(ids_N)
        return "".join(self._until_stop(self._decoder.feed([i]), 1) for i in ids_N)

    def finish(self) -> str:
        """What was held back."""
        return self._until_stop(self._decoder.finish(), 0) + self._stop.finish()

    def _until_stop(self, piece: str, ids: int) -> str:
        if self._stop.found:
            return ""
        self._read += ids
        shown = self._stop.feed(piece)
        if self._stop.found:
            self._run.end_row(self._r, self._read)
        return shown


class StopStrings:
    """Cuts a text that arrives in pieces right before a stop string: the first that is complete, and of several that
    end together the longest. The result does not depend on the pieces.

    Attributes:
        strings: the stop strings.
        found: whether one was found, after which nothing more of the text counts.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings, self.found, self._held = strings, False, ""

    def feed(self, piece: str) -> str:
        """The text that may be shown, without what may turn out to begin a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(text.index(string) + len(string), -len(string)) for string in self.strings if string in text]
        if ends:
            self.found, self._held = True, ""
            return text[: sum(min(ends))]
        begun = (n for string in self.strings for n in range(1, len(string)) if text.endswith(string[:n]))
        shown = len(text) - max(begun, default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def check_stop(stop: Any) -> tuple[str, ...]:
    """The stop strings: none, one or several.

    Raises:
        TypeError: for anything but strings.
        ValueError: for an empty string.
    """
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            raise TypeError(f"stop must be a text or a list of texts, not {short_repr(string)} (stop_ids takes ids)")
        if not string:
            raise ValueError(f"stop[{i}] is empty: every text would end before it begins")
    return strings


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
