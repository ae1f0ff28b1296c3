"""`score`: how likely a model finds continuations of prompts. Checks on the host, batches of few shapes, and one
program per shape, which never holds the logits of more than a few positions."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxgpt import notebook
from jaxgpt.checks import brief, check_ids, short_repr
from jaxgpt.config import GPTConfig
from jaxgpt.generation import encode_prompt
from jaxgpt.model import GPT, Cache, check_model, default_dtype
from jaxgpt.parallel import BATCH, sharding, to_device
from jaxgpt.scoring.buckets import Shape, choose_shapes, prompts_per_batch
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training import negative_log_likelihood

# Logits that exist at a time.
LOGITS = 2**23
# A prompt that several continuations share is read once, if it has at least so many ids. Below, one pass over whole
# rows is faster than a second one through the cache.
SHARED_PROMPT = 16


@brief
@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a model finds one continuation.

    Attributes:
        logprob: log p(continuation | prompt), in nats: the sum of `token_logprobs`.
        token_logprobs: log p(token | prompt and the tokens before it), float32, [N].
        is_greedy: whether each token is the likeliest, so that greedy decoding would have chosen the continuation.
        tokens: the continuation's ids, int32, [N].
    """

    logprob: float
    token_logprobs: np.ndarray
    is_greedy: bool
    tokens: np.ndarray


def score(
    model: GPT,
    params: Any,
    prompts: Sequence[Any],
    continuations: Sequence[Sequence[Any]],
    *,
    batch_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Scores continuations of prompts: `continuations[i]` are those of `prompts[i]`, all of any lengths.

        score(model, params, ["The capital of France is"], [[" Paris", " Rome"]])[0][0].logprob

    A prompt is read once for all of its continuations. A score does not depend on the other rows, except for rounding
    in the last bits of float32: batches of different shapes sum in different orders. Compiles once per shape, at most
    six in a call. If prompt and continuation exceed the context, the prompt loses its first ids, so that each id is
    predicted from at most `context_length` before it.

    Args:
        model: the model.
        params: its parameters; not modified.
        prompts: texts, or lists of ids. An empty text is end-of-text, or what the tokenizer starts from.
        continuations: per prompt, a list of texts or of lists of ids. A text has the tokens that it has after the
            prompt, so write the space before a word in the continuation, as in " Paris".
        batch_tokens: about how many tokens to process at once.
        progress: called with the number of continuations that have been scored since the last call.

    Returns:
        The scores, in the order of `continuations`.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for an empty continuation, one longer than the context, ids outside the vocabulary, or a text that
            begins inside a token of the prompt; names its place.
        DataError, MissingExtraError: if the tokenizer cannot encode a text.
        FloatingPointError: if logits are NaN or infinite.
    """
    check_model("score(model, params, prompts, continuations)", model, params)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be 1 or more, not {batch_tokens}")
    prompts, continuations = _checked(model.config, prompts, continuations)
    scores: list[list[Any]] = [[None] * len(group) for group in continuations]
    parts = list(_parts(prompts, continuations, model.config.context_length, batch_tokens))
    mesh = sharding.mesh_of(params)
    multiple = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH]))
    pending: collections.deque[tuple[list[_Part], Any]] = collections.deque()

    total, done = sum(map(len, continuations)), 0

    def finish() -> None:
        nonlocal done
        batch, results = pending.popleft()
        _accept(batch, jax.device_get(results), scores)
        scored = sum(len(part.continuations) for part in batch)
        if progress is not None:
            progress(scored)
        done += scored
        show(done, total)

    with notebook.bar("continuations") as show:
        for shape, batch, size in _batches(parts, model.config.context_length, batch_tokens, multiple):
            arrays = to_device(_arrays(batch, shape, size), params)
            pending.append((batch, _score(model, params, *arrays, tails=shape.tails)))
            if len(pending) > 1:  # the host prepares a batch while the device computes the one before
                finish()
        while pending:
            finish()
    return scores


@dataclasses.dataclass(frozen=True)
class _Part:
    """A prompt and those of its continuations that are scored together.

    Attributes:
        i: the prompt's number.
        first: number of the first continuation.
        ids: what is read first: the prompt; or, if there are no `tails`, the prompt and all of its one continuation
            except its last id.
        tails: per continuation what is read after that: all except its last id; empty if none is read.
        continuations: the ids to score.
    """

    i: int
    first: int
    ids: np.ndarray
    tails: list[np.ndarray]
    continuations: list[np.ndarray]

    @property
    def size(self) -> Shape:
        longest = max(map(len, self.tails), default=0)
        return Shape(len(self.ids), longest, len(self.tails) if longest else 0)


def _checked(config: GPTConfig, prompts: Any, continuations: Any) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The ids of both, int32."""
    for name, value in (("prompts", prompts), ("continuations", continuations)):
        if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
            raise TypeError(f"{name} must be a list with one entry per prompt, not {short_repr(value)}")
    if len(prompts) != len(continuations):
        raise ValueError(
            f"{len(prompts)} prompts, but continuations of {len(continuations)}: continuations[i] is the list of those "
            "of prompts[i]"
        )
    heads: list[np.ndarray] = []
    groups: list[list[np.ndarray]] = []
    for i, (prompt, group) in enumerate(zip(prompts, continuations, strict=True)):
        if isinstance(group, (str, bytes)) or not hasattr(group, "__len__"):
            raise TypeError(
                f"continuations[{i}] must be a list of continuations of prompts[{i}], not {short_repr(group)}"
            )
        head = encode_prompt(config, prompt) if isinstance(prompt, str) else prompt
        heads.append(_checked_ids(head, f"prompts[{i}]", config))
        groups.append([])
        for j, continuation in enumerate(group):
            name = f"continuations[{i}][{j}]"
            if isinstance(continuation, str):
                continuation = _encode_continuation(config, prompt, heads[i].tolist(), continuation, name)
            ids = _checked_ids(continuation, name, config)
            if len(ids) > config.context_length:
                raise ValueError(f"{name} has {len(ids)} ids, more than context_length={config.context_length}")
            groups[i].append(ids)
    return heads, groups


def _checked_ids(ids: Any, name: str, config: GPTConfig) -> np.ndarray:
    if not hasattr(ids, "__len__") or np.ndim(ids) == 0:
        raise TypeError(f"{name} must be a text or a list of ids, not {short_repr(ids)}")
    if not len(ids):
        raise ValueError(f"{name} is empty: expected at least one id")
    return check_ids(ids, name, config.vocab_size)


def _encode_continuation(config: GPTConfig, prompt: Any, head: list[int], text: str, name: str) -> list[int]:
    """The tokens that a text has after a prompt."""
    if not text:
        raise ValueError(f"{name} is empty: there is nothing to score")
    if not isinstance(prompt, str):
        raise TypeError(f"{name} is text, but its prompt is ids: give both as text, or both as ids")
    if not prompt:
        return get_tokenizer(config.tokenizer).encode(text)
    whole = get_tokenizer(config.tokenizer).encode(prompt + text)
    if whole[: len(head)] != head or len(whole) == len(head):
        raise ValueError(
            f"{name}, {short_repr(text)}, begins inside a token that starts in its prompt: end the prompt where a "
            "token ends, such as before a space, or give ids"
        )
    return whole[len(head) :]


def _parts(
    prompts: list[np.ndarray], continuations: list[list[np.ndarray]], context: int, batch_tokens: int
) -> Iterator[_Part]:
    for i, (prompt, group) in enumerate(zip(prompts, continuations, strict=True)):
        longest = max(map(len, group), default=0)
        together = 1
        if len(prompt) >= SHARED_PROMPT and len(prompt) + longest - 1 <= context:
            together = max(1, batch_tokens // (len(prompt) + longest))
        for first in range(0, len(group), together):
            some = group[first : first + together]
            if len(some) > 1:
                yield _Part(i, first, prompt, [ids[:-1] for ids in some], some)
            else:
                yield _Part(i, first, np.concatenate([prompt, some[0][:-1]])[-context:], [], some)


def _batches(
    parts: list[_Part], context: int, batch_tokens: int, multiple: int
) -> Iterator[tuple[Shape, list[_Part], int]]:
    """(shape, the parts of a batch, the number of prompts that it is padded to), the largest shapes first."""
    if not parts:
        return
    by_shape = collections.defaultdict(list)
    for part, shape in zip(parts, choose_shapes([part.size for part in parts], context), strict=True):
        by_shape[shape].append(part)
    for shape in sorted(by_shape, reverse=True):
        same = by_shape[shape]
        size = prompts_per_batch(shape, len(same), batch_tokens, multiple)
        for start in range(0, len(same), size):
            yield shape, same[start : start + size], size


def _arrays(batch: list[_Part], shape: Shape, size: int) -> tuple[Any, ...]:
    """The arguments of `_score`."""
    P, N, K = shape
    prompts_GxP, starts_G = np.zeros((size, P), np.int32), np.full(size, P - 1, np.int32)
    tails_RxN = np.zeros((size * K, N), np.int32)
    positions, labels = [], []
    for g, part in enumerate(batch):
        # A cache's rows end in the same slot. Without a cache, positions are counted from the left.
        start = P - len(part.ids) if N else 0
        end = start + len(part.ids)
        prompts_GxP[g, start:end], starts_G[g] = part.ids, start
        for k, ids in enumerate(part.continuations):
            row, read = g * K + k, len(ids) - 1
            if part.tails:
                tails_RxN[row, :read] = part.tails[k]
                tail = size * P + row * N
                positions.append(np.array([g * P + end - 1, *range(tail, tail + read)]))
            else:
                positions.append(np.arange(g * P + end - 1 - read, g * P + end))
            labels.append(ids)
    count = sum(map(len, labels))
    at_M, labels_M = np.zeros((2, size * (P + K * (N + 1))), np.int32)
    at_M[:count], labels_M[:count] = np.concatenate(positions), np.concatenate(labels)
    return prompts_GxP, starts_G, tails_RxN, at_M, labels_M, np.int32(count)


@functools.partial(jax.jit, static_argnames=("model", "tails"))
def _score(
    model: GPT,
    params: Any,
    prompts_GxP: Array,
    starts_G: Array,
    tails_RxN: Array,
    at_M: Array,
    labels_M: Array,
    count: Array,
    *,
    tails: int,
) -> tuple[Array, Array]:
    """Reads prompts, and for each of them `tails` texts that follow it; then scores ids at chosen positions.

    Args:
        model: the model; static.
        params: its parameters.
        prompts_GxP: with tails, rows that end in the last column; otherwise rows that start in the first one, and
            padding behind them, which nothing before it sees.
        starts_G: first column of each row; ignored without tails.
        tails_RxN: R is G x `tails`; row r follows prompt r // `tails`.
        at_M: positions among all those of prompts_GxP, row after row, and then of tails_RxN.
        labels_M: the id to score after each of them.
        count: how many of the M count.
        tails: texts per prompt, K; static.

    Returns:
        (log p(label), whether the label is the likeliest id), both [M].
    """

    def apply(x: Array, method: str, **kwargs: Any) -> Any:
        return model.apply({"params": params}, x, method=method, **kwargs)

    G, P = prompts_GxP.shape
    if tails_RxN.size:
        dtype = default_dtype(model.compute, jax.tree.leaves(params)[0])
        cache = Cache.empty(model.config, model.compute, starts_G, slots=P + tails_RxN.shape[1], dtype=dtype)
        x_GxPxD, cache = apply(prompts_GxP, "features", cache=cache)
        x_RxNxD, _ = apply(tails_RxN, "features", cache=cache.take(jnp.repeat(jnp.arange(G), tails)))
        read = [x_GxPxD, x_RxNxD]
    else:
        read = [apply(prompts_GxP, "features")[0]]
    x_xD = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in read])
    M = at_M.shape[0]
    C = min(M, max(1, LOGITS // model.config.vocab_size))
    at_M, labels_M = (jnp.pad(x, (0, -M % C)) for x in (at_M, labels_M))

    def score_chunk(i: Array, scored: tuple[Array, Array]) -> tuple[Array, Array]:
        at_C, labels_C = (lax.dynamic_slice_in_dim(x, i * C, C) for x in (at_M, labels_M))
        logits_CxV = apply(x_xD[at_C][:, None], "logits")[:, 0]
        logprobs_C = -negative_log_likelihood(logits_CxV, labels_C)
        greedy_C = jnp.argmax(logits_CxV, axis=-1) == labels_C
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * C, axis=0)
        return put(scored[0], logprobs_C), put(scored[1], greedy_C)

    nothing = jnp.zeros(at_M.shape, jnp.float32), jnp.zeros(at_M.shape, bool)
    return lax.fori_loop(0, (count + C - 1) // C, score_chunk, nothing)


def _accept(batch: list[_Part], results: tuple[np.ndarray, np.ndarray], scores: list[list[Any]]) -> None:
    """Puts what `_score` returned for a batch where it belongs in `scores`."""
    logprobs_M, greedy_M = results
    start = 0
    for part in batch:
        for j, ids in enumerate(part.continuations, part.first):
            logprobs_N, greedy_N = (x_M[start : start + len(ids)] for x_M in (logprobs_M, greedy_M))
            if not np.all(np.isfinite(logprobs_N)):
                raise FloatingPointError(
                    f"the logits for continuation {j} of prompt {part.i} are NaN or infinite: the parameters hold such "
                    "values, or overflow"
                )
            total = float(np.sum(logprobs_N, dtype=np.float64))
            scores[part.i][j] = Score(total, logprobs_N.copy(), bool(np.all(greedy_N)), ids)
            start += len(ids)
