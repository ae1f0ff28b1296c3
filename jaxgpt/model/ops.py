"""The arithmetic that the whole model shares: one matrix product, one LayerNorm, one dropout.

Everything here is a pure function of arrays. Matrix products take their operands in the compute type and
return float32, unless told otherwise; everything else is float32. Sizes: B batch, T queries, D inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxgpt.config import ComputeConfig
from jaxgpt.cpu import kernel, products, sequences
from jaxgpt.parallel import gathered, is_distributed, scattered


def dot(
    subscripts: str,
    x: Array,
    y: Array,
    dtype: str,
    custom_derivatives: bool = True,
    *,
    result: str = "float32",
    stored: PartitionSpec | None = None,
    native: bool = False,
) -> Array:
    """`jnp.einsum(subscripts, x, y)` with operands in `dtype` and a float32 result, forward and backward.

    The result type matters for speed as well as for accuracy: on CPU a bfloat16 product uses the
    bfloat16 units only if its result is float32, and its transpose only if the cotangent is bfloat16 too,
    hence the custom derivative. Without it, JAX's own derivatives are used, which also support forward mode.

    Every index must appear in two of the three terms (true of any matrix product).

    Args:
        subscripts, x, y: as of `jnp.einsum`.
        dtype: type of the operands.
        custom_derivatives: whether to use the hand-written derivative.
        result: type of the result, to which sums are rounded once they are complete on a device: those that
            several devices add up are exchanged in it. The derivative of a bfloat16 x is bfloat16 likewise.
        stored: the layout of y, if it is a weight: y is then `gathered` in `dtype` before the product, forward and
            again backward, and its gradient is `scattered` in float32 after the product. Left to itself, XLA passes the
            parts of a small weight round a ring of devices, and writes and reads a whole result for each of them.
        native: whether one CPU multiplies large matrices with `jaxgpt.cpu.sequences`, forward and backward. Only the
            custom derivative can, and it has then none of its own.
    """
    if custom_derivatives:
        return _dot(subscripts, x, y, dtype, result, stored, native)
    return _einsum(subscripts, x.astype(dtype), gathered(y.astype(dtype), stored), result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
def _dot(
    subscripts: str, x: Array, y: Array, dtype: str, result: str, stored: PartitionSpec | None, native: bool
) -> Array:
    return _einsum(subscripts, x.astype(dtype), gathered(_operand(y, dtype, native), stored), result, native)


def _operand(y: Array, dtype: str, native: bool) -> Array:
    """y in `dtype`, or a y in float32 or int8 for `_einsum` to convert where that takes no copy: a weight, and its copy
    would be made in every step."""
    return y if native and y.dtype in (jnp.float32, jnp.int8) and not is_distributed(y) else y.astype(dtype)


def _einsum(subscripts: str, x: Array, y: Array, result: str = "float32", native: bool = False) -> Array:
    # HIGHEST keeps float32 from being rounded to TF32 or bfloat16 on accelerators.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    # Devices exchange a product's sums in the type that the product itself returns.
    summed = result if is_distributed(x) else "float32"
    einsum = functools.partial(jnp.einsum, subscripts, precision=precision, preferred_element_type=jnp.dtype(summed))
    distributed = is_distributed(x) or is_distributed(y)
    on_cpu = sequences.product(subscripts, x, y) if native and not distributed else None

    def default(x: Array, y: Array) -> Array:
        return einsum(x, y.astype(x.dtype))

    product = default(x, y) if on_cpu is None else lax.platform_dependent(x, y, cpu=on_cpu, default=default)
    return product.astype(result)


def _dot_forward(subscripts, x, y, dtype, result, stored, native):
    # Dtypes are passed as empty arrays, because residuals must be arrays.
    types = jnp.empty(0, x.dtype), jnp.empty(0, y.dtype)
    x, y = x.astype(dtype), _operand(y, dtype, native)
    # The einsum itself and not `dot`, inside which a rematerialisation policy would not see the product. What is kept
    # is the part of y, not all of it.
    return _einsum(subscripts, x, gathered(y, stored), result, native), (x, y, *types)


def _dot_backward(subscripts, dtype, result, stored, native, residuals, g):
    x, y, x_type, y_type = residuals
    operands, out = subscripts.split("->")
    x_indices, y_indices = operands.split(",")
    g = g.astype(dtype)
    x_result = "bfloat16" if x_type.dtype == jnp.bfloat16 else "float32"
    dx = dot(f"{out},{y_indices}->{x_indices}", g, y, dtype, result=x_result, stored=stored, native=native)
    summed = "".join(i for i in out if i in x_indices and i not in y_indices)
    # Several axes to sum over become one ("BTO,BTD->OD" becomes "BO,BD->OD"): XLA on a CPU then transposes g inside the
    # product, instead of making a transposed copy. On several devices, merging axes would gather the arrays.
    if len(summed) > 1 and out.startswith(summed) and x_indices.startswith(summed) and not is_distributed(g):
        g, x = (lax.collapse(array, 0, len(summed)) for array in (g, x))
        out, x_indices, summed = (indices.replace(summed, summed[0]) for indices in (out, x_indices, summed))
    transposed = "".join(i for i in out if i not in summed) + summed

    def dy_on_cpu(g: Array, x: Array) -> Array:
        # XLA wants the operands of a bfloat16 product in one layout; the kernel takes any.
        if dtype == "bfloat16" and not (native and sequences.product(f"{out},{x_indices}->{y_indices}", g, x)):
            return dot(f"{transposed},{x_indices}->{y_indices}", products.laid_out(g, out, transposed), x, dtype)
        return dy_elsewhere(products.computed_once(g), x)

    def dy_elsewhere(g: Array, x: Array) -> Array:
        return dot(f"{out},{x_indices}->{y_indices}", g, x, dtype, native=native)

    # On several devices a layout constraint would gather the array.
    cpu = dy_elsewhere if is_distributed(g) else dy_on_cpu
    dy = scattered(lax.platform_dependent(g, x, cpu=cpu, default=dy_elsewhere), stored)
    return dx.astype(x_type.dtype), dy.astype(y_type.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


class Matrix(NamedTuple):
    """A parameter matrix `[*out, D]`; if it is int8, one scale per row, `[*out]`; and its layout on a mesh, as in
    `dot`."""

    weight: Array
    scale: Array | None
    stored: PartitionSpec | None = None


def linear(x_BxTxD: Array, matrix: Matrix, bias: Array | None, compute: ComputeConfig) -> Array:
    """x W^T + bias, `[B, T, *out]`, in the activations' type, for a float32 bias `[*out]` or none."""
    y = product(x_BxTxD, matrix, compute, compute.activation_dtype)
    return y if bias is None else (y.astype(jnp.float32) + widen(bias, y)).astype(y.dtype)


def activated_linear(
    x_BxTxD: Array, matrix: Matrix, bias: Array | None, compute: ComputeConfig, name: str
) -> Array | None:
    """The `activation` of that name of what `linear` returns, in one call of the C++ kernel that rounds it as the next
    product reads it, to `compute.dtype`; None if there is no such call. Differentiated, it is the plain form, whose
    values the backward pass needs."""
    if name != "gelu_tanh" or not compute.native_sequences or not compute.custom_derivatives:
        return None
    if is_distributed(matrix.weight) or is_distributed(x_BxTxD):
        return None
    native = sequences.gelu(x_BxTxD, matrix.weight, compute.dtype)
    if native is None:
        return None

    def on_cpu(x_BxTxD: Array, weight: Array, bias: Array | None) -> Array:
        return native(x_BxTxD, weight, bias).astype(compute.activation_dtype)

    def plain(x_BxTxD: Array, weight: Array, bias: Array | None) -> Array:
        return activation(name)(linear(x_BxTxD, matrix._replace(weight=weight), bias, compute))

    either = jax.custom_vjp(functools.partial(lax.platform_dependent, cpu=on_cpu, default=plain))
    either.defvjp(functools.partial(jax.vjp, plain), lambda pull_back, g: pull_back(g))
    return either(x_BxTxD, matrix.weight, bias)


def product(x_BxTxD: Array, matrix: Matrix, compute: ComputeConfig, result: str = "float32") -> Array:
    """x W^T, `[B, T, *out]`, of type `result`.

    Operands are rounded to `compute.dtype`, except that an int8 W is exact in either. On a CPU, few rows of x use a
    specialised form (`jaxgpt.cpu.products`).
    """
    weight, scale, stored = matrix
    out, D = weight.shape[:-1], weight.shape[-1]
    if len(out) == 2 and scale is None and is_distributed(weight):
        # If the weight's first axes were merged, XLA would gather the whole weight in the backward pass.
        custom = compute.custom_derivatives
        return dot("BTD,NOD->BTNO", x_BxTxD, weight, compute.dtype, custom, result=result, stored=stored)
    # One product whatever the number of output axes; otherwise XLA on CPU transposes the weight.
    scale_O = None if scale is None else scale.reshape(-1)
    y_BxTxO = _flat_product(x_BxTxD, weight.reshape(-1, D), compute, result, stored if len(out) == 1 else None)
    if scale_O is not None:
        y_BxTxO = (y_BxTxO.astype(jnp.float32) * widen(scale_O, y_BxTxO)).astype(result)
    return y_BxTxO.reshape(*x_BxTxD.shape[:2], *out)


def _flat_product(
    x_BxTxD: Array, weight_OxD: Array, compute: ComputeConfig, result: str, stored: PartitionSpec | None
) -> Array:
    def plain(x_BxTxD: Array, weight_OxD: Array) -> Array:
        custom, native = compute.custom_derivatives, compute.native_sequences
        return dot(
            "BTD,OD->BTO", x_BxTxD, weight_OxD, compute.dtype, custom, result=result, stored=stored, native=native
        )

    rows = math.prod(x_BxTxD.shape[:2])
    distributed = is_distributed(weight_OxD) or is_distributed(x_BxTxD)
    native_kernel = compute.native_kernel and not distributed
    on_cpu = products.few_rows_product(rows, weight_OxD, compute.dtype, native_kernel)
    if on_cpu is None:
        return plain(x_BxTxD, weight_OxD)

    def cpu(x_BxTxD: Array, weight_OxD: Array) -> Array:
        return on_cpu(x_BxTxD, weight_OxD).astype(result)

    return lax.platform_dependent(x_BxTxD, weight_OxD, cpu=cpu, default=plain)


def widen(x: Array, like: Array) -> Array:
    """x with leading axes of size 1 up to the rank of `like`, which NumPy's broadcasting adds implicitly."""
    return lax.expand_dims(x, range(like.ndim - x.ndim))


def layer_norm(x: Array, scale: Array, shift: Array | None, eps: float, native_kernel: bool = False) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + shift over the last axis, in float32.

    The variance is the biased one (divided by n), computed from the centred values: E[x^2] - E[x]^2
    cancels catastrophically. Source: Ba et al. 2016; eps inside the root as in GPT-2. On a CPU, few rows of x use
    `native_kernel`.
    """

    def plain(x: Array, scale: Array, shift: Array | None) -> Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * lax.rsqrt(variance + eps) * widen(scale.astype(jnp.float32), x)
        return y if shift is None else y + widen(shift.astype(jnp.float32), x)

    x = x.astype(jnp.float32)
    if native_kernel and kernel.few(x) and not is_distributed(x):
        return lax.platform_dependent(x, scale, shift, cpu=functools.partial(kernel.layer_norm, eps=eps), default=plain)
    return plain(x, scale, shift)


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function behind `GPTConfig.activation`, computed in float32 and returned in its argument's type.

    "gelu_tanh" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the form GPT-2 was trained with; "gelu" is
    x times the standard normal CDF, computed with erf (Hendrycks & Gimpel 2016); "silu", from there too, is x times the
    logistic sigmoid.
    """
    functions: dict[str, Callable[[Array], Array]] = {
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
    }
    return lambda x: functions[name](x.astype(jnp.float32)).astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the others to keep the mean. Without a key, returns x."""
    return x if key is None or rate == 0 else keep(x, dropout_mask(key, rate, x.shape), rate)


def keep(x: Array, mask: Array, rate: float) -> Array:
    """x where the mask of `dropout_mask` keeps it, scaled up by 1 / (1 - rate); else 0."""
    kept = x.astype(jnp.float32) * jnp.float32(keep_factor(rate))
    return jnp.where(mask, kept, jnp.float32(0)).astype(x.dtype)


def keep_factor(rate: float) -> float:
    """What `keep` scales by."""
    return 2**16 / (2**16 - _dropped(rate))


def _dropped(rate: float) -> int:
    return min(max(1, round(rate * 2**16)), 2**16 - 1)


def dropout_mask(key: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Which elements dropout keeps, bool: each with probability 1 - rate.

    Draws 16 random bits per element, not 32: on CPU, generating them dominates the cost. The rate is therefore
    rounded to a multiple of 2^-16, and `keep` scales by the rounded rate, so the mean is exact.
    """
    words = jax.random.bits(key, (math.ceil(math.prod(shape) / 2),), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: math.prod(shape)].reshape(shape)
    return bits >= _dropped(rate)
