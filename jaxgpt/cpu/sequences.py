"""Products and attention over whole sequences on a CPU, `sequences.cc`; what stands between two products is computed
while it is in a core's cache.

In bfloat16, what multiplies are the tile units of a processor with AMX, or the vectors of one with AVX512_BF16; where
there is AVX2 alone, operands are read as float32. In float32 it is MKL on Intel's processors, if that is installed
(extra [mkl]); or else vectors in attention, and XLA everywhere else, which is as fast. `ComputeConfig.native_sequences`
asks for all this. `jaxgpt.prepare` and the trainer turn it on where the processor has AVX2 and the kernel is built.
JAXGPT_KERNEL=0 keeps it off.

Sizes: M rows, N columns, B batch, H heads, T queries and keys, K head_dim.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import math
from collections.abc import Callable, Sequence, Set
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.cpu import kernel
from jaxgpt.errors import ConfigError

# Operations from which a product is worth a call, and rows from which it does not wait for memory.
LEAST_OPERATIONS, LEAST_ROWS = 2**24, 64
# Longest sums that the kernel completes before anything follows, its `kMostSummed`.
MOST_SUMMED = 4096
# What the number of queries in a block of attention is a multiple of: blocks then see no key of a later one.
BLOCKS = 32


def missing(dtype: str) -> str:
    """What the functions lack here for operands of this type; '' if they can be called."""
    if not kernel.available():
        return "the kernel is not built or not used (jaxgpt build-kernel)"
    if dtype == "float32":
        lacks_mkl(kernel.path())  # from here on it is used, if it is there
    return lacks(kernel.path())


def preferred(dtype: str) -> bool:
    """Whether this is there, and faster than XLA for sequences in this type."""
    return _suits(dtype) and not missing(dtype)


def preferred_or_built(dtype: str) -> bool:
    """`preferred`, for what runs long: builds the kernel first, if it can be built and is all that is missing."""
    if _suits(dtype) and kernel.can_build():
        kernel.build_once()
    return preferred(dtype)


def _suits(dtype: str) -> bool:
    """Whether it is faster than XLA on this processor."""
    return dtype in ("float32", "bfloat16") and {"avx2", "fma"} <= _processor_flags()


def _suits_mkl() -> bool:
    """Whether MKL is fast on this processor."""
    return {"GenuineIntel", "avx2"} <= _processor_flags()


@functools.cache
def _processor_flags() -> Set[str]:
    """The words in which Linux describes the processor; none elsewhere."""
    try:
        return frozenset(
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].split()
        )
    except OSError:
        return frozenset()


def _mkl() -> str | None:
    """The file of MKL's library; None if it is not installed."""
    try:
        files = importlib.metadata.files("mkl") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name.startswith("libmkl_rt.so")), None)


@functools.cache
def lacks(file: Path) -> str:
    """What the kernel in a file lacks; '' if nothing."""
    try:
        there = ctypes.CDLL(str(file)).JaxgptHasTiles()
    except (OSError, AttributeError) as error:
        return f"the kernel cannot be used ({error})"
    return "" if there else "it needs a processor and a compiler with AVX2 and FMA"


@functools.cache
def lacks_mkl(file: Path) -> str:
    """Gives the kernel in a file MKL's functions, and MKL no threads of its own, in all of this process. Returns what
    is lacking, or ''."""
    if not _suits_mkl():
        return "that is slow on this processor"
    if (library := _mkl()) is None:
        return "that is not installed (pip install 'jaxgpt[mkl]')"
    try:
        mkl, ours = ctypes.CDLL(library), ctypes.CDLL(str(file))
        function = ctypes.cast(mkl.cblas_sgemm, ctypes.c_void_p)
    except (OSError, AttributeError) as error:
        return f"that cannot be used ({error})"
    sequential, int32 = 1, 0
    if mkl.MKL_Set_Threading_Layer(sequential) != sequential or mkl.MKL_Set_Interface_Layer(int32) != int32:
        return "that is already in use in this process, with threads of its own or 64-bit sizes"
    ours.JaxgptUseLibrary(function)
    return ""


def product(subscripts: str, x: Array, y: Array) -> Callable[[Array, Array], Array] | None:
    """A function that computes an einsum of two arrays like these, in float32; None if it is not a single large matrix
    product of float32 or bfloat16, or if XLA computes it as fast. If one is in bfloat16, the other is rounded to it.
    The second may be in int8, which XLA would first convert, in a pass of its own.

    Raises:
        ConfigError: if the kernel, or what it multiplies with, is missing.
    """
    types = {x.dtype.name, y.dtype.name}
    if not types <= {"float32", "bfloat16", "int8"} or x.dtype == jnp.int8:
        return None
    if reason := missing(min(types)):
        raise ConfigError(f"native_sequences=True cannot be had: {reason}; jaxgpt.prepare turns it on where it can")
    if types == {"float32"} and lacks_mkl(kernel.path()):
        return None
    operands, out = subscripts.split("->")
    x_indices, y_indices = operands.split(",")
    summed = "".join(i for i in x_indices if i not in out)
    rows, columns = ("".join(i for i in indices if i not in summed) for indices in (x_indices, y_indices))
    if not rows or not columns or not summed:
        return None
    if out == columns + rows:
        flipped = product(f"{y_indices},{x_indices}->{out}", y, x)
        return flipped and (lambda x, y: flipped(y, x))
    x_plain, y_plain = x_indices == rows + summed, y_indices == summed + columns
    x_flipped, y_flipped = x_indices == summed + rows, y_indices == columns + summed
    if out != rows + columns or not (x_plain or x_flipped) or not (y_plain or y_flipped):
        return None
    size = dict(zip(x_indices + y_indices, (*x.shape, *y.shape), strict=True))
    M, N, K = (math.prod(size[i] for i in indices) for indices in (rows, columns, summed))
    if 2 * M * N * K < LEAST_OPERATIONS or min(M, N) < LEAST_ROWS:
        return None

    def call(x: Array, y: Array) -> Array:
        x = x.reshape((M, K) if x_plain else (K, M))
        y = y.reshape((K, N) if y_plain else (N, K))
        return matrix_product(x, y, not x_plain, not y_plain).reshape([size[i] for i in out])

    return call


def matrix_product(x: Array, y: Array, x_flipped: bool, y_flipped: bool) -> Array:
    """x y in float32, [M, N], for matrices x [M, K] and y [K, N], each in float32 or bfloat16, y also in int8; a
    float32 one beside one in bfloat16 is rounded to it. One that is flipped is given as its transpose."""
    shape = x.shape[1 if x_flipped else 0], y.shape[0 if y_flipped else 1]
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call("jaxgpt_product", result, vmap_method="sequential")
    return call(x, y, x_flipped=x_flipped, y_flipped=y_flipped)


def gelu(x_BxTxD: Array, weight_OxD: Array, dtype: str) -> Callable[[Array, Array, Array | None], Array] | None:
    """A function of arrays like these and a bias, float32 [O] or None, that computes gelu(x W^T + bias), [B, T, O], for
    the config's "gelu_tanh", with operands and results rounded to bfloat16; it has no derivative. None if `dtype` is
    another, or if the product is small or W is in integers."""
    B, T, D = x_BxTxD.shape
    few = 2 * B * T * weight_OxD.size < LEAST_OPERATIONS or min(B * T, *weight_OxD.shape) < LEAST_ROWS
    if dtype != "bfloat16" or weight_OxD.dtype == jnp.int8 or few or D > MOST_SUMMED or missing(dtype):
        return None

    def call(x_BxTxD: Array, weight_OxD: Array, bias_O: Array | None) -> Array:
        x_RxD, weight_OxD = x_BxTxD.reshape(-1, D).astype(jnp.bfloat16), weight_OxD.astype(jnp.bfloat16)
        bias_O = jnp.zeros(len(weight_OxD), jnp.float32) if bias_O is None else bias_O
        return gelu_of_product(x_RxD, weight_OxD, bias_O).reshape(B, T, -1)

    return call


def gelu_of_product(x_RxD: Array, weight_OxD: Array, bias_O: Array) -> Array:
    """gelu(x W^T + bias), bfloat16 [R, O], for x and W in bfloat16 and a float32 bias; D is at most `MOST_SUMMED`."""
    result = jax.ShapeDtypeStruct((len(x_RxD), len(weight_OxD)), jnp.bfloat16)
    return jax.ffi.ffi_call("jaxgpt_gelu_of_product", result, vmap_method="sequential")(x_RxD, weight_OxD, bias_O)


def attention(
    block: int, factor: float, q: Array, k: Array, v: Array, first_BxT: Array, masks: Sequence[Array]
) -> tuple[Array, Array]:
    """softmax(q k^T) v, where query t sees the keys from `first_BxT` to t.

    Args:
        block: queries per block, a multiple of `BLOCKS`, at most 512.
        factor: what the weights that dropout keeps are multiplied by.
        q, k, v: [B, T, H, K], all float32 or all bfloat16.
        first_BxT: int32.
        masks: per block, which weights dropout keeps, bool [B, H, its queries, keys up to its last query]; or nothing.

    Returns:
        (y, stats): y [B, T, H, K], and per query the highest score and the sum of exp(score - highest), [B, H, T, 2];
            both float32.
    """
    B, T, H, _K = q.shape
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, H, T, 2), jnp.float32)
    call = jax.ffi.ffi_call("jaxgpt_sequence_attention", out, vmap_method="sequential")
    y, stats = call(q, k, v, first_BxT, *masks, block=np.int64(block), factor=np.float32(factor))
    return y, stats


def attention_gradients(
    block: int,
    factor: float,
    q: Array,
    k: Array,
    v: Array,
    first_BxT: Array,
    masks: Sequence[Array],
    inner_BxHxT: Array,
    stats: Array,
    g: Array,
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v, float32 [B, T, H, K].

    Args:
        block, factor, q, k, v, first_BxT, masks, stats: the arguments and the result of `attention`.
        inner_BxHxT: the inner product of y and g, float32.
        g: the gradient of y, of the type of q.
    """
    out = [jax.ShapeDtypeStruct(q.shape, jnp.float32)] * 3
    call = jax.ffi.ffi_call("jaxgpt_sequence_attention_gradients", out, vmap_method="sequential")
    options = {"block": np.int64(block), "factor": np.float32(factor)}
    dq, dk, dv = call(q, k, v, g, first_BxT, inner_BxHxT, stats, *masks, **options)
    return dq, dk, dv
