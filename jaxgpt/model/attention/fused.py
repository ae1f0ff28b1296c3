"""Attention as one kernel, which keeps the scores on the chip: cuDNN's on NVIDIA GPUs, Splash on TPUs.

Both are those that JAX brings along. What they do not know is arranged around them: scores are scaled by scaling the
queries; rows with padding on the left are rolled to the left, where causality alone hides the padding; a length that
Splash's blocks do not divide is padded on the right, where causality hides it too; documents that are kept apart are
Splash's segments; and on several devices each runs the kernel on its own rows and heads. The rest is refused, by
`cudnn_refusal` and `splash_refusal`, and nowhere else.

While decoding, cuDNN can take one query per row against a cache, and does so where it is asked for by name: whether
that is faster than XLA's two products has not been measured.

Neither kernel has run on its own hardware yet. Splash is tested interpreted on a CPU, and compiled for TPUs by `jaxgpt
plan`; of cuDNN, the calls that reach it are tested, and that they are lowered for CUDA.

Source: Dao et al. 2022 (FlashAttention). Sizes: B batch, H heads, T queries and keys, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.model.attention.plain import scaled, visible_slots
from jaxgpt.model.cache import Seen
from jaxgpt.parallel import divides, per_device, platform

# Queries and keys of a block of Splash, largest first: multiples of 128 lanes, of which one divides the padded length.
SPLASH_BLOCKS = (512, 256, 128)


def cudnn(q_BxHxTxK: Array, seen: Seen, *, window: int | None = None, scale: Any = None, **_: Any) -> Array:
    """Attention by cuDNN, through `jax.nn.dot_product_attention`. The arguments are those of `blocked`."""
    if not from_start(q_BxHxTxK, seen):
        return _cudnn_decode(q_BxHxTxK, seen, window, scale)
    return _fused(functools.partial(_cudnn_kernel, window), q_BxHxTxK, seen, scale)


def splash(
    q_BxHxTxK: Array, seen: Seen, *, window: int | None = None, scale: Any = None, interpret: bool = False, **_: Any
) -> Array:
    """Attention by Splash, the Pallas kernel in `jax.experimental`. The arguments are those of `blocked`.

    `interpret` runs the kernel on any platform, operation by operation and slowly, for tests.
    """
    return _fused(functools.partial(_splash_kernel, window, interpret), q_BxHxTxK, seen, scale)


def from_start(q_BxHxTxK: Array, seen: Seen) -> bool:
    """Whether the queries are those of whole sequences, and see nothing but these."""
    return q_BxHxTxK.shape == seen.k_BxHxSxK.shape and isinstance(seen.query_slot, int) and seen.query_slot == 0


def cudnn_refusal(q_BxHxTxK: Array, seen: Seen, **options: Any) -> str | None:
    """Why cuDNN cannot compute a call; None if it can. The arguments are those of `choice.choose`."""
    if reason := _refusal(q_BxHxTxK, seen, "gpu", "an NVIDIA GPU", **options):
        return reason
    T, K = q_BxHxTxK.shape[2:]
    if T > 1 and not from_start(q_BxHxTxK, seen):
        return f"it continues a sequence in a cache by one query per row, and these are {T}"
    if seen.start_BxT is not None:
        return "it does not keep the documents of a sequence apart (separate_documents)"
    if not _gpu_is_here():  # a plan for GPUs elsewhere, of which JAX would only say that there is no cuDNN
        return f"its head_dim is a multiple of 8 up to 128, and this is {K}" if K % 8 or K > 128 else None
    q, k, v = (jax.ShapeDtypeStruct(x.shape, seen.dtype) for x in (q_BxHxTxK, seen.k_BxHxSxK, seen.v_BxHxSxK))
    try:  # JAX knows which versions, GPUs and head_dim there is a kernel for, and checks it as it traces
        jax.eval_shape(functools.partial(_cudnn_kernel, None), q, k, v)
    except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        return f"JAX says: {error}"
    return None


def splash_refusal(q_BxHxTxK: Array, seen: Seen, **options: Any) -> str | None:
    """Why Splash cannot compute a call; None if it can. The arguments are those of `choice.choose`."""
    if reason := _refusal(q_BxHxTxK, seen, "tpu", "a TPU", **options):
        return reason
    if not from_start(q_BxHxTxK, seen):
        return "it reads a sequence from its start, and these queries continue one in a cache"
    return None


def _gpu_is_here() -> bool:
    return jax.default_backend() == "gpu"


def _refusal(
    q_BxHxTxK: Array,
    seen: Seen,
    needed: str,
    name: str,
    *,
    return_weights: bool = False,
    dropout_key: Array | None = None,
    custom_derivatives: bool = True,
    **_: Any,
) -> str | None:
    """What neither kernel can compute."""
    here = platform(q_BxHxTxK)
    reasons = {
        f"it needs {name}, and the program is for a {here}": here != needed,
        f"it multiplies in bfloat16, and dtype is {seen.dtype}": seen.dtype != "bfloat16",
        "it does not return the attention weights": return_weights,
        "it has no dropout of the attention weights": dropout_key is not None,
        "it has no forward-mode derivatives, which custom_derivatives=False asks for": not custom_derivatives,
        f"the mesh divides no batch of {q_BxHxTxK.shape[0]} rows and {q_BxHxTxK.shape[1]} heads": not divides(
            q_BxHxTxK, "BHTK"
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _fused(kernel: Callable[..., Array], q_BxHxTxK: Array, seen: Seen, scale: Any) -> Array:
    """Runs a kernel that maps q, k and v of the compute type, and where each document starts, if there are several in a
    row, to the causal context, on every device."""

    def run(q_BxHxTxK: Array, k_BxHxTxK: Array, v_BxHxTxK: Array, *starts: Array) -> Array:
        operands = (x.astype(seen.dtype) for x in (scaled(q_BxHxTxK, scale), k_BxHxTxK, v_BxHxTxK))
        if seen.start_B is None:
            return kernel(*operands, *starts).astype(jnp.float32)
        # A row's padding goes to its end, where no query of the row sees it, and back.
        (start_B,) = starts
        roll = jax.vmap(functools.partial(jnp.roll, axis=1))
        return roll(kernel(*(roll(x, -start_B) for x in operands)).astype(jnp.float32), start_B)

    starts = [start for start in (seen.start_B, seen.start_BxT) if start is not None]
    letters = ("BHTK", "BHTK", "BHTK", *("BT"[: start.ndim] for start in starts))
    return per_device(run, letters, q_BxHxTxK, seen.k_BxHxSxK, seen.v_BxHxSxK, *starts)


def _cudnn_kernel(window: int | None, *operands: Array) -> Array:
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (x.swapaxes(1, 2) for x in operands)
    # The band is counted in positions before the query's own. None is the dense form.
    band = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, scale=1.0, is_causal=True, local_window_size=band, implementation="cudnn"
    ).swapaxes(1, 2)


def _cudnn_decode(q_BxHx1xK: Array, seen: Seen, window: int | None, scale: Any) -> Array:
    """One query per row against a cache."""
    slots, K = seen.k_BxHxSxK.shape[2:]

    def run(q_BxHx1xK: Array, k_BxHxSxK: Array, v_BxHxSxK: Array, visible_Bx1x1xS: Array, length: Array) -> Array:
        # cuDNN's layout is [B, T, H, K], to which a cache would have to be copied for each token. But B H rows of one
        # head are the same numbers in the same places.
        H = q_BxHx1xK.shape[1]
        q, k, v = (x.astype(seen.dtype).reshape(-1, x.shape[2], 1, K) for x in (q_BxHx1xK, k_BxHxSxK, v_BxHxSxK))
        context = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=jnp.repeat(visible_Bx1x1xS, H, axis=0),
            # No slot beyond this is read.
            key_value_seq_lengths=jnp.broadcast_to(length, q.shape[:1]),
            scale=1.0,
            implementation="cudnn",
        )
        return context.reshape(q_BxHx1xK.shape).astype(jnp.float32)

    visible = visible_slots(seen.query_slot, slice(0, 1), slice(0, slots), seen.first_BxQ(), window)
    length = jnp.asarray(seen.query_slot + 1, jnp.int32)
    operands = scaled(q_BxHx1xK, scale), seen.k_BxHxSxK, seen.v_BxHxSxK, visible, length
    return per_device(run, ("BHTK", "BHSK", "BHSK", "BTTS", ""), *operands)


def _splash_kernel(window: int | None, interpret: bool, *operands: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # takes half a second to import

    length = operands[0].shape[2]
    # No query of the sequence sees a key after its end.
    T = -(-length // SPLASH_BLOCKS[-1]) * SPLASH_BLOCKS[-1]
    after = [(0, 0), (0, T - length)]
    operands = tuple(jnp.pad(x, [(0, 0), *after, (0, 0)] if x.ndim == 4 else after) for x in operands)
    H, segments = operands[0].shape[1], operands[3:]
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    mask = library.CausalMask((T, T)) if window is None else library.LocalMask((T, T), (window - 1, 0), 0)
    kernel = library.make_splash_mha(
        library.MultiHeadMask([mask] * H),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # A document's tokens have one start, which no other document of the row has.
    context = jax.vmap(kernel)(*operands[:3], *(library.SegmentIds(start_BxT, start_BxT) for start_BxT in segments))
    return context[:, :, :length]
