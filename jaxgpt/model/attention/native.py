"""Attention over whole sequences on a CPU, by `jaxgpt.cpu.sequences`: block by block as in `blocks`, but each block's
scores, weights and products are computed by one thread while they are in its cache.

Source: Dao et al. 2022 (FlashAttention), section 3. Sizes: B batch, H heads, T queries and keys, K head_dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.cpu import sequences
from jaxgpt.model.attention.blocks import block_length
from jaxgpt.model.attention.fused import from_start
from jaxgpt.model.attention.plain import scaled
from jaxgpt.model.cache import Seen
from jaxgpt.model.ops import dropout_mask, keep_factor
from jaxgpt.parallel import is_distributed, platform


def native_attention(
    q_BxHxTxK: Array,
    seen: Seen,
    *,
    window: int | None = None,
    scale: float | Array | None = None,
    drop_rate: float = 0.0,
    dropout_key: Array | None = None,
    **_: Any,
) -> Array:
    """Attention by the C++ kernel. The arguments are those of `blocked`, which draws other dropout masks."""
    B, H, T, _K = q_BxHxTxK.shape
    first_BxT = jnp.broadcast_to(seen.first_BxQ(), (B, T))
    if window is not None:
        first_BxT = jnp.maximum(first_BxT, jnp.arange(T, dtype=jnp.int32)[None] + 1 - window)
    block, factor = sequences.BLOCKS * math.ceil(block_length(T) / sequences.BLOCKS), 1.0
    masks: tuple[Array, ...] = ()
    if dropout_key is not None and drop_rate > 0:
        ends = range(block, T + block, block)
        sizes = [(B, H, min(end, T) - end + block, min(end, T)) for end in ends]
        keys = jax.random.split(dropout_key, len(sizes))
        masks = tuple(dropout_mask(key, drop_rate, size) for key, size in zip(keys, sizes, strict=True))
        factor = keep_factor(drop_rate)
    q, k, v = scaled(q_BxHxTxK, scale), seen.k_BxHxSxK, seen.v_BxHxSxK
    y_BxTxHxK = _attend(block, factor, seen.dtype, *(x.swapaxes(1, 2) for x in (q, k, v)), first_BxT, masks)
    return y_BxTxHxK.swapaxes(1, 2)


def native_refusal(
    q_BxHxTxK: Array,
    seen: Seen,
    *,
    return_weights: bool = False,
    custom_derivatives: bool = True,
    **_: Any,
) -> str | None:
    """Why the kernel cannot compute a call; None if it can. The arguments are those of `choice.choose`."""
    reasons = {
        f"it needs a CPU, and the program is for a {platform(q_BxHxTxK)}": platform(q_BxHxTxK) != "cpu",
        "it runs on one device, and the arrays lie on several": is_distributed(q_BxHxTxK),
        "it reads sequences from their start, and these queries continue one in a cache": not from_start(
            q_BxHxTxK, seen
        ),
        "it does not return the attention weights": return_weights,
        "it has no forward-mode derivatives, which custom_derivatives=False asks for": not custom_derivatives,
    }
    return next((reason for reason, holds in reasons.items() if holds), sequences.missing(seen.dtype) or None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(block, factor, dtype, q, k, v, first_BxT, masks):
    return _attend_forward(block, factor, dtype, q, k, v, first_BxT, masks)[0]


def _attend_forward(block, factor, dtype, q, k, v, first_BxT, masks):
    # Dtypes are passed as empty arrays, because residuals must be arrays.
    types = [jnp.empty(0, x.dtype) for x in (q, k, v)]
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    y, stats = sequences.attention(block, factor, q, k, v, first_BxT, masks)
    return y, (q, k, v, first_BxT, masks, y, stats, types)


def _attend_backward(block, factor, dtype, residuals, g):
    q, k, v, first_BxT, masks, y, stats, types = residuals
    inner_BxHxT, g = jnp.sum(g * y, axis=-1).swapaxes(1, 2), g.astype(dtype)
    gradients = sequences.attention_gradients(block, factor, q, k, v, first_BxT, masks, inner_BxHxT, stats, g)
    return *(gradient.astype(x.dtype) for gradient, x in zip(gradients, types, strict=True)), None, None


_attend.defvjp(_attend_forward, _attend_backward)
