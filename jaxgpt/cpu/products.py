"""Forms of the model's arithmetic that XLA runs well on a CPU, found by measuring. Each computes the same as the plain
form next to its caller, and replaces it where `lax.platform_dependent` is lowered for a CPU.

Sizes: B batch, T queries, D inputs, O outputs, R rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata

from jaxgpt.cpu import kernel

# Largest number of rows of x for which reading an int8 weight costs more than the arithmetic.
FEW_ROWS = 64

Product = Callable[[Array, Array], Array]


def few_rows_product(rows: int, weight_OxD: Array, dtype: str, native_kernel: bool) -> Product | None:
    """A form of x W^T (x [B, T, D], W [O, D], the result [B, T, O]) for so few rows of x that reading W dominates the
    cost; None if there are more.

    All forms read W once, in the dtype it is stored in. With `native_kernel` the form is that of `jaxgpt.cpu.kernel`,
    which has no gradient and does not round W, so it is not used for a float32 W that `dtype` would round; beside an
    int8 W it rounds x to 16 bits. The others
    run in XLA; with an int8 W, 2 to `FEW_ROWS` rows of x are rounded to 15 bits and have no gradient.
    """
    exact = weight_OxD.dtype != jnp.float32 or dtype == "float32"
    if native_kernel and rows <= kernel.MOST_ROWS and exact:
        return functools.partial(_native, dtype=dtype)
    if rows == 1:
        return functools.partial(_one_row, dtype=dtype)
    if weight_OxD.dtype == jnp.int8 and rows <= FEW_ROWS:
        return functools.partial(_in_integers, dtype=dtype)
    return None


def _one_row(x_1x1xD: Array, weight_OxD: Array, dtype: str) -> Array:
    """x W^T for a single row. From this form XLA on CPU makes one loop over W that converts it on the way. The product
    is a call that is not inlined, because otherwise XLA fuses neighbouring operations into that loop, computing them
    for every output, and moves the conversion of W out of the loop over tokens."""

    @jax.jit
    def product(x_1xD: Array, weight_OxD: Array) -> Array:
        if weight_OxD.dtype == jnp.float32:
            weight_OxD = _rounded(weight_OxD, dtype)
        return x_1xD @ weight_OxD.astype(jnp.float32).T

    with set_xla_metadata(inlineable="false"):
        return product(_rounded(x_1x1xD[0], dtype), weight_OxD)[None]


def _native(x_BxTxD: Array, weight_OxD: Array, dtype: str) -> Array:
    y_RxO = kernel.few_rows(_rounded(x_BxTxD.reshape(-1, x_BxTxD.shape[-1]), dtype), weight_OxD)
    return y_RxO.reshape(*x_BxTxD.shape[:2], -1)


def _in_integers(x_BxTxD: Array, weight_OxD: Array, dtype: str) -> Array:
    """x W^T for an int8 W: each row of x as two int8 digits, 15 bits in all, with its own scale.

    x = s (h + l / 254), where h is the integer nearest to x / s, and l the one nearest to 254 (x / s - h).
    """
    x_BxTxD = lax.stop_gradient(_rounded(x_BxTxD, dtype))
    largest = jnp.max(jnp.abs(x_BxTxD), axis=-1, keepdims=True)
    steps = jnp.where(largest == 0, 1, largest) / 127  # NaN and infinity reach the result through this
    high = jnp.round(x_BxTxD / steps)
    low = jnp.round(254 * (x_BxTxD / steps - high))
    digits_2xBxTxD = jnp.stack([high, low]).astype(jnp.int8)
    y_2xBxTxO = jnp.einsum("NBTD,OD->NBTO", digits_2xBxTxD, weight_OxD, preferred_element_type=jnp.int32)
    y_2xBxTxO = y_2xBxTxO.astype(jnp.float32)
    return steps * (y_2xBxTxO[0] + y_2xBxTxO[1] / 254)


def _rounded(x: Array, dtype: str) -> Array:
    """x rounded to `dtype`, as float32. (XLA may drop a conversion there and back.)"""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)


def laid_out(x: Array, indices: str, wanted: str) -> Array:
    """x with its axes reordered from `indices` to `wanted` (as in an einsum), in memory too. XLA would fold a plain
    transpose back into the product that reads it, and a bfloat16 product whose summed axes come first, as in a weight's
    gradient, runs at 40 % of its speed."""
    x = jnp.einsum(f"{indices}->{wanted}", x)
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def computed_once(x: Array) -> Array:
    """x, computed before the product that reads it. Where the product needs a transposed copy, as a weight's gradient
    may, XLA would compute x again for it: here the whole chain of sums of the residual stream's gradients."""
    return lax.optimization_barrier(x)


def logsumexp(logits_xV: Array) -> Array:
    """log sum exp over the last axis, a few rows at a time: XLA on CPU computes the exponentials of a long sum in one
    thread."""
    *lead, V = logits_xV.shape
    row = functools.partial(jax.nn.logsumexp, axis=-1)
    return lax.map(row, logits_xV.reshape(-1, V), batch_size=64).reshape(lead)
