"""Next-token cross-entropy in float32, whole or in chunks, and the metrics derived from it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.config import ComputeConfig
from jaxgpt.cpu import products
from jaxgpt.model import GPT, dot, widen
from jaxgpt.parallel import is_distributed, lay
from jaxgpt.training.packing import document_starts

# Label of a position that does not count. Negative, so that it can never be a token id.
IGNORE = -1


def inputs_and_labels(ids_BxT1: Any, records: bool) -> tuple[Any, Any]:
    """(inputs, labels) [B, T] of sequences, int32 [B, T + 1], of NumPy or JAX. Of records, an id that is read but not
    learned is its complement, ~id, which is negative: so one array says both, and is laid out as any other batch."""
    if not records:
        return ids_BxT1[:, :-1], ids_BxT1[:, 1:]
    read_BxT1 = ids_BxT1 ^ (ids_BxT1 >> 31)  # the complement of what is negative
    return read_BxT1[:, :-1], ids_BxT1[:, 1:].clip(min=IGNORE)


def cross_entropy(logits_xV: Array, labels_x: Array, custom_derivatives: bool = True) -> tuple[Array, Array]:
    """Sum of -log softmax(logits)[label] over the positions that count, and their number.

    Args:
        logits_xV: float32, [..., V].
        labels_x: ids, [...]; `IGNORE` leaves a position out. Any other id outside [0, V) makes the sum NaN, which
            no run can miss; otherwise XLA would silently clamp it into the vocabulary.
        custom_derivatives: as in `ComputeConfig`.

    Returns:
        (sum in nats, count), float32 scalars. Their quotient is the mean loss.
    """
    logits_xV = logits_xV.astype(jnp.float32)
    V = logits_xV.shape[-1]
    counts_x = labels_x != IGNORE
    per_position = negative_log_likelihood if custom_derivatives else _plain_negative_log_likelihood
    losses_x = per_position(*_as_rows(logits_xV, jnp.clip(labels_x, 0, V - 1))).reshape(labels_x.shape)
    legal_x = (labels_x >= 0) & (labels_x < V)
    losses_x = jnp.where(counts_x, jnp.where(legal_x, losses_x, jnp.nan), 0.0)
    return jnp.sum(losses_x), jnp.sum(counts_x, dtype=jnp.float32)


def _as_rows(logits_xV: Array, labels_x: Array) -> tuple[Array, Array]:
    """Both with all axes of positions as one, as the product made the logits: XLA then writes their gradient over them
    instead of beside them. On several devices, merging axes would gather the arrays."""
    if is_distributed(logits_xV):
        return logits_xV, labels_x
    return logits_xV.reshape(-1, logits_xV.shape[-1]), labels_x.reshape(-1)


@jax.custom_vjp
def negative_log_likelihood(logits_xV: Array, labels_x: Array) -> Array:
    """-log softmax(logits)[label] of float32 logits [..., V] and labels [...], which must be legal. Its custom
    derivative, softmax - one-hot, takes one pass over the logits; JAX's rule for logsumexp keeps the exponentials of
    all of them."""
    return _plain_negative_log_likelihood(logits_xV, labels_x)


def _plain_negative_log_likelihood(logits_xV: Array, labels_x: Array) -> Array:
    return _negative_log_likelihood_forward(logits_xV, labels_x)[0]


def _negative_log_likelihood_forward(logits_xV, labels_x):
    # Rows that lie on several devices must not be processed one after another.
    on_cpu = _logsumexp if is_distributed(logits_xV) else products.logsumexp
    total_x = lax.platform_dependent(logits_xV, cpu=on_cpu, default=_logsumexp)
    chosen_x = jnp.take_along_axis(logits_xV, labels_x[..., None], axis=-1)[..., 0]
    return total_x - chosen_x, (logits_xV, labels_x, total_x)


def _negative_log_likelihood_backward(residuals, g_x):
    logits_xV, labels_x, total_x = residuals
    one_hot_xV = labels_x[..., None] == widen(jnp.arange(logits_xV.shape[-1]), logits_xV)
    return (jnp.exp(logits_xV - total_x[..., None]) - one_hot_xV.astype(jnp.float32)) * g_x[..., None], None


def _logsumexp(logits_xV: Array) -> Array:
    return jax.nn.logsumexp(logits_xV, axis=-1)


negative_log_likelihood.defvjp(_negative_log_likelihood_forward, _negative_log_likelihood_backward)


def head_cross_entropy(
    x_BxTxD: Array, head_VxD: Array, labels_BxT: Array, compute: ComputeConfig, *, chunk: int = 0
) -> tuple[Array, Array]:
    """`cross_entropy` of the logits x head^T; if `chunk` is given, without ever holding all of them.

    Args:
        x_BxTxD: the final norm's output, `GPT.features`.
        head_VxD: the output head, `GPT.head_weight`.
        labels_BxT: as in `cross_entropy`.
        compute: dtype of the product's operands, and which derivatives to use.
        chunk: positions per chunk: at most chunk * V logits exist at a time, in the backward pass too; 0 means all. A
            chunk takes the same positions from every row, so that rows can lie on different devices, and at least
            one.

    Returns:
        (sum in nats, count), as `cross_entropy`.
    """
    B, T, _ = x_BxTxD.shape
    if chunk == 0 or chunk // B >= T:
        return _chunk_loss(x_BxTxD, head_VxD, labels_BxT, compute)
    # As few chunks as the size allows, and as short as possible: padding adds less than one position per chunk.
    chunks = -(-T // max(1, chunk // B))
    length = -(-T // chunks)
    padding = -T % length
    x_BxTxD = jnp.pad(x_BxTxD, ((0, 0), (0, padding), (0, 0)))
    labels_BxT = jnp.pad(labels_BxT, ((0, 0), (0, padding)), constant_values=IGNORE)
    x_xBxCxD, labels_xBxC = (x.reshape(B, -1, length, *x.shape[2:]).swapaxes(0, 1) for x in (x_BxTxD, labels_BxT))
    scan_chunks = _scan_chunks if compute.custom_derivatives else _plain_scan_chunks
    return scan_chunks(compute, x_xBxCxD, head_VxD, labels_xBxC)


def model_loss(
    model: GPT,
    params: Any,
    inputs_BxT: Array,
    labels_BxT: Array,
    *,
    chunk: int = 0,
    dropout_key: Array | None = None,
    separator: int | None = None,
) -> tuple[Array, Array]:
    """`head_cross_entropy` of a model's predictions: (sum in nats, count). Without a key, no dropout; with a separator,
    documents are kept apart (`packing`)."""

    def apply(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply({"params": params}, *args, method=method, **kwargs)

    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    start_BxT = None if separator is None else document_starts(inputs_BxT, separator)
    x_BxTxD, _ = apply("features", inputs_BxT, start_BxT=start_BxT, deterministic=dropout_key is None, rngs=rngs)
    return head_cross_entropy(x_BxTxD, apply("head_weight"), jnp.asarray(labels_BxT), model.compute, chunk=chunk)


def _chunk_loss(x_BxCxD, head_VxD, labels_BxC, compute):
    custom, native = compute.custom_derivatives, compute.native_sequences
    logits_BxCxV = dot("BCD,VD->BCV", x_BxCxD, head_VxD, compute.dtype, custom, native=native)
    return cross_entropy(lay(logits_BxCxV, "BCV"), labels_BxC, custom)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_chunks(compute, x_xBxCxD, head_VxD, labels_xBxC):
    return _plain_scan_chunks(compute, x_xBxCxD, head_VxD, labels_xBxC)


def _plain_scan_chunks(compute, x_xBxCxD, head_VxD, labels_xBxC):
    @jax.checkpoint  # or else the backward pass would keep all logits
    def chunk_loss(x_BxCxD, labels_BxC):
        return _chunk_loss(x_BxCxD, head_VxD, labels_BxC, compute)

    def add_chunk(totals, chunk):
        losses, count = chunk_loss(*chunk)
        return (totals[0] + losses, totals[1] + count), None

    return lax.scan(add_chunk, (jnp.float32(0), jnp.float32(0)), (x_xBxCxD, labels_xBxC))[0]


def _scan_chunks_forward(compute, x_xBxCxD, head_VxD, labels_xBxC):
    """Computes each chunk's gradients while its logits exist, so that the backward pass need not recompute them."""

    def add_chunk(totals, chunk):
        losses, pull, count = jax.vjp(
            lambda x, h: _chunk_loss(x, h, chunk[1], compute), chunk[0], head_VxD, has_aux=True
        )
        dx, dhead = pull(jnp.ones_like(losses))
        return (totals[0] + losses, totals[1] + count, totals[2] + dhead), dx

    start = jnp.float32(0), jnp.float32(0), jnp.zeros(head_VxD.shape, jnp.float32)
    (losses, count, dhead_VxD), dx_xBxCxD = lax.scan(add_chunk, start, (x_xBxCxD, labels_xBxC))
    return (losses, count), (dx_xBxCxD, dhead_VxD.astype(head_VxD.dtype))


def _scan_chunks_backward(compute, residuals, g):
    dx_xBxCxD, dhead_VxD = residuals
    return (
        (dx_xBxCxD.astype(jnp.float32) * g[0]).astype(dx_xBxCxD.dtype),
        (dhead_VxD * g[0]).astype(dhead_VxD.dtype),
        None,
    )


_scan_chunks.defvjp(_scan_chunks_forward, _scan_chunks_backward)


def perplexity(loss: float) -> float:
    """exp of the mean loss in nats; inf where that overflows."""
    return math.inf if loss >= 709 else math.exp(loss)


def bits_per_byte(total_nats: float, n_bytes: int) -> float:
    """Bits that the model needs per byte of the text: comparable between tokenizers, unlike the loss."""
    return total_nats / math.log(2) / n_bytes
