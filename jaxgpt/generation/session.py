"""Text generation: checks on the host, shape buckets, and one loop over `jaxgpt.generation.decode`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt import notebook
from jaxgpt.accounting import cache_bytes
from jaxgpt.checks import brief, check_ids, short_repr, whole_number
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.generation import decode
from jaxgpt.generation.history import History
from jaxgpt.generation.logprobs import Logprobs
from jaxgpt.generation.lookup import Lookup
from jaxgpt.generation.options import SAMPLING, chosen_sampler
from jaxgpt.generation.preparation import prepare
from jaxgpt.generation.prompts import (
    check_key,
    check_num_return_sequences,
    check_prompts,
    check_sampler,
    refuse_unknown,
)
from jaxgpt.generation.sampling import Sampler
from jaxgpt.model import GPT, RecentTokens, check_model
from jaxgpt.parallel import check_bytes, sharding, to_device

# Shapes are rounded up to powers of two, at least these, so that lengths in one bucket share a compilation.
PROMPT_BUCKET = 16
CACHE_BUCKET = 64
# New tokens that the first cache has room for. When it is full it grows to four times its slots, so that a short
# answer does not pay for the longest one allowed.
FIRST_NEW_TOKENS = 192
# Tokens drawn before the host reads the result.
CHUNK = 32


@brief
@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What `generate` returns.

    Attributes:
        tokens: one int32 array per row: the prompt, then the new ids, ending with the stop id if one was drawn.
        prompt_lengths: ids in each row's prompt.
        seconds: time taken, compilation included.
        tokens_per_second: ids drawn per second over all rows, measured where nothing was compiled; `None` if the text
            is too short to measure.
        finish_reasons: per row, "stop" if a stop id or a stop string ended it, otherwise "length".
        logprobs: per row, the log-probabilities that the model gave its new ids and the likeliest ones, if asked for.
        sampler_logprobs: the same after the sampler's controls and filters, from which the ids were drawn.
        looked_up: how many of the ids drawn `lookup` had guessed, which took no reading of the weights of their own;
            those past a stop string count too.
    """

    tokens: list[np.ndarray]
    prompt_lengths: list[int]
    seconds: float
    tokens_per_second: float | None
    finish_reasons: list[str]
    logprobs: list[Logprobs] | None = None
    sampler_logprobs: list[Logprobs] | None = None
    looked_up: int = 0

    @property
    def new_tokens(self) -> list[np.ndarray]:
        """The rows without their prompts."""
        return [row[length:] for row, length in zip(self.tokens, self.prompt_lengths, strict=True)]


def generate(
    model: GPT,
    params: Any,
    prompts: Any,
    max_new_tokens: int,
    *,
    sampler: Sampler | None = None,
    key: jax.Array | int | None = None,
    seed: int | None = None,
    stop_ids: Sequence[int] = (),
    beyond_context: str = "recompute",
    cache_dtype: str | None = None,
    num_return_sequences: int = 1,
    logprobs: int | None = None,
    lookup: int | None = None,
    **options: Any,
) -> GenerationResult:
    """Continues each prompt by up to `max_new_tokens` ids.

    Each row gets the ids it would get alone, whatever the other rows are. Compiles once per model, batch size,
    structure of the sampler (its numbers do not count) and bucket of lengths (powers of two). A model with
    `scan_layers` is unstacked in every call; `prepare` it once to avoid that.

    Past the context the result is that of the reference generator: each id is drawn from the last `context_length`
    ids alone, at positions from 0. No cache can do that (see `RecentTokens` in `model/cache.py`), so from there on
    every token costs a forward pass over the whole context.

    Args:
        model: the model.
        params: its parameters; not modified, not donated.
        prompts: integers [B, T], or a list of lists of ids, of any lengths.
        max_new_tokens: maximum ids to add per row; 0 returns the prompts.
        sampler: how ids are drawn (`jaxgpt.generation.sampling`); default `Greedy()`.
        key: for a random sampler: one key, from which row b uses fold_in(key, b), or an array with one key per
            row of the result. The n-th new id of a row uses fold_in(row's key, n). Keys of every implementation will
            do, and an int is the key of that seed.
        seed: an int, instead of `key`.
        stop_ids: a row that draws one of these ends with it.
        beyond_context: "recompute", or "error" to refuse prompts that could grow past the context.
        cache_dtype: dtype of the key/value cache, "float32", "bfloat16" or "int8" (with a scale per token and head);
            default: the model's compute type, but float32 on a CPU.
        num_return_sequences: rows of the result per prompt, next to each other: what the prompts would give if each
            were repeated as often, but each is read only once.
        logprobs: report the log-probability of each new id, and of so many likeliest ones, before and after the
            sampler; None for none, which costs nothing.
        lookup: for one row, with the kernel of `jaxgpt build-kernel`: the most ids to read at once, from 2 to 32; None
            for one at a time. The same ids result, sooner where the text repeats itself or its prompt: ids that
            followed the same words before are guessed, and several guesses are checked in one reading of the weights
            (`jaxgpt.generation.lookup`). Past the context, every token is drawn alone.
        options: the sampler in words, instead of `sampler`: `temperature`, `top_k`, `top_p`, `min_p`,
            `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `no_repeat_ngram_size`, `logit_bias`,
            `bad_words_ids`, `min_new_tokens` (see `from_options`). Other libraries' options are refused, with what to
            use instead.

    Raises:
        TypeError: for arguments of the wrong type, with the right call.
        ValueError: for ids that are not integers or not in the vocabulary, naming the first and its place; for an
            empty prompt; for arguments out of range; for a random sampler without a key; for several rows per prompt
            without one.
        FloatingPointError: if logits are NaN or infinite, naming the row and the step.
        KernelError: for `lookup` without the kernel.
        OutOfMemoryError: if the key/value cache alone needs more memory than there is.
    """
    run = Generation(
        model,
        params,
        prompts,
        max_new_tokens,
        sampler=sampler,
        key=key,
        seed=seed,
        stop_ids=stop_ids,
        beyond_context=beyond_context,
        cache_dtype=cache_dtype,
        num_return_sequences=num_return_sequences,
        logprobs=logprobs,
        lookup=lookup,
        **options,
    )
    for _ in watched(run):
        pass
    return run.result()


def watched(run: Generation) -> Iterator[list[np.ndarray]]:
    """Iterates over a generation that is to be run to its end. In a notebook, a long one has a bar."""
    with notebook.bar("tokens") as show:
        drawn = 0
        for new in run:
            drawn += max(map(len, new))
            show(drawn, run.max_new_tokens)
            yield new


class Generation:
    """One generation, checked on construction. Iterating draws ids and yields each row's new ones as a list of arrays.

    The arguments are `generate`'s; `chunk` is the number of tokens drawn between two yields.
    """

    def __init__(
        self,
        model: GPT,
        params: Any,
        prompts: Any,
        max_new_tokens: int,
        *,
        sampler: Sampler | None = None,
        key: jax.Array | int | None = None,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        beyond_context: str = "recompute",
        cache_dtype: str | None = None,
        num_return_sequences: int = 1,
        logprobs: int | None = None,
        lookup: int | None = None,
        chunk: int = CHUNK,
        **options: Any,
    ):
        sampler = chosen_sampler(sampler, {name: options.pop(name) for name in SAMPLING if name in options})
        refuse_unknown(options)
        if seed is not None and key is not None:
            raise TypeError("key and seed exclude each other: seed=0 is key=jax.random.key(0)")
        key = seed if key is None else key
        check_model("generate(model, params, prompts, max_new_tokens)", model, params)
        model, params = prepare(model, params)
        config = model.config
        self.model, self.params, self.sampler = model, params, check_sampler(sampler, config.vocab_size)
        self.cache_dtype, self.chunk = cache_dtype, min(chunk, CHUNK)
        self.max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        self.copies = check_num_return_sequences(num_return_sequences, self.sampler)
        self.prompts = [row for row in check_prompts(prompts, config.vocab_size) for _ in range(self.copies)]
        if not isinstance(stop_ids, Iterable):
            raise ValueError(f"stop_ids must be a list of ids, not {short_repr(stop_ids)}")
        self.stop_ids = tuple(check_ids(list(stop_ids), "stop_ids", config.vocab_size).tolist())
        if beyond_context not in ("recompute", "error"):
            raise ValueError(f'beyond_context must be "recompute" or "error", not {short_repr(beyond_context)}')
        if cache_dtype not in (None, *PARAM_DTYPES):
            raise ValueError(
                f'cache_dtype must be "float32", "bfloat16", "int8" or None, not {short_repr(cache_dtype)}'
            )
        self.logprobs = None if logprobs is None else whole_number("logprobs", logprobs)
        if self.logprobs is not None and self.logprobs > config.vocab_size:
            raise ValueError(f"logprobs must be at most the vocabulary's {config.vocab_size} ids, not {self.logprobs}")
        self.lookup = None if lookup is None else Lookup(lookup, model, params, len(self.prompts))
        longest = max(map(len, self.prompts))
        if beyond_context == "error" and longest + self.max_new_tokens > config.context_length:
            raise ValueError(
                f"a prompt of {longest} ids and max_new_tokens={self.max_new_tokens} exceed "
                f"context_length={config.context_length}"
            )
        self.key = check_key(self.sampler, key, len(self.prompts)) if self.sampler.draws else None
        self.drawn: list[list[np.ndarray]] = [[] for _ in self.prompts]
        self._scored: list[tuple[Logprobs, Logprobs]] = []  # [B, N] of each piece of work
        self._told = False  # of a row's end
        self._timings: list[_Timing] = []

    def result(self) -> GenerationResult:
        """What has been drawn so far."""
        # The first timing of each kind of work may include its compilation.
        seen, steps, seconds = set(), 0, 0.0
        for timing in self._timings:
            if timing.work in seen:
                steps, seconds = steps + timing.steps, seconds + timing.seconds
            seen.add(timing.work)
        return GenerationResult(
            tokens=self._rows(),
            prompt_lengths=[len(row) for row in self.prompts],
            seconds=sum(timing.seconds for timing in self._timings),
            tokens_per_second=len(self.prompts) * steps / seconds if steps else None,
            finish_reasons=["stop" if self._has_ended(r) else "length" for r in range(len(self.prompts))],
            logprobs=self._logprobs(0),
            sampler_logprobs=self._logprobs(1),
            looked_up=self.lookup.accepted if self.lookup else 0,
        )

    def end_row(self, r: int, length: int) -> None:
        """Ends row r after its first `length` new ids, as a stop id does: for rules that ids alone do not tell."""
        kept = np.concatenate(self.drawn[r])[:length]
        self.drawn[r] = [kept, kept[:0]]
        self._told = True

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        if self.max_new_tokens == 0:
            return
        C = self.model.config.context_length
        longest = min(C, max(map(len, self.prompts)))
        # Reading the prompt draws one id, and each slot that is still free allows one more.
        cached = min(self.max_new_tokens, C - longest + 1)
        started = time.perf_counter()
        slots = self._slots(longest + min(cached - 1, FIRST_NEW_TOKENS))
        state = self._prefill(longest, slots)
        first = jax.tree.map(lambda x_B: x_B[:, None], (state.token_B, state.logprobs))
        yield self._accept(state, first, _Timing("prefill", 1, started))
        drawn = 1
        while drawn < self.max_new_tokens and not all(ended := [self._has_ended(r) for r in range(len(self.prompts))]):
            if self._told:  # the device does not know of stop strings
                state = dataclasses.replace(state, done_B=to_device(np.array(ended), self.params))
                self._told = False
            started = time.perf_counter()
            if drawn == cached:
                state = dataclasses.replace(state, memory=self._recent_tokens())
            work, end = ("cached", cached) if drawn < cached else ("recomputed", self.max_new_tokens)
            steps = min(self.chunk, end - drawn)
            if work == "cached" and longest + drawn + steps - 1 > slots:
                slots = self._slots(min(4 * slots, longest + cached - 1))
                state = decode.grow(state, slots)
            arguments = self.model, self.params, state, to_device(np.int32(steps), self.params)
            options: dict[str, Any] = {"chunk": CHUNK, "sampler": to_device(self.sampler, self.params)}
            if self.lookup and work == "cached":
                state, new = self.lookup.decode_tokens(
                    *arguments, to_device(np.int32(end - drawn), self.params), **options
                )
            else:
                state, new = decode.decode_tokens(*arguments, **options)
            before, drawn = drawn, int(jax.device_get(state.drawn))
            yield self._accept(state, new, _Timing(f"{work} {slots}", drawn - before, started))

    def _slots(self, needed: int) -> int:
        """Size of a cache with at least `needed` slots, never smaller than the padded prompts."""
        C = self.model.config.context_length
        padded = bucket(min(C, max(map(len, self.prompts))), PROMPT_BUCKET, C)
        slots, mesh = max(padded, bucket(needed, CACHE_BUCKET, C)), sharding.mesh_of(self.params)
        least = cache_bytes(self.model.config, len(self.prompts), slots, self.cache_dtype or "bfloat16")
        advice = "continue fewer prompts at once, or ask for fewer tokens"
        check_bytes(least / (mesh.size if mesh else 1), advice, self.params)
        return slots

    def _prefill(self, longest: int, slots: int) -> decode.DecodeState:
        C = self.model.config.context_length
        prompts = self.prompts[:: self.copies]
        ids_BxT = np.zeros((len(prompts), bucket(longest, PROMPT_BUCKET, C)), np.int32)
        for row, prompt in zip(ids_BxT, prompts, strict=True):
            prompt = prompt[-C:]
            row[longest - len(prompt) : longest] = prompt
        lengths_B = np.array([min(C, len(prompt)) for prompt in prompts], np.int32)
        history = None
        if self.sampler.sees_text or self.lookup:
            columns = max(map(len, self.prompts)) + self.max_new_tokens
            history = History.of(self.prompts, bucket(columns, CACHE_BUCKET, 2**31))
        arguments = (ids_BxT, lengths_B, np.int32(longest), self.key, self._padded_stop_ids())
        return decode.prefill(
            self.model,
            self.params,
            *to_device(arguments, self.params),
            slots=slots,
            sampler=to_device(self.sampler, self.params),
            cache_dtype=self.cache_dtype,
            history=to_device(history, self.params),
            logprobs=self.logprobs,
            copies=self.copies,
        )

    def _recent_tokens(self) -> RecentTokens:
        """The ids read so far: all except the last one drawn."""
        C = self.model.config.context_length
        ids_BxC = np.zeros((len(self.prompts), C), np.int32)
        lengths_B = np.zeros(len(self.prompts), np.int32)
        for r, ids in enumerate(self._rows()):
            read = ids[:-1][-C:]
            ids_BxC[r, C - len(read) :] = read
            lengths_B[r] = len(read)
        return RecentTokens(*to_device((ids_BxC, lengths_B), self.params))

    def _accept(self, state: decode.DecodeState, drawn: tuple[Any, Any], timing: _Timing) -> list[np.ndarray]:
        """Brings ids and their log-probabilities to the host, keeps them, and returns the ids that are not past a row's
        end."""
        (ids_BxN, logprobs), broken_B = jax.device_get((drawn, state.broken_B))
        timing.seconds = time.perf_counter() - timing.started
        self._timings.append(timing)
        refuse_broken(broken_B)
        if logprobs is not None:
            self._scored.append(jax.tree.map(lambda x_BxN: x_BxN[:, : timing.steps], logprobs))
        new = [self._until_stop(r, ids[: timing.steps]) for r, ids in enumerate(ids_BxN)]
        for r, ids in enumerate(new):
            self.drawn[r].append(ids)
        return new

    def _until_stop(self, r: int, ids: np.ndarray) -> np.ndarray:
        """The ids that row r gains: none if it has ended, and none after a stop id."""
        if self._has_ended(r):
            return ids[:0]
        stops = np.flatnonzero(np.isin(ids, self.stop_ids))
        return ids[: stops[0] + 1] if stops.size else ids

    def _has_ended(self, r: int) -> bool:
        """Whether a stop id, or `end_row`, has ended row r."""
        if not self.drawn[r]:
            return False
        last = self.drawn[r][-1]
        return not last.size or int(last[-1]) in self.stop_ids

    def _rows(self) -> list[np.ndarray]:
        return [np.concatenate([prompt, *new]) for prompt, new in zip(self.prompts, self.drawn, strict=True)]

    def _logprobs(self, which: int) -> list[Logprobs] | None:
        """Each row's log-probabilities: the model's, 0, or the sampler's, 1."""
        if self.logprobs is None:
            return None
        pieces = [scored[which] for scored in self._scored]
        lengths = [sum(map(len, new)) for new in self.drawn]
        return [Logprobs.row(pieces, r, N, self.logprobs) for r, N in enumerate(lengths)]

    def _padded_stop_ids(self) -> np.ndarray:
        """The stop ids, padded to a bucket with an id that is never drawn."""
        padded = np.full(bucket(len(self.stop_ids), 4, 2**31), -1, np.int32)
        padded[: len(self.stop_ids)] = self.stop_ids
        return padded


@dataclasses.dataclass
class _Timing:
    """One piece of work: what it was, the ids it drew per row, when it started and how long it took."""

    work: str
    steps: int
    started: float
    seconds: float = 0.0


def refuse_broken(broken_B: np.ndarray) -> None:
    """Raises a FloatingPointError that names the first row whose logits were not finite: where `broken_B` is not -1 but
    the number of a new token."""
    if np.any(broken_B >= 0):
        row = int(np.argmax(broken_B >= 0))
        raise FloatingPointError(
            f"the logits for new token {broken_B[row]} of prompt {row} are NaN or infinite: "
            "the parameters hold such values, or overflow"
        )


def bucket(size: int, smallest: int, largest: int) -> int:
    """`smallest` doubled until it holds `size`, at most `largest`."""
    while smallest < size:
        smallest *= 2
    return min(smallest, largest)
