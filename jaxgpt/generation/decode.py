"""Decoding on the device: one prefill, then a scan of single-token steps. Pure functions with fixed shapes.

`jaxgpt.generate` drives these from the host. `scan_generate` is the whole generator as one pure function, for
`jax.jit`, `jax.export` or a larger program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jaxgpt.checks import brief, check_batch
from jaxgpt.generation.history import History
from jaxgpt.generation.keys import as_key, row_keys
from jaxgpt.generation.logprobs import Logprobs
from jaxgpt.generation.prompts import check_sampler
from jaxgpt.generation.sampling import Sampler
from jaxgpt.model import GPT, Cache, RecentTokens, check_model, default_dtype
from jaxgpt.parallel import replicate


@brief
@struct.dataclass
class DecodeState:
    """The state of a generation between two tokens.

    Attributes:
        memory: what the model has read: a key/value cache, or the last C ids once a row is as long as the context.
        token_B: the last id drawn, which the model has not read yet.
        keys_B: one key per row, from `row_keys`; None if nothing is drawn at random.
        stop_ids: ids that end a row, [any number].
        drawn: ids drawn so far per row, int32.
        done_B: whether the row has drawn a stop id.
        broken_B: number of the first draw whose logits were not finite, or -1.
        history: the text of each row, if the sampler looks at it.
        logprobs: of the last draw, by the model and by the sampler, if they are asked for.
    """

    memory: Cache | RecentTokens
    token_B: Array
    keys_B: Array | None
    stop_ids: Array
    drawn: Array
    done_B: Array
    broken_B: Array
    history: History | None = None
    logprobs: tuple[Logprobs, Logprobs] | None = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest ids are reported with each draw; None for no log-probabilities."""
        return None if self.logprobs is None else self.logprobs[0].top.shape[-1]


@functools.partial(jax.jit, static_argnames=("model", "slots", "cache_dtype", "logprobs", "copies"))
def prefill(
    model: GPT,
    params: Any,
    ids_BxT: Array,
    lengths_B: Array,
    length: Array,
    key: Array | None,
    stop_ids: Array,
    *,
    slots: int,
    sampler: Sampler,
    cache_dtype: str | None = None,
    history: History | None = None,
    logprobs: int | None = None,
    copies: int = 1,
) -> DecodeState:
    """Reads the prompts into a new cache and draws the first id of each row.

    Args:
        model: the model; static.
        params: its parameters.
        ids_BxT: row b's prompt ends at column `length` - 1; ids to its left and right are ignored.
        lengths_B: ids in each prompt.
        length: the largest of them.
        key: as in `row_keys`, or None.
        stop_ids: ids that end a row, [any number].
        slots: size of the cache, at least T; static.
        sampler: how ids are drawn.
        cache_dtype: dtype of the cache; None for `Cache.empty`'s default; static.
        history: the prompts once more, for a sampler that looks at the text, with a column for every id to be drawn.
        logprobs: how many of the likeliest ids to report with each draw; None for no log-probabilities; static.
        copies: rows of the state per prompt, next to each other: each prompt is read once; static.
    """
    B = ids_BxT.shape[0]
    cache_dtype = cache_dtype or default_dtype(model.compute, jax.tree.leaves(params)[0])
    cache: Any = Cache.empty(model.config, model.compute, start_B=length - lengths_B, slots=slots, dtype=cache_dtype)
    x_BxTxD, cache = model.apply({"params": params}, ids_BxT, cache=cache, method="features")
    # Slots from `length` on hold keys of padding, which are masked until those of real tokens replace them.
    cache = dataclasses.replace(cache, length=jnp.asarray(length, jnp.int32))
    x_Bx1xD = lax.dynamic_slice_in_dim(x_BxTxD, length - 1, 1, axis=1)
    if copies > 1:
        rows, B = jnp.repeat(jnp.arange(B), copies), B * copies
        cache, x_Bx1xD = cache.take(rows), x_Bx1xD[rows]
    state = DecodeState(
        memory=cache,
        token_B=jnp.zeros(B, jnp.int32),
        keys_B=None if key is None else row_keys(key, B),
        stop_ids=stop_ids,
        drawn=jnp.zeros((), jnp.int32),
        done_B=jnp.zeros(B, bool),
        broken_B=jnp.full(B, -1, jnp.int32),
        history=history,
    )
    return _read_out(model, params, state, x_Bx1xD, sampler, logprobs)


@functools.partial(jax.jit, static_argnames=("model", "chunk"), donate_argnames=("state",))
def decode_tokens(
    model: GPT,
    params: Any,
    state: DecodeState,
    steps: Array | int,
    *,
    chunk: int,
    sampler: Sampler,
) -> tuple[DecodeState, tuple[Array, Any]]:
    """Draws `steps` more ids per row, at most `chunk` (which is static), or fewer if all rows are done first.

    Returns:
        (state, (ids_BxN, their log-probabilities)): N is `chunk`; only the first columns count, as many as
        `state.drawn` has grown by. The latter are [B, N] and [B, N, K], or None for a state without any.
    """

    def step(state: DecodeState) -> DecodeState:
        if isinstance(state.memory, RecentTokens):
            memory: Any = state.memory.append(state.token_B)
            cache = memory.cache(model.config, model.compute)
            x_BxTxD, _ = model.apply({"params": params}, memory.ids_BxC, cache=cache, method="features")
            x_BxTxD = x_BxTxD[:, -1:]
        else:
            x_BxTxD, memory = model.apply(
                {"params": params}, state.token_B[:, None], cache=state.memory, method="features"
            )
        return _read_out(model, params, dataclasses.replace(state, memory=memory), x_BxTxD, sampler, state.top)

    def step_if_needed(state: DecodeState, i: Array) -> tuple[DecodeState, Any]:
        state = lax.cond((i < steps) & ~jnp.all(state.done_B), step, lambda state: state, state)
        return state, (state.token_B, state.logprobs)

    state, drawn = lax.scan(step_if_needed, state, jnp.arange(chunk))
    return state, jax.tree.map(lambda x_NxB: jnp.swapaxes(x_NxB, 0, 1), drawn)


@functools.partial(jax.jit, static_argnames=("slots",))
def grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with its cache enlarged to `slots` slots, at least as many as it has."""

    def pad(kept: Array) -> Array:
        return jnp.pad(kept, [(0, 0)] * (kept.ndim - 2) + [(0, slots - kept.shape[-2]), (0, 0)])

    assert isinstance(state.memory, Cache)
    memory = dataclasses.replace(state.memory, layers=jax.tree.map(pad, state.memory.layers))
    return dataclasses.replace(state, memory=memory)


def scan_generate(
    model: GPT,
    params: Any,
    ids_BxT: Array,
    max_new_tokens: int,
    *,
    sampler: Sampler | None = None,
    key: Array | int | None = None,
) -> Array:
    """The whole generator as one pure function, for `jax.jit`, `jax.export` or a larger program.

    For prompts of equal length and without stop ids it draws what `jaxgpt.generate` draws, past the context too.
    It checks nothing: the caller must make sure that ids are in the vocabulary and parameters are finite.

    Args:
        model: the model; static.
        params: its parameters.
        ids_BxT: prompts, integers.
        max_new_tokens: ids to draw per row, 1 or more; static.
        sampler: how ids are drawn; default `Greedy()`.
        key: as in `jaxgpt.generate`.

    Returns:
        ids_BxN: the new ids only.
    """
    check_model("scan_generate(model, params, ids, max_new_tokens)", model, params)
    sampler = check_sampler(sampler, model.config.vocab_size)
    ids_BxT = jnp.asarray(ids_BxT)
    check_batch(ids_BxT, ids_BxT.shape[-1])
    model = GPT(model.config, model.compute.replace(native_kernel=False, native_sequences=False))
    C = model.config.context_length
    B, T = ids_BxT.shape
    history = None
    if sampler.sees_text:
        ids_BxS = jnp.pad(ids_BxT.astype(jnp.int32), ((0, 0), (0, max_new_tokens)))
        history = History(ids_BxS, jnp.zeros(B, jnp.int32), jnp.int32(T), jnp.int32(T))
    ids_BxT = ids_BxT[:, -C:].astype(jnp.int32)
    T = ids_BxT.shape[1]
    no_stops = jnp.zeros(0, jnp.int32)
    cached = min(max_new_tokens, C - T + 1)
    lengths_B = jnp.full(B, T, jnp.int32)
    key = None if key is None else as_key(key)
    arguments = (ids_BxT, lengths_B, jnp.int32(T), key, no_stops)
    state = prefill(model, params, *arguments, slots=T + cached - 1, sampler=sampler, history=history)
    pieces = [ids_BxT, state.token_B[:, None]]
    if cached > 1:
        state, (ids, _) = decode_tokens(model, params, state, cached - 1, chunk=cached - 1, sampler=sampler)
        pieces.append(ids)
    recomputed = max_new_tokens - cached
    if recomputed > 0:
        read_BxC = jnp.concatenate(pieces, axis=1)[:, -C - 1 : -1]
        state = dataclasses.replace(state, memory=RecentTokens(read_BxC, jnp.full(B, C, jnp.int32)))
        _, (ids, _) = decode_tokens(model, params, state, recomputed, chunk=recomputed, sampler=sampler)
        pieces.append(ids)
    return jnp.concatenate(pieces[1:], axis=1)


def _read_out(
    model: GPT, params: Any, state: DecodeState, x_Bx1xD: Array, sampler: Sampler, top: int | None
) -> DecodeState:
    """The next id of each row, from the features of the row's last token."""
    logits_Bx1xV: Any = model.apply({"params": params}, x_Bx1xD, method="logits")
    return draw(state, logits_Bx1xV[:, 0], sampler, top)


def draw(state: DecodeState, logits_BxV: Array, sampler: Sampler, top: int | None) -> DecodeState:
    """The state with one more id per row, drawn from these logits, and with the `top` likeliest if that is not None."""
    with jax.named_scope("sample"):
        keys_B = None if state.keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.drawn)
        history = state.history
        seen = history and dataclasses.replace(history, stop_ids=state.stop_ids)
        token_B = replicate(sampler(logits_BxV, keys_B, seen))  # every process reads them
        broken = ~jnp.all(jnp.isfinite(logits_BxV), axis=-1) & (state.broken_B < 0) & ~state.done_B
        logprobs = None
        if top is not None:
            shaped_BxV = sampler.filter(sampler.control(logits_BxV, seen))
            logprobs = Logprobs.of(logits_BxV, token_B, top), Logprobs.of(shaped_BxV, token_B, top)
        return dataclasses.replace(
            state,
            token_B=token_B,
            drawn=state.drawn + 1,
            done_B=state.done_B | jnp.any(token_B[:, None] == state.stop_ids[None], axis=-1),
            broken_B=replicate(jnp.where(broken, state.drawn, state.broken_B)),
            history=history and history.append(token_B),
            logprobs=logprobs,
        )
