"""Attention in blocks of queries, dense or banded, forward and backward, for CPUs and wherever no kernel fits. The
[T, T] weights are never held as a whole. (With dropout, the backward pass keeps the dropout mask, one byte per weight.)

The backward pass, which recomputes the weights instead of storing them, follows Dao et al. 2022 (FlashAttention),
section 3.

Sizes: B batch, H heads, T queries, S keys, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.model.attention.plain import masked_scores, scaled, visible_slots
from jaxgpt.model.cache import Seen
from jaxgpt.model.ops import dot, dropout_mask, keep
from jaxgpt.parallel import is_distributed, platform

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
    k_BxHxSxK, v_BxHxSxK, query_slot, _, dtype, _ = seen
    first_BxQ = seen.first_BxQ()
    B, H, T, K = q_BxHxTxK.shape
    S = k_BxHxSxK.shape[2]
    q_BxHxTxK = scaled(q_BxHxTxK, scale)
    if window is not None and window >= S:
        window = None  # everything is in the band
    if not isinstance(query_slot, int):
        # T is small while decoding: there is nothing to split. But only the band of a long cache is read.
        if window is not None and (width := window + T - 1) < S:
            first = jnp.maximum(query_slot + 1 - window, 0)
            k_BxHxSxK, v_BxHxSxK = (lax.dynamic_slice_in_dim(x, first, width, 2) for x in (k_BxHxSxK, v_BxHxSxK))
            query_slot, first_BxQ = query_slot - first, first_BxQ - first
        plan = _Plan(dtype, drop_rate, query_slot, T, window, custom_derivatives)
        return _forward(plan, (q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, first_BxQ, dropout_key))[0]
    query_block = min(T, query_block or block_length(T))
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
    first_GxBxQ = jnp.repeat(first_BxQ.reshape(-1, rows, first_BxQ.shape[1]), H // heads, axis=0)
    keys_G = None if dropout_key is None else jax.random.split(dropout_key, groups)
    attend_groups = _attend if custom_derivatives else _attend_plain
    context = attend_groups(plan, split(q_BxHxTxK), split(k_BxHxSxK), split(v_BxHxSxK), first_GxBxQ, keys_G)
    return context.reshape(B // rows, H // heads, rows, heads, T, K).swapaxes(1, 2).reshape(B, H, T, K)


def block_length(T: int) -> int:
    """Queries per block, unless the caller says how many: few enough that few masked scores are computed, and enough to
    keep the products large."""
    return min(T, 128, max(64, T // 4))


def _group(B: int, H: int, most: int) -> tuple[int, int]:
    """(rows, heads) per group, with at most `most` heads in all but at least one: whole rows, or heads of one row."""
    if most >= H:
        return next(rows for rows in range(min(B, most // H), 0, -1) if B % rows == 0), H
    return 1, next(heads for heads in range(max(1, most), 0, -1) if H % heads == 0)


def _over_groups(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Maps `function` over the leading axis, one group after another."""
    if jax.tree.leaves(arrays)[0].shape[0] > 1:
        return lax.map(function, arrays)
    return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], arrays)))


# G groups of B rows by H heads each, one after another; T is split into blocks.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q_GxBxHxTxK, k_GxBxHxSxK, v_GxBxHxSxK, first_GxBxQ, keys_G):
    return _attend_plain(plan, q_GxBxHxTxK, k_GxBxHxSxK, v_GxBxHxSxK, first_GxBxQ, keys_G)


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
    q, k, v, first_BxQ, key = arrays
    T, S = q.shape[2], k.shape[2]
    outs, highests, totals, masks = [], [], [], []
    for i, (block, keys) in enumerate(plan.blocks(T, S)):
        visible = visible_slots(plan.query_slot, block, keys, first_BxQ, plan.window)
        scores = masked_scores(q[:, :, block], k[:, :, keys], visible, plan.dtype, plan.custom_derivatives)
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
    q, k, v, first_BxQ, out, highest, total, masks, g = arrays
    T, S = q.shape[2], k.shape[2]
    # Equals sum_S weights * d_weights, without a pass over them.
    inner_BxHxTx1 = jnp.sum(g * out, axis=-1, keepdims=True)
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for i, (block, keys) in enumerate(plan.blocks(T, S)):
        visible = visible_slots(plan.query_slot, block, keys, first_BxQ, plan.window)
        # Not exp(scores - logsumexp): in a row that sees nothing, float32 loses the logarithm next to MASKED_SCORE.
        scores = masked_scores(q[:, :, block], k[:, :, keys], visible, plan.dtype)
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
