"""Causal scaled dot-product attention, forward and backward, without ever holding all [T, T] weights. (With
dropout, the backward pass keeps its mask, a byte a weight.)

Source: Vaswani et al. 2017, section 3.2.1; the backward pass, which recomputes the weights
instead of storing them, is that of Dao et al. 2022 (FlashAttention), section 3.

Sizes: B batch, H heads, T queries, S keys, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.ops import dot, dropout_mask, keep

# Finite, so that a row with every score masked gives a uniform row and not NaN.
MASKED_SCORE = -1e30


def attention(
    q_BxHxTxK: Array,
    k_BxHxSxK: Array,
    v_BxHxSxK: Array,
    *,
    dtype: str,
    query_slot: int | Array = 0,
    start_B: Array | None = None,
    drop_rate: float = 0.0,
    dropout_key: Array | None = None,
    query_block: int = 128,
    inspect: Callable[[Array], Any] | None = None,
) -> Array:
    """softmax(q k^T / sqrt(K)) v with causal masking, in float32. Returns [B, H, T, K].

    Query t stands at slot `query_slot` + t and sees the key slots from `start_B` (0 by default) up to and
    including its own. Where `query_slot` is a Python int, queries are taken in blocks of `query_block`, each
    against only the keys it can see, so most of the masked half is never computed.

    Args:
        q_BxHxTxK: queries.
        k_BxHxSxK: keys.
        v_BxHxSxK: values.
        dtype: type of the products' operands.
        query_slot: slot of the first query; a Python int when known at trace time.
        start_B: first visible slot of each row, int32.
        drop_rate: dropout on the attention weights.
        dropout_key: its key; None for no dropout.
        query_block: queries a block.
        inspect: called at trace time with the whole weights [B, H, T, S]; costs their memory.
    """
    T, S = q_BxHxTxK.shape[2], k_BxHxSxK.shape[2]
    if not isinstance(query_slot, int) or inspect is not None:
        query_block = T
    firsts = range(0, T, query_block)
    keys = [None] * len(firsts) if dropout_key is None else list(jax.random.split(dropout_key, len(firsts)))
    q_BxHxTxK = q_BxHxTxK * q_BxHxTxK.shape[3] ** -0.5
    blocks = []
    for first, key in zip(firsts, keys, strict=True):
        q = q_BxHxTxK[:, :, first : first + query_block]
        slot = query_slot + first
        seen = min(S, slot + q.shape[2]) if isinstance(slot, int) else S
        visible = _visible(slot, q.shape[2], seen, start_B)
        kept = None if key is None else dropout_mask(key, drop_rate, (*q.shape[:3], seen))
        k, v = k_BxHxSxK[:, :, :seen], v_BxHxSxK[:, :, :seen]
        if inspect is not None:
            inspect(_weights(q, k, visible, dtype)[0])
        blocks.append(_attend(dtype, drop_rate, q, k, v, visible, kept))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def _visible(query_slot: int | Array, T: int, S: int, start_B: Array | None) -> Array:
    """Which of S key slots each of T queries may see: [T, S], or [B, 1, T, S] with row starts."""
    slot_S, query_slot_T = jnp.arange(S), query_slot + jnp.arange(T)
    visible_TxS = slot_S <= query_slot_T[:, None]
    return visible_TxS if start_B is None else visible_TxS & (slot_S >= start_B[:, None, None, None])


def _scores(q_BxHxTxK, k_BxHxSxK, visible, dtype) -> Array:
    return jnp.where(visible, dot("BHTK,BHSK->BHTS", q_BxHxTxK, k_BxHxSxK, dtype), MASKED_SCORE)


def _weights(q_BxHxTxK, k_BxHxSxK, visible, dtype) -> tuple[Array, Array, Array]:
    """The attention weights [B, H, T, S], and per row the highest score and the sum of exp(score - highest)."""
    scores = _scores(q_BxHxTxK, k_BxHxSxK, visible, dtype)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - highest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    return exponentials / total, highest, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(dtype, drop_rate, q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, visible, kept):
    return _attend_forward(dtype, drop_rate, q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, visible, kept)[0]


def _attend_forward(dtype, drop_rate, q, k, v, visible, kept):
    weights, highest, total = _weights(q, k, visible, dtype)
    dropped = weights if kept is None else keep(weights, kept, drop_rate)
    out = dot("BHTS,BHSK->BHTK", dropped, v, dtype)
    return out, (q, k, v, visible, kept, out, highest, total)


def _attend_backward(dtype, drop_rate, residuals, g_BxHxTxK):
    q, k, v, visible, kept, out, highest, total = residuals
    # Not exp(scores - log-sum-exp): for a row that sees nothing, float32 loses the logarithm beside MASKED_SCORE.
    weights = jnp.exp(_scores(q, k, visible, dtype) - highest) / total
    d_weights = dot("BHTK,BHSK->BHTS", g_BxHxTxK, v, dtype)
    if kept is not None:
        d_weights = keep(d_weights, kept, drop_rate)
    # sum_S weights * d_weights, without a pass over them.
    inner_BxHxTx1 = jnp.sum(g_BxHxTxK * out, axis=-1, keepdims=True)
    d_scores = jnp.where(visible, weights * (d_weights - inner_BxHxTx1), 0)
    dropped = weights if kept is None else keep(weights, kept, drop_rate)
    dq = dot("BHTS,BHSK->BHTK", d_scores, k, dtype)
    dk = _transposed_dot(q, d_scores, dtype)
    dv = _transposed_dot(g_BxHxTxK, dropped, dtype)
    no_visible, no_kept = jax.tree.map(lambda mask: np.zeros(mask.shape, jax.dtypes.float0), (visible, kept))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), no_visible, no_kept


def _transposed_dot(x_BxHxTxK, y_BxHxTxS, dtype):
    """y^T x as (x^T y)^T, [B, H, S, K], because x is the small one to transpose. The barriers keep XLA from folding
    the transposes into the product: on CPU a batched product with a transposed left side has no bfloat16 kernel."""
    x_BxHxKxT = jax.lax.optimization_barrier(x_BxHxTxK.astype(dtype).swapaxes(2, 3))
    product_BxHxKxS = dot("BHKT,BHTS->BHKS", x_BxHxKxT, y_BxHxTxS, dtype)
    return jax.lax.optimization_barrier(product_BxHxKxS).swapaxes(2, 3)


_attend.defvjp(_attend_forward, _attend_backward)
