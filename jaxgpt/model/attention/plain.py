"""Attention as the formula says it: all weights at once, in plain XLA. The other backends are measured against it.

Source: Vaswani et al. 2017, section 3.2.1. The band is the local part of Child et al. 2019 (Sparse Transformer),
section 4.3. Sizes: B batch, H heads, T queries, S keys, K head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.model.cache import Seen
from jaxgpt.model.ops import dot, dropout

# Finite, so that a row in which every score is masked becomes uniform rather than NaN.
MASKED_SCORE = -1e30


def reference(
    q_BxHxTxK: Array,
    seen: Seen,
    *,
    window: int | None = None,
    scale: float | Array | None = None,
    drop_rate: float = 0.0,
    dropout_key: Array | None = None,
    custom_derivatives: bool = True,
) -> Array:
    """softmax(q k^T scale) v. Holds all weights, [B, H, T, S], for the backward pass too.

    The arguments are those of `blocked`; dropout draws other masks.
    """
    weights_BxHxTxS = attention_weights(q_BxHxTxK, seen, window, scale, custom_derivatives)
    weights_BxHxTxS = dropout(weights_BxHxTxS, drop_rate, dropout_key)
    return dot("BHTS,BHSK->BHTK", weights_BxHxTxS, seen.v_BxHxSxK, seen.dtype, custom_derivatives)


def attention_weights(
    q_BxHxTxK: Array, seen: Seen, window: int | None, scale: float | Array | None, custom_derivatives: bool = True
) -> Array:
    """All weights, softmax(q k^T scale): [B, H, T, S]."""
    T, S = q_BxHxTxK.shape[2], seen.k_BxHxSxK.shape[2]
    visible = visible_slots(seen.query_slot, slice(0, T), slice(0, S), seen.first_BxQ(), window)
    return jax.nn.softmax(
        masked_scores(scaled(q_BxHxTxK, scale), seen.k_BxHxSxK, visible, seen.dtype, custom_derivatives)
    )


def scaled(q_BxHxTxK: Array, scale: float | Array | None) -> Array:
    """The queries times the scores' scale: fewer products than with the scores, in float32, before any rounding."""
    return q_BxHxTxK.astype(jnp.float32) * (q_BxHxTxK.shape[-1] ** -0.5 if scale is None else scale)


def visible_slots(query_slot: int | Array, queries: slice, keys: slice, first_BxQ: Array, window: int | None) -> Array:
    """Which slots of `keys` each of `queries` (counted from `query_slot`) may see: [B, 1, T, S]. `first_BxQ` is
    `Seen`'s, of all queries."""
    slot_S = jnp.arange(keys.start, keys.stop)
    query_slot_Tx1 = (query_slot + jnp.arange(queries.start, queries.stop))[:, None]
    causal_TxS = slot_S[None] <= query_slot_Tx1
    first_BxQ = first_BxQ if first_BxQ.shape[1] == 1 else first_BxQ[:, queries]
    started_Bx1xTxS = slot_S[None, None, None] >= first_BxQ[:, None, :, None]
    visible_Bx1xTxS = causal_TxS[None, None] & started_Bx1xTxS
    if window is None:
        return visible_Bx1xTxS
    before_Tx1 = query_slot_Tx1 - window
    return visible_Bx1xTxS & (slot_S[None] > before_Tx1)[None, None]


def masked_scores(
    q_BxHxTxK: Array, k_BxHxSxK: Array, visible: Array, dtype: str, custom_derivatives: bool = True
) -> Array:
    """q k^T, float32, with `MASKED_SCORE` where a query may not see a slot."""
    scores_BxHxTxS = dot("BHTK,BHSK->BHTS", q_BxHxTxK, k_BxHxSxK, dtype, custom_derivatives)
    return jnp.where(visible, scores_BxHxTxS, MASKED_SCORE)
