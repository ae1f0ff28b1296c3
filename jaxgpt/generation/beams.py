"""Beam search: the likeliest continuations that a search of bounded width finds, and how likely they are.

Per prompt, N hypotheses run side by side. At every step all their extensions by one id are ranked by total
log-probability. Of the N best, those that end with a stop id are finished (at the last step all of them are), and score
total / length ** length_penalty, where the length counts the new ids, the stop id included. Of the finished ones the N
with the highest scores are kept, and the N best extensions that do not end with a stop id run on. A prompt is settled
once N are finished and no running hypothesis is expected to score more than the worst of these.

Source: the length penalty is that of Wu et al. 2016, equation 14, without its constant; everything else is as in
transformers 5, `GenerationMixin._beam_search`.

Sizes: P prompts, N beams, M new ids, R = P N rows.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jaxgpt.accounting import cache_bytes
from jaxgpt.checks import brief, did_you_mean, short_repr, whole_number
from jaxgpt.generation.options import SAMPLING
from jaxgpt.generation.sampling import REMOVED
from jaxgpt.generation.session import (
    PROMPT_BUCKET,
    Generation,
    GenerationResult,
    bucket,
    refuse_broken,
)
from jaxgpt.model import GPT, Cache, check_model, default_dtype
from jaxgpt.parallel import check_bytes, replicate, sharding, to_device

# New ids for which buffers are made: powers of two from this one on share a compilation.
NEW_BUCKET = 32
# Steps between two looks at whether all prompts are settled: on an accelerator each look waits for the device.
STEPS = 8
# The score of a place that no finished hypothesis has taken: below any score, and finite.
UNFINISHED = -3e38


@brief
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchResult(GenerationResult):
    """What `beam_search` returns: `num_return_sequences` rows per prompt, next to each other, the best first.

    Attributes:
        scores: per row, total log-probability of its new ids / number of new ids ** `length_penalty`, float32.
    """

    scores: np.ndarray


def beam_search(
    model: GPT,
    params: Any,
    prompts: Any,
    max_new_tokens: int,
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    stop_ids: Sequence[int] = (),
    cache_dtype: str | None = None,
    **unknown: Any,
) -> BeamSearchResult:
    """Searches for the likeliest continuations of each prompt, as transformers' `generate(num_beams=...)` does.

    Each prompt is read once, and gets the rows it would get alone. Compiles once per model, number of prompts and of
    beams, and bucket of lengths (powers of two).

    Args:
        model: the model.
        params: its parameters; not modified.
        prompts: as in `generate`.
        max_new_tokens: maximum ids to add per row; 0 returns the prompts, with scores of 0.
        num_beams: hypotheses per prompt.
        length_penalty: exponent of the length by which a hypothesis' total log-probability is divided: 0 ranks by the
            total, 1 by the mean per id; above 0 favours long rows, below 0 short ones.
        early_stopping: when a prompt with `num_beams` finished hypotheses is settled. True: at once. False: when the
            likeliest running hypothesis, scored as if it ended now, is no better than the worst of them. "never": when
            it could not become better (if `length_penalty` is above 0, at `max_new_tokens` ids).
        num_return_sequences: rows of the result per prompt, at most `num_beams`.
        stop_ids: ids that finish a hypothesis.
        cache_dtype: as in `generate`.
        unknown: none; the options of random sampling are refused by name.

    Raises:
        TypeError: for arguments of the wrong type, and unknown options.
        ValueError: as `generate` does; for more beams than ids to begin with; if a prompt and `max_new_tokens` together
            exceed the context, because no cache can go on from there.
        FloatingPointError: if logits are NaN or infinite, naming the prompt and the step.
        OutOfMemoryError: if the key/value cache alone needs more memory than there is.
    """
    _refuse_unknown(unknown)
    check_model("beam_search(model, params, prompts, max_new_tokens, num_beams=4)", model, params)
    run = Generation(
        model,
        params,
        prompts,
        max_new_tokens,
        stop_ids=stop_ids,
        beyond_context="error",
        cache_dtype=cache_dtype,
    )
    N = whole_number("num_beams", num_beams, 1)
    rows = whole_number("num_return_sequences", num_return_sequences, 1)
    stops_V = np.zeros(run.model.config.vocab_size, bool)
    stops_V[list(run.stop_ids)] = True
    if rows > N:
        raise ValueError(f"num_return_sequences={rows} must be at most num_beams={N}")
    others = int(np.sum(~stops_V))
    if others < N:
        raise ValueError(f"num_beams={N} must be at most {others}, the number of ids that are not stop ids")
    number = isinstance(length_penalty, numbers.Real) and not isinstance(length_penalty, bool)
    if not number or not -10 <= length_penalty <= 10:
        raise ValueError(f"length_penalty must be a number from -10 to 10, not {short_repr(length_penalty)}")
    if not isinstance(early_stopping, (bool, str)) or early_stopping not in (False, True, "never"):
        raise ValueError(f'early_stopping must be False, True or "never", not {short_repr(early_stopping)}')

    steps = run.max_new_tokens
    # With a negative penalty a hypothesis scores most at its present length.
    horizon = steps if early_stopping == "never" and length_penalty > 0 else 0
    rules = Rules(
        max_new_tokens=np.int32(steps),
        length_penalty=np.float32(length_penalty),
        stops_V=stops_V,
        early=np.bool_(early_stopping is True),
        horizon=np.int32(horizon),
    )
    started = time.perf_counter()
    found = _search(run, to_device(rules, run.params), N)
    prompts = [prompt for prompt in run.prompts for _ in range(rows)]
    new = [ids for ended, _ in found for ids in ended[:rows]]
    return BeamSearchResult(
        tokens=[np.concatenate(parts) for parts in zip(prompts, new, strict=True)],
        prompt_lengths=[len(prompt) for prompt in prompts],
        seconds=time.perf_counter() - started,
        tokens_per_second=None,
        finish_reasons=["stop" if ids.size and int(ids[-1]) in run.stop_ids else "length" for ids in new],
        scores=np.concatenate([scores[:rows] for _, scores in found]),
    )


@brief
@struct.dataclass
class BeamState:
    """The state of a search between two steps.

    Attributes:
        cache: what the model has read. All prompts end at the same slot.
        rows_R: the row of the cache that each running hypothesis goes on from.
        running_PxNxM: new ids of the running hypotheses, the best first; those of the last step are not read yet.
        totals_PxN: their total log-probabilities.
        ended_PxNxM: new ids of the finished hypotheses, the best first.
        lengths_PxN: how many they are, or 0 where none has finished yet.
        scores_PxN: their scores, or `UNFINISHED`.
        drawn: steps made so far, int32.
        settled_P: whether the finished hypotheses are final.
        broken_P: number of the first step whose logits were not finite, or -1.
    """

    cache: Cache
    rows_R: Array
    running_PxNxM: Array
    totals_PxN: Array
    ended_PxNxM: Array
    lengths_PxN: Array
    scores_PxN: Array
    drawn: Array
    settled_P: Array
    broken_P: Array


class Rules(NamedTuple):
    """What a search is asked for, as arrays: other values need no new compilation.

    Attributes:
        max_new_tokens: maximum new ids, int32.
        length_penalty: as in `beam_search`, float32.
        stops_V: which ids finish a hypothesis.
        early: whether N finished hypotheses settle a prompt whatever still runs.
        horizon: new ids at which a running hypothesis is scored to see whether it may still win, if there are not more
            already, int32.
    """

    max_new_tokens: Any
    length_penalty: Any
    stops_V: Any
    early: Any
    horizon: Any


@functools.partial(jax.jit, static_argnames=("model", "new", "cache_dtype", "num_beams"))
def start(
    model: GPT,
    params: Any,
    ids_PxT: Array,
    lengths_P: Array,
    rules: Rules,
    *,
    new: int,
    cache_dtype: str | None,
    num_beams: int,
) -> BeamState:
    """Reads the prompts and makes the first step.

    Args:
        model: the model; static.
        params: its parameters.
        ids_PxT: prompts, right-aligned.
        lengths_P: their lengths.
        rules: what the search is asked for.
        new: M, the most new ids for which there is room; static.
        cache_dtype: as in `prefill`; static.
        num_beams: N; static.
    """
    P, T = ids_PxT.shape
    cache_dtype = cache_dtype or default_dtype(model.compute, jax.tree.leaves(params)[0])
    cache: Any = Cache.empty(model.config, model.compute, start_B=T - lengths_P, slots=T + new, dtype=cache_dtype)
    x_PxTxD, cache = model.apply({"params": params}, ids_PxT, cache=cache, method="features")
    state = BeamState(
        cache=dataclasses.replace(cache, length=jnp.asarray(T, jnp.int32)),
        rows_R=jnp.arange(P),
        running_PxNxM=jnp.zeros((P, 1, new), jnp.int32),
        totals_PxN=jnp.zeros((P, 1), jnp.float32),
        ended_PxNxM=jnp.zeros((P, num_beams, new), jnp.int32),
        lengths_PxN=jnp.zeros((P, num_beams), jnp.int32),
        scores_PxN=jnp.full((P, num_beams), UNFINISHED, jnp.float32),
        drawn=jnp.zeros((), jnp.int32),
        settled_P=jnp.zeros(P, bool),
        broken_P=jnp.full(P, -1, jnp.int32),
    )
    state = _select(model, params, state, x_PxTxD[:, -1:], rules, num_beams)
    return dataclasses.replace(state, cache=state.cache.take(state.rows_R), rows_R=jnp.arange(P * num_beams))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def advance(model: GPT, params: Any, state: BeamState, rules: Rules) -> BeamState:
    """One more step; the arguments are those of `start`."""
    token_PxN = lax.dynamic_index_in_dim(state.running_PxNxM, state.drawn - 1, axis=2, keepdims=False)
    cache: Any = _reorder(state.cache, state.rows_R, state.running_PxNxM.shape[2])
    x_Rx1xD, cache = model.apply({"params": params}, token_PxN.reshape(-1, 1), cache=cache, method="features")
    state = dataclasses.replace(state, cache=cache)
    return _select(model, params, state, x_Rx1xD, rules, state.scores_PxN.shape[1])


def _select(model: GPT, params: Any, state: BeamState, x_Rx1xD: Array, rules: Rules, N: int) -> BeamState:
    """Ranks the extensions of all running hypotheses, from the features of their last ids."""
    P, running, _ = state.running_PxNxM.shape  # at the first step each prompt has one hypothesis, the empty one
    logits_Rx1xV: Any = model.apply({"params": params}, x_Rx1xD, method="logits")
    logits_PxNxV = replicate(logits_Rx1xV).reshape(P, running, -1)
    V = logits_PxNxV.shape[-1]
    totals_PxNxV = state.totals_PxN[..., None] + jax.nn.log_softmax(logits_PxNxV)
    best_PxN, best_at_PxN = lax.top_k(totals_PxNxV.reshape(P, -1), N)
    going_PxNxV = jnp.where(rules.stops_V[None, None], REMOVED, totals_PxNxV)
    totals_PxN, at_PxN = lax.top_k(going_PxNxV.reshape(P, -1), N)
    drawn = state.drawn + 1

    def extended(at_PxN: Array) -> Array:
        ids_PxNxM = jnp.take_along_axis(state.running_PxNxM, (at_PxN // V)[..., None], axis=1)
        return ids_PxNxM.at[:, :, state.drawn].set(at_PxN % V)

    def score(totals: Array, length: Array) -> Array:
        return totals / length.astype(jnp.float32) ** rules.length_penalty

    ends_PxN = (rules.stops_V[best_at_PxN % V] | (drawn == rules.max_new_tokens)) & ~state.settled_P[:, None]
    candidates_PxN = jnp.where(ends_PxN, score(best_PxN, drawn), UNFINISHED)
    scores_PxN, kept_PxN = lax.top_k(jnp.concatenate([state.scores_PxN, candidates_PxN], axis=1), N)

    def keep(old: Array, new: Array) -> Array:
        kept = kept_PxN.reshape(P, N, *(1,) * (old.ndim - 2))
        return jnp.take_along_axis(jnp.concatenate([old, new], axis=1), kept, axis=1)

    lengths_PxN = keep(state.lengths_PxN, jnp.where(ends_PxN, drawn, 0))
    beaten_P = score(totals_PxN[:, 0], jnp.maximum(drawn, rules.horizon)) <= scores_PxN[:, -1]
    settled_P = state.settled_P | jnp.all(lengths_PxN > 0, axis=1) & (rules.early | beaten_P)
    broken_P = ~jnp.all(jnp.isfinite(logits_PxNxV), axis=(1, 2)) & (state.broken_P < 0) & ~state.settled_P
    rows_PxN = jnp.arange(P)[:, None] * running + at_PxN // V
    return BeamState(
        cache=state.cache,
        rows_R=rows_PxN.reshape(-1),
        running_PxNxM=extended(at_PxN),
        totals_PxN=totals_PxN,
        ended_PxNxM=keep(state.ended_PxNxM, extended(best_at_PxN)),
        lengths_PxN=lengths_PxN,
        scores_PxN=scores_PxN,
        drawn=drawn,
        settled_P=settled_P,
        broken_P=jnp.where(broken_P, state.drawn, state.broken_P),
    )


def _reorder(cache: Cache, rows_R: Array, new: int) -> Cache:
    """`cache.take`, for rows that each replace one of the same prompt: all but the last `new` slots are alike in both,
    and stay where they are. Moving them would take longer than the rest of the step."""

    def put(kept: Array, taken: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(kept, taken, kept.shape[-2] - new, axis=kept.ndim - 2)

    last = dataclasses.replace(cache, layers=jax.tree.map(lambda kept: kept[..., -new:, :], cache.layers))
    return dataclasses.replace(cache, layers=jax.tree.map(put, cache.layers, last.take(rows_R).layers))


def _start(run: Generation, rules: Rules, N: int) -> BeamState:
    config, P = run.model.config, len(run.prompts)
    T = bucket(max(map(len, run.prompts)), PROMPT_BUCKET, config.context_length)
    new = bucket(run.max_new_tokens, NEW_BUCKET, config.context_length)
    mesh = sharding.mesh_of(run.params)
    least = cache_bytes(config, P * N, T + new, run.cache_dtype or "bfloat16")
    check_bytes(least / (mesh.size if mesh else 1), "search with fewer beams, or for fewer tokens", run.params)
    ids_PxT = np.zeros((P, T), np.int32)
    for row, prompt in zip(ids_PxT, run.prompts, strict=True):
        row[T - len(prompt) :] = prompt
    arguments = to_device((ids_PxT, np.array([len(prompt) for prompt in run.prompts], np.int32)), run.params)
    return start(run.model, run.params, *arguments, rules, new=new, cache_dtype=run.cache_dtype, num_beams=N)


def _search(run: Generation, rules: Rules, N: int) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Per prompt the new ids of its N hypotheses, the best first, and their scores."""
    if not run.max_new_tokens:
        return [([np.zeros(0, np.int32)] * N, np.zeros(N, np.float32)) for _ in run.prompts]
    state = _start(run, rules, N)
    for drawn in range(1, run.max_new_tokens):
        if drawn % STEPS == 0 and _settled(state):
            break
        state = advance(run.model, run.params, state, rules)
    _settled(state)
    ended_PxNxM, lengths_PxN, scores_PxN = jax.device_get((state.ended_PxNxM, state.lengths_PxN, state.scores_PxN))
    return [
        ([ids[:length] for ids, length in zip(ended, lengths, strict=True)], scores)
        for ended, lengths, scores in zip(ended_PxNxM, lengths_PxN, scores_PxN, strict=True)
    ]


def _settled(state: BeamState) -> bool:
    """Whether nothing can change any more; raises if logits were not finite."""
    settled_P, broken_P = jax.device_get((state.settled_P, state.broken_P))
    refuse_broken(broken_P)
    return bool(np.all(settled_P))


# What changes or draws from the model's probabilities, in this package and in others.
_SAMPLING = ("sampler", "key", "seed", "logprobs", "rng", "prng_key", "do_sample", *SAMPLING)
_OPTIONS = (
    "max_new_tokens",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "num_return_sequences",
    "stop_ids",
    "cache_dtype",
)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    for name in options:
        hint = did_you_mean(name, _OPTIONS)
        if name in _SAMPLING:
            hint = ": it only ranks what the model says, and draws nothing at random"
        elif name == "beyond_context":
            hint = ": no prompt may grow past the context, because no cache can go on from there"
        raise TypeError(f"beam_search has no option {name!r}{hint}")
