"""Products and attention over whole sequences on a CPU, `sequences.cc`: Intel's MKL multiplies, and what stands between
two products is computed while it is in a core's cache.

`ComputeConfig.mkl` asks for it. `jaxgpt.prepare` and the trainer turn that on where it pays: where MKL (extra [mkl]) is
installed and the kernel is built, on Intel's processors; in bfloat16, on those with AMX. On others XLA is the faster
one. JAXGPT_KERNEL=0 keeps it off.

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
_ENTRY_POINTS = (
    "cblas_sgemm",
    "cblas_gemm_bf16bf16f32",
    *(f"cblas_gemm_bf16bf16f32_{part}" for part in ("pack_get_size", "pack", "compute")),
)


def missing() -> str:
    """What these functions lack here; '' if they can be called."""
    if not kernel.available():
        return "the kernel is not built or not used (jaxgpt build-kernel)"
    return connect(kernel.path())


def preferred(dtype: str) -> bool:
    """Whether this is there, and faster than XLA for products with operands of this type."""
    return _suits(dtype) and not missing()


def preferred_or_built(dtype: str) -> bool:
    """`preferred`, for what runs long: builds the kernel first, if it can be built and is all that is missing."""
    if _suits(dtype) and _mkl() is not None and kernel.can_build():
        kernel.build_once()
    return preferred(dtype)


def _suits(dtype: str) -> bool:
    """Whether MKL is faster than XLA on this processor."""
    units = {"float32": "avx2", "bfloat16": "amx_bf16"}
    return {"GenuineIntel", units.get(dtype)} <= _processor_flags()


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
def connect(file: Path) -> str:
    """Gives the kernel in a file MKL's functions, and MKL no threads of its own, in all of this process. Returns what
    is lacking, or ''."""
    if (library := _mkl()) is None:
        return "MKL is not installed (pip install 'jaxgpt[mkl]')"
    try:
        mkl, ours = ctypes.CDLL(library), ctypes.CDLL(str(file))
        functions = [ctypes.cast(getattr(mkl, name), ctypes.c_void_p) for name in _ENTRY_POINTS]
    except (OSError, AttributeError) as error:
        return f"MKL cannot be used ({error})"
    sequential, int32 = 1, 0
    if mkl.MKL_Set_Threading_Layer(sequential) != sequential or mkl.MKL_Set_Interface_Layer(int32) != int32:
        return "MKL is already in use in this process, with threads of its own or 64-bit sizes"
    ours.JaxgptUseLibrary((ctypes.c_void_p * len(functions))(*functions))
    return ""


def product(subscripts: str, x: Array, y: Array) -> Callable[[Array, Array], Array] | None:
    """A function that computes an einsum of two arrays like these, in float32; None if it is not a single large matrix
    product of float32 or bfloat16.

    Raises:
        ConfigError: if MKL or the kernel is missing.
    """
    if reason := missing():
        raise ConfigError(f"mkl=True cannot be had: {reason}; jaxgpt.prepare turns it on where it can")
    if x.dtype != y.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
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
    """x y in float32, [M, N], for matrices x [M, K] and y [K, N], both float32 or both bfloat16. One that is flipped is
    given as its transpose."""
    shape = x.shape[1 if x_flipped else 0], y.shape[0 if y_flipped else 1]
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call("jaxgpt_product", result, vmap_method="sequential")
    return call(x, y, x_flipped=x_flipped, y_flipped=y_flipped)


def attention(
    block: int, factor: float, q: Array, k: Array, v: Array, first_BxT: Array, masks: Sequence[Array]
) -> tuple[Array, Array]:
    """softmax(q k^T) v, where query t sees the keys from `first_BxT` to t.

    Args:
        block: queries per block, at most 512.
        factor: what the weights that dropout keeps are multiplied by.
        q, k, v: [B, H, T, K], all float32 or all bfloat16.
        first_BxT: int32.
        masks: per block, which weights dropout keeps, bool [B, H, its queries, keys up to its last query]; or nothing.

    Returns:
        (y, stats): y [B, H, T, K], and per query the highest score and the sum of exp(score - highest), [B, H, T, 2];
            both float32.
    """
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((*q.shape[:3], 2), jnp.float32)
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
    """The gradients of q, k and v, float32 [B, H, T, K].

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
