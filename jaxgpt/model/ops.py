"""The arithmetic that the whole model shares: one matrix product, one LayerNorm, one dropout.

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
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata

from jaxgpt.cpu import kernel
from jaxgpt.parallel.sharding import is_distributed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def dot(subscripts: str, x: Array, y: Array, dtype: str) -> Array:
    """`jnp.einsum(subscripts, x, y)` with operands in `dtype` and a float32 result, forward and backward.

    The result type matters for speed as well as for accuracy: on CPU a bfloat16 product reaches the
    bfloat16 units only if its result is float32, and its transpose only if the cotangent is bfloat16 too,
    hence the custom derivative.

    Every index must appear in two of the three terms (true of any matrix product).
    """
    return _einsum(subscripts, x.astype(dtype), y.astype(dtype))


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    # HIGHEST keeps float32 from being rounded to TF32 or bfloat16 on accelerators.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _dot_forward(subscripts, x, y, dtype):
    # Types travel as empty arrays, because residuals must be arrays.
    kinds = jnp.empty(0, x.dtype), jnp.empty(0, y.dtype)
    operands = x.astype(dtype), y.astype(dtype)
    # The product itself and not `dot`, in which a rematerialisation's policy would not see it.
    return _einsum(subscripts, *operands), (*operands, *kinds)


def _dot_backward(subscripts, dtype, residuals, g):
    x, y, x_kind, y_kind = residuals
    operands, out = subscripts.split("->")
    x_indices, y_indices = operands.split(",")
    g = g.astype(dtype)
    dx = dot(f"{out},{y_indices}->{x_indices}", g, y, dtype)
    summed = "".join(i for i in out if i in x_indices and i not in y_indices)
    kept = "".join(i for i in out if i not in summed)

    def dy_on_cpu(g: Array, x: Array) -> Array:
        # With the summed axes first, as a weight's gradient has them, a bfloat16 product runs at 40 % of its speed.
        # XLA would undo a mere transpose.
        g = jnp.einsum(f"{out}->{kept}{summed}", g)
        g = with_layout_constraint(g, Layout(tuple(range(g.ndim))))
        return dot(f"{kept}{summed},{x_indices}->{y_indices}", g, x, dtype)

    def dy_elsewhere(g: Array, x: Array) -> Array:
        return dot(f"{out},{x_indices}->{y_indices}", g, x, dtype)

    # On several devices a layout would be a gathering.
    cpu = dy_on_cpu if dtype == "bfloat16" and not is_distributed() else dy_elsewhere
    dy = lax.platform_dependent(g, x, cpu=cpu, default=dy_elsewhere)
    return dx.astype(x_kind.dtype), dy.astype(y_kind.dtype)


dot.defvjp(_dot_forward, _dot_backward)


# Most rows of x for which reading an int8 weight costs more than the arithmetic does.
FEW_ROWS = 64


def linear(x_BxTxD: Array, weight_OxD: Array, scale_O: Array | None, dtype: str, native_kernel: bool = False) -> Array:
    """x W^T in float32, [B, T, O], for W in any type; an int8 W comes with a scale for each of its rows.

    Operands are rounded to `dtype`, except that an int8 W is exact in either. On a CPU few rows of x take forms
    of the product that read W once, in the type it is stored in: that of `jaxgpt.cpu.kernel`, which has no gradient, if
    `native_kernel` says so, or else XLA's. There, with an int8 W, 2 to `FEW_ROWS` rows of x are rounded to 15
    bits, and have no gradient.
    """
    B, T = x_BxTxD.shape[:2]

    def full(x_BxTxD: Array, weight_OxD: Array) -> Array:
        return dot("BTD,OD->BTO", x_BxTxD, weight_OxD, dtype)

    on_cpu = full
    # The kernel takes W as it is.
    exact = weight_OxD.dtype != jnp.float32 or dtype == "float32"
    if native_kernel and B * T <= kernel.MOST_ROWS and exact and not is_distributed():
        on_cpu = functools.partial(_native, dtype=dtype)
    elif B * T == 1:
        on_cpu = functools.partial(_one_row, dtype=dtype)
    elif weight_OxD.dtype == jnp.int8 and B * T <= FEW_ROWS:
        on_cpu = functools.partial(_few_rows, dtype=dtype)
    if on_cpu is full:
        y_BxTxO = full(x_BxTxD, weight_OxD)
    else:
        y_BxTxO = lax.platform_dependent(x_BxTxD, weight_OxD, cpu=on_cpu, default=full)
    return y_BxTxO if scale_O is None else y_BxTxO * scale_O


def _one_row(x_1x1xD: Array, weight_OxD: Array, dtype: str) -> Array:
    """x W^T for a single row. Written so, XLA on CPU makes one loop over W that converts it on the way. Called,
    and not inlined, because otherwise it fuses the neighbours into that loop, computing them for every output, and
    moves the conversion of W out of the loop over tokens."""

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


def _rounded(x: Array, dtype: str) -> Array:
    """x rounded to `dtype`, as float32. (XLA may drop a conversion there and back.)"""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)


def _few_rows(x_BxTxD: Array, weight_OxD: Array, dtype: str) -> Array:
    """x W^T for an int8 W, in integers: each row of x as two int8 digits, 15 bits in all, on a scale of its own.

    x = s (h + l / 254), with h the nearest integer to x / s and l that to 254 times what h leaves.
    """
    x_BxTxD = lax.stop_gradient(_rounded(x_BxTxD, dtype))
    largest = jnp.max(jnp.abs(x_BxTxD), axis=-1, keepdims=True)
    steps = jnp.where(largest == 0, 1, largest) / 127  # NaN and infinity reach the result through it
    high = jnp.round(x_BxTxD / steps)
    low = jnp.round(254 * (x_BxTxD / steps - high))
    digits_2xBxTxD = jnp.stack([high, low]).astype(jnp.int8)
    y_2xBxTxO = jnp.einsum("NBTD,OD->NBTO", digits_2xBxTxD, weight_OxD, preferred_element_type=jnp.int32)
    y_2xBxTxO = y_2xBxTxO.astype(jnp.float32)
    return steps * (y_2xBxTxO[0] + y_2xBxTxO[1] / 254)


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
    functions: dict[str, Callable[[Array], Array]] = {
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
    }
    return functions[name]


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the others up to keep the mean; no key, no dropout."""
    return x if key is None or rate == 0 else keep(x, dropout_mask(key, rate, x.shape), rate)


def keep(x: Array, mask: Array, rate: float) -> Array:
    """x where the mask of `dropout_mask` keeps it, scaled up by 1 / (1 - rate); else 0."""
    return jnp.where(mask, x * jnp.float32(2**16 / (2**16 - _dropped(rate))), jnp.float32(0))


def _dropped(rate: float) -> int:
    return min(max(1, round(rate * 2**16)), 2**16 - 1)


def dropout_mask(key: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Which elements dropout keeps, bool: each with probability 1 - rate.

    Draws 16 random bits an element, not 32: on CPU the random bits are the cost. The rate is therefore
    rounded to a multiple of 2^-16, and `keep` scales by the rounded one, so the mean is exact.
    """
    words = jax.random.bits(key, (math.ceil(math.prod(shape) / 2),), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: math.prod(shape)].reshape(shape)
    return bits >= _dropped(rate)
