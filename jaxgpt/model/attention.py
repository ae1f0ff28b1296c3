"""Causal scaled dot-product attention, dense or banded, forward and backward. The [T, T] weights are never held as a
whole. (With dropout, the backward pass keeps the dropout mask, one byte per weight.)

Source: Vaswani et al. 2017, section 3.2.1. The backward pass, which recomputes the weights instead of storing them,
follows Dao et al. 2022 (FlashAttention), section 3. The band is the local part of Child et al. 2019 (Sparse
Transformer), section 4.3.

Sizes: B batch, H heads, T queries, S keys, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.cpu import kernel
from jaxgpt.model.cache import Seen
from jaxgpt.model.ops import dot, dropout_mask, keep
from jaxgpt.parallel import is_distributed, platform

# Finite, so that a row in which every score is masked becomes uniform rather than NaN.
MASKED_SCORE = -1e30
# Scores that a CPU computes at a time: few enough to stay in a core's cache until they are used.
CPU_SCORES = 3 * 2**16


class _Plan(NamedTuple):
    """The settings that all blocks of one call share."""

    dtype: str
    drop_rate: float
    query_slot: int | Array
    query_block: int
    window: int | None
    custom_derivatives: bool

    def blocks(self, T: int, S: int) -> Iterator[tuple[slice, slice]]:
        """Per block: its queries, and the range of the S keys that any of them can see."""
        for first in range(0, T, self.query_block):
            last = min(T, first + self.query_block)
            keys = slice(0, S)
            if isinstance(self.query_slot, int):
                lowest = 0 if self.window is None else max(0, self.query_slot + first + 1 - self.window)
                keys = slice(lowest, min(S, self.query_slot + last))
            yield slice(first, last), keys


def attend(
    q_BxHxTxK: Array,
    seen: Seen,
    *,
    window: int | None = None,
    banded: bool | Array = True,
    scale: float | Array | None = None,
    return_weights: bool = False,
    native_kernel: bool = False,
    **options: Any,
) -> tuple[Array, Array | None]:
    """softmax(q k^T scale) v with causal masking, in float32; by default, scale is 1 / sqrt(K).

    Query t is at slot `seen.query_slot` + t and sees the key slots from `seen.start_B` up to and including its own;
    with a `window`, only the last `window` of them.

    Args:
        q_BxHxTxK: queries.
        seen: keys and values, and the slots at which queries and rows start.
        window: width of the band, at least 1: the slots that a query sees, including its own; None for no band.
        banded: whether `window` applies; an array where a scan alternates dense and banded layers.
        scale: what the scores are multiplied by; an array where it differs between the layers of a scan.
        return_weights: whether to also return all weights, at the cost of their memory.
        native_kernel: whether a CPU uses `jaxgpt.cpu.kernel` while decoding.
        options: passed on to `blocked`: dropout, block sizes, derivatives.

    Returns:
        (context [B, H, T, K], weights [B, H, T, S] or None).
    """

    decoding = not isinstance(seen.query_slot, int) and q_BxHxTxK.shape[2] <= kernel.MOST_ROWS
    undropped = options.get("dropout_key") is None
    native_kernel = native_kernel and decoding and undropped and not is_distributed(q_BxHxTxK)

    def form(window: int | None) -> tuple[Array, Array | None]:
        weights = attention_weights(q_BxHxTxK, seen, window, scale) if return_weights else None
        context = functools.partial(blocked, q_BxHxTxK, seen, window=window, scale=scale, **options)
        if native_kernel:
            native = functools.partial(kernel.attention, _scaled(q_BxHxTxK, scale), *seen[:4], window)
            return lax.platform_dependent(cpu=native, default=context), weights
        return context(), weights

    if isinstance(banded, bool):
        return form(window if banded else None)
    # Two static patterns rather than one data-dependent mask: the band's blocks still skip what they cannot see, and
    # a scan still compiles each pattern only once, whatever the depth. (Without rematerialisation the backward pass
    # reserves memory for the residuals of both: about a tenth more.)
    return lax.cond(banded, lambda: form(window), lambda: form(None))


def attention_weights(q_BxHxTxK: Array, seen: Seen, window: int | None, scale: float | Array | None) -> Array:
    """All weights, softmax(q k^T scale): [B, H, T, S]."""
    B, _, T, _ = q_BxHxTxK.shape
    start_B = jnp.zeros(B, jnp.int32) if seen.start_B is None else seen.start_B
    visible = _visible(seen.query_slot, slice(0, T), slice(0, seen.k_BxHxSxK.shape[2]), start_B, window)
    return jax.nn.softmax(_scores(_scaled(q_BxHxTxK, scale), seen.k_BxHxSxK, visible, seen.dtype))


def blocked(
    q_BxHxTxK: Array,
    seen: Seen,
    *,
    window: int | None = None,
    scale: float | Array | None = None,
    drop_rate: float = 0.0,
    dropout_key: Array | None = None,
    query_block: int | None = None,
    group_scores: int | None = None,
    custom_derivatives: bool = True,
) -> Array:
    """Computes `attend`'s context block by block.

    Where `seen.query_slot` is a Python int, each block of `query_block` queries only meets the keys that it can see, so
    most masked scores are never computed: a band costs T (window + query_block) scores, not T^2 / 2. Rows and heads are
    processed in groups, one after another, small enough that a block's scores stay in a core's cache.

    Args:
        q_BxHxTxK: queries.
        seen: keys and values, and the slots at which queries and rows start.
        window: width of the band, or None.
        scale: as in `attend`.
        drop_rate: dropout on the attention weights.
        dropout_key: its key; None for no dropout.
        query_block: queries per block; default: a quarter of T, but at least 64 and at most 128.
        group_scores: maximum scores per group and block; default: `CPU_SCORES` on one CPU, no limit elsewhere.
        custom_derivatives: whether the backward pass recomputes the weights; if not, JAX's own derivatives are used,
            which also support forward mode.
    """
    k_BxHxSxK, v_BxHxSxK, query_slot, start_B, dtype = seen
    B, H, T, K = q_BxHxTxK.shape
    S = k_BxHxSxK.shape[2]
    q_BxHxTxK = _scaled(q_BxHxTxK, scale)
    start_B = jnp.zeros(B, jnp.int32) if start_B is None else start_B
    if window is not None and window >= S:
        window = None  # everything is in the band
    if not isinstance(query_slot, int):
        # T is small while decoding: there is nothing to split. But only the band of a long cache is read.
        if window is not None and (width := window + T - 1) < S:
            first = jnp.maximum(query_slot + 1 - window, 0)
            k_BxHxSxK, v_BxHxSxK = (lax.dynamic_slice_in_dim(x, first, width, 2) for x in (k_BxHxSxK, v_BxHxSxK))
            query_slot, start_B = query_slot - first, start_B - first
        plan = _Plan(dtype, drop_rate, query_slot, T, window, custom_derivatives)
        return _forward(plan, (q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, start_B, dropout_key))[0]
    query_block = min(T, query_block or min(128, max(64, T // 4)))
    widest = S if window is None else min(S, window + query_block - 1)
    if group_scores is None:
        # Groups run one after another, so on several devices they would wait for each other.
        grouped = platform(q_BxHxTxK) == "cpu" and not is_distributed(q_BxHxTxK)
        group_scores = CPU_SCORES if grouped else B * H * T * S
    rows, heads = _group(B, H, group_scores // (query_block * widest))

    def split(x: Array) -> Array:
        """[B, H, ...] to [groups, rows, heads, ...]; a group is whole rows, or heads of one row."""
        return (
            x.reshape(B // rows, rows, H // heads, heads, *x.shape[2:])
            .swapaxes(1, 2)
            .reshape(-1, rows, heads, *x.shape[2:])
        )

    plan = _Plan(dtype, drop_rate, query_slot, query_block, window, custom_derivatives)
    groups = (B // rows) * (H // heads)
    start_GxR = jnp.repeat(start_B.reshape(-1, rows), H // heads, axis=0)
    keys_G = None if dropout_key is None else jax.random.split(dropout_key, groups)
    attend_groups = _attend if custom_derivatives else _attend_plain
    context = attend_groups(plan, split(q_BxHxTxK), split(k_BxHxSxK), split(v_BxHxSxK), start_GxR, keys_G)
    return context.reshape(B // rows, H // heads, rows, heads, T, K).swapaxes(1, 2).reshape(B, H, T, K)


def _scaled(q_BxHxTxK: Array, scale: float | Array | None) -> Array:
    """The queries times the scores' scale: fewer products than with the scores, in float32, before any rounding."""
    return q_BxHxTxK * (q_BxHxTxK.shape[-1] ** -0.5 if scale is None else scale)


def _group(B: int, H: int, most: int) -> tuple[int, int]:
    """(rows, heads) per group, with at most `most` heads in all but at least one: whole rows, or heads of one row."""
    if most >= H:
        return next(rows for rows in range(min(B, most // H), 0, -1) if B % rows == 0), H
    return 1, next(heads for heads in range(max(1, most), 0, -1) if H % heads == 0)


def _visible(query_slot: int | Array, queries: slice, keys: slice, start_B: Array, window: int | None) -> Array:
    """Which slots of `keys` each of `queries` (counted from `query_slot`) may see: [B, 1, T, S]."""
    slot_S = jnp.arange(keys.start, keys.stop)
    query_slot_Tx1 = (query_slot + jnp.arange(queries.start, queries.stop))[:, None]
    causal_TxS = slot_S[None] <= query_slot_Tx1
    start_Bx1x1x1 = start_B[:, None, None, None]
    started_Bx1x1xS = slot_S[None, None, None] >= start_Bx1x1x1
    visible_Bx1xTxS = causal_TxS[None, None] & started_Bx1x1xS
    if window is None:
        return visible_Bx1xTxS
    before_Tx1 = query_slot_Tx1 - window
    return visible_Bx1xTxS & (slot_S[None] > before_Tx1)[None, None]


def _scores(q_BxHxTxK: Array, k_BxHxSxK: Array, visible: Array, dtype: str, custom_derivatives: bool = True) -> Array:
    scores_BxHxTxS = dot("BHTK,BHSK->BHTS", q_BxHxTxK, k_BxHxSxK, dtype, custom_derivatives)
    return jnp.where(visible, scores_BxHxTxS, MASKED_SCORE)


def _over_groups(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Maps `function` over the leading axis, one group after another."""
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return lax.map(function, arrays)
    return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], arrays)))


# G groups of B rows by H heads each, one after another; T is split into blocks.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q_GxBxHxTxK, k_GxBxHxSxK, v_GxBxHxSxK, start_GxB, keys_G):
    return _attend_plain(plan, q_GxBxHxTxK, k_GxBxHxSxK, v_GxBxHxSxK, start_GxB, keys_G)


def _attend_plain(plan, *arrays):
    return _over_groups(functools.partial(_forward, plan), arrays)[0]


def _attend_forward(plan, *arrays):
    out, kept = _over_groups(functools.partial(_forward, plan), arrays)
    return out, (*arrays[:4], out, *kept)


def _attend_backward(plan, residuals, g_GxBxHxTxK):
    return *_over_groups(functools.partial(_backward, plan), (*residuals, g_GxBxHxTxK)), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(plan: _Plan, arrays: Any) -> tuple[Array, Any]:
    """(out, (highest, total, masks)): per query the highest score and the sum of exp(score - highest), [B, H, T, 1];
    per block the dropout mask."""
    q, k, v, start_B, key = arrays
    T, S = q.shape[2], k.shape[2]
    outs, highests, totals, masks = [], [], [], []
    for i, (block, keys) in enumerate(plan.blocks(T, S)):
        visible = _visible(plan.query_slot, block, keys, start_B, plan.window)
        scores = _scores(q[:, :, block], k[:, :, keys], visible, plan.dtype, plan.custom_derivatives)
        # The result does not depend on this value, so no derivative passes through it.
        highest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if key is not None:
            masks.append(dropout_mask(jax.random.fold_in(key, i), plan.drop_rate, scores.shape))
            weights = keep(weights, masks[-1], plan.drop_rate)
        outs.append(dot("BHTS,BHSK->BHTK", weights, v[:, :, keys], plan.dtype, plan.custom_derivatives) / total)
        highests.append(highest)
        totals.append(total)
    return _joined(outs), (_joined(highests), _joined(totals), masks)


def _backward(plan: _Plan, arrays: Any) -> tuple[Array, Array, Array]:
    q, k, v, start_B, out, highest, total, masks, g = arrays
    T, S = q.shape[2], k.shape[2]
    # Equals sum_S weights * d_weights, without a pass over them.
    inner_BxHxTx1 = jnp.sum(g * out, axis=-1, keepdims=True)
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for i, (block, keys) in enumerate(plan.blocks(T, S)):
        visible = _visible(plan.query_slot, block, keys, start_B, plan.window)
        # Not exp(scores - logsumexp): in a row that sees nothing, float32 loses the logarithm next to MASKED_SCORE.
        scores = _scores(q[:, :, block], k[:, :, keys], visible, plan.dtype)
        weights = jnp.exp(scores - highest[:, :, block]) / total[:, :, block]
        d_weights = dot("BHTK,BHSK->BHTS", g[:, :, block], v[:, :, keys], plan.dtype)
        dropped = weights
        if masks:
            dropped, d_weights = (keep(x, masks[i], plan.drop_rate) for x in (weights, d_weights))
        d_scores = jnp.where(visible, weights * (d_weights - inner_BxHxTx1[:, :, block]), 0)
        dqs.append(dot("BHTS,BHSK->BHTK", d_scores, k[:, :, keys], plan.dtype))
        dk = dk.at[:, :, keys].add(_transposed_dot(q[:, :, block], d_scores, plan.dtype))
        dv = dv.at[:, :, keys].add(_transposed_dot(g[:, :, block], dropped, plan.dtype))
    return _joined(dqs).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _joined(blocks: list[Array]) -> Array:
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def _transposed_dot(x_BxHxTxK, y_BxHxTxS, dtype):
    """Computes y^T x as (x^T y)^T, [B, H, S, K], because x is the smaller one to transpose. The barriers keep XLA from
    folding the transposes into the product: on CPU a batched product whose left operand is transposed has no bfloat16
    kernel."""
    x_BxHxKxT = lax.optimization_barrier(x_BxHxTxK.astype(dtype).swapaxes(2, 3))
    product_BxHxKxS = dot("BHKT,BHTS->BHKS", x_BxHxKxT, y_BxHxTxS, dtype)
    return lax.optimization_barrier(product_BxHxKxS).swapaxes(2, 3)
