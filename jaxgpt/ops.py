"""The arithmetic that the whole model shares: one matrix product, one attention, one LayerNorm, one dropout.

Everything here is a pure function of arrays. Matrix products take their operands in the compute type and
return float32; all else is float32. Sizes: B batch, T queries, S keys, H heads, K head_dim, D emb_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

# Finite, so that a row with every score masked gives a uniform row and not NaN.
MASKED_SCORE = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def dot(subscripts: str, x: Array, y: Array, dtype: str) -> Array:
    """`jnp.einsum(subscripts, x, y)` with operands in `dtype` and a float32 result, forward and backward.

    The result type matters for speed as well as for accuracy: on CPU a bfloat16 product reaches the
    bfloat16 units only if its result is float32, and its transpose only if the cotangent is bfloat16 too,
    hence the custom derivative.

    Every index must appear in two of the three terms (true of any matrix product).
    """
    # HIGHEST keeps float32 from being rounded to TF32 or bfloat16 on accelerators.
    precision = lax.Precision.HIGHEST if dtype == "float32" else lax.Precision.DEFAULT
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _dot_forward(subscripts, x, y, dtype):
    # Types travel as empty arrays, because residuals must be arrays.
    kinds = jnp.empty(0, x.dtype), jnp.empty(0, y.dtype)
    return dot(subscripts, x, y, dtype), (x.astype(dtype), y.astype(dtype), *kinds)


def _dot_backward(subscripts, dtype, residuals, g):
    x, y, x_kind, y_kind = residuals
    operands, out = subscripts.split("->")
    x_indices, y_indices = operands.split(",")
    dx = dot(f"{out},{y_indices}->{x_indices}", g, y, dtype)
    dy = dot(f"{out},{x_indices}->{y_indices}", g, x, dtype)
    return dx.astype(x_kind.dtype), dy.astype(y_kind.dtype)


dot.defvjp(_dot_forward, _dot_backward)


def layer_norm(x: Array, scale: Array, shift: Array | None, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + shift over the last axis, in float32.

    The variance is the biased one (divided by n), computed from the centred values: E[x^2] - E[x]^2
    cancels catastrophically. Source: Ba et al. 2016; eps inside the root as in GPT-2.
    """
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * lax.rsqrt(variance + eps) * scale.astype(jnp.float32)
    return y if shift is None else y + shift.astype(jnp.float32)


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function behind `GPTConfig.activation`.

    "gelu_tanh" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form GPT-2 was trained with; "gelu" is
    x times the normal distribution function, by erf (Hendrycks & Gimpel 2016).
    """
    return {"gelu_tanh": jax.nn.gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False), "relu": jax.nn.relu}[
        name
    ]


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate); no key, no dropout.

    Draws 16 random bits an element, not 32: on CPU the random bits are the cost. The rate is therefore
    rounded to a multiple of 2^-16, and the scale uses the rounded one, so the mean is exact.
    """
    if key is None or rate == 0:
        return x
    dropped_words = max(1, round(rate * 2**16))
    words = jax.random.bits(key, (math.ceil(x.size / 2),), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: x.size].reshape(x.shape)
    keep = bits >= jnp.uint16(dropped_words)
    return jnp.where(keep, x * (2**16 / (2**16 - dropped_words)), 0.0)


def attention(
    q_BxTxHxK: Array,
    k_BxSxHxK: Array,
    v_BxSxHxK: Array,
    *,
    dtype: str,
    query_slot: int | Array = 0,
    start_B: Array | None = None,
    drop_rate: float = 0.0,
    dropout_key: Array | None = None,
    query_block: int = 128,
    inspect: Callable[[Array], None] | None = None,
) -> Array:
    """Causal scaled dot-product attention, softmax(q k^T / sqrt(K)) v, in float32. Returns [B, T, H, K].

    Query t stands at slot `query_slot` + t and sees the key slots from `start_B` (0 by default) up to and
    including its own. Where `query_slot` is a Python int, queries are taken in blocks of `query_block`, each
    against only the keys it can see: the masked half is never computed and no [T, S] array ever exists, in
    the backward pass either, which recomputes each block's scores.

    Args:
        q_BxTxHxK: queries.
        k_BxSxHxK: keys.
        v_BxSxHxK: values.
        dtype: type of the products' operands.
        query_slot: slot of the first query; static when known at trace time.
        start_B: first visible slot of each row, int32.
        drop_rate: dropout on the attention weights.
        dropout_key: its key; None for no dropout.
        query_block: queries a block.
        inspect: called with the whole weights [B, H, T, S]; asks for one block.
    """
    T, S = q_BxTxHxK.shape[1], k_BxSxHxK.shape[1]
    static = isinstance(query_slot, int)
    if not static or inspect is not None:
        query_block = T
    starts = range(0, T, query_block)
    keys = [None] * len(starts) if dropout_key is None else list(jax.random.split(dropout_key, len(starts)))
    attend = functools.partial(_attend, dtype=dtype, drop_rate=drop_rate, inspect=inspect)
    if len(starts) > 1:
        attend = jax.checkpoint(attend)
    blocks = []
    for i, key in zip(starts, keys, strict=True):
        q = q_BxTxHxK[:, i : i + query_block]
        first = query_slot + i
        seen = min(S, first + q.shape[1]) if static else S
        blocks.append(attend(q, k_BxSxHxK[:, :seen], v_BxSxHxK[:, :seen], first, start_B, key))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, query_slot, start_B, dropout_key, *, dtype, drop_rate, inspect):
    _, T, _, K = q_BxTxHxK.shape
    S = k_BxSxHxK.shape[1]
    scores_BxHxTxS = dot("BTHK,BSHK->BHTS", q_BxTxHxK * K**-0.5, k_BxSxHxK, dtype)
    slot_S, query_slot_T = jnp.arange(S), query_slot + jnp.arange(T)
    visible = slot_S <= query_slot_T[:, None]
    if start_B is not None:
        visible = visible & (slot_S >= start_B[:, None, None, None])
    scores_BxHxTxS = jnp.where(visible, scores_BxHxTxS, MASKED_SCORE)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1)
    if inspect is not None:
        inspect(weights_BxHxTxS)
    weights_BxHxTxS = dropout(weights_BxHxTxS, drop_rate, dropout_key)
    return dot("BHTS,BSHK->BTHK", weights_BxHxTxS, v_BxSxHxK, dtype)
