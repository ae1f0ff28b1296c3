"""Compares a kernel with float64. `jaxgpt.cpu.kernel` runs `python -m jaxgpt.cpu.kernel_check FILE` on what it has
built."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.cpu import kernel, sequences
from jaxgpt.errors import KernelError


def check(file: Path) -> None:
    """Loads a kernel and compares it with float64, for all its dtypes, and for odd sizes.

    Raises:
        KernelError: if they differ, or if a row's result depends on how many rows come with it.
    """
    if not kernel.load(file):
        raise KernelError(f"{file} does not load")
    rng = np.random.default_rng(0)
    for sizes, dtype in itertools.product([(7, 1), (100, 33), (3072, 700), (9000, 3)], ("float32", "bfloat16", "int8")):
        _check_products(rng, *sizes, dtype)
    for K, dtype, window in [(5, "float32", None), (80, "bfloat16", 7), (64, "float32", 3), (80, "int8", 7)]:
        _check_attention(rng, K, dtype, window)
    for size in (7, 768):
        _check_layer_norm(rng, size)
    sequences.lacks_mkl(file)  # if it is there, it is checked too
    if not sequences.lacks(file):
        for dtype in ("float32", "bfloat16"):
            _check_sequences(rng, dtype)


def attention_in_float64(
    q_BxHxTxK: Any, k_BxHxSxK: Any, v_BxHxSxK: Any, slot: Any, start_B: Any, window: int | None
) -> Any:
    """What `kernel.attention` computes, as the formula says it."""
    scores_BxHxTxS = q_BxHxTxK.astype(float) @ np.swapaxes(k_BxHxSxK.astype(float), 2, 3)
    slot_S, slot_Tx1 = np.arange(k_BxHxSxK.shape[2]), slot + np.arange(q_BxHxTxK.shape[2])[:, None]
    seen = (slot_S <= slot_Tx1) & (slot_S >= start_B[:, None, None, None])
    if window is not None:
        seen &= slot_S > slot_Tx1 - window
    weights = np.where(seen, np.exp(scores_BxHxTxS - scores_BxHxTxS.max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True) @ v_BxHxSxK.astype(float)


def rounded_to_16_bits(x_RxD: np.ndarray) -> np.ndarray:
    """x as `kernel.few_rows` reads it beside weights in int8: multiples of its row's largest value / 32767, float64."""
    most_Rx1 = np.abs(x_RxD).max(-1, keepdims=True)
    integers = np.rint(x_RxD.astype(np.float64) * (np.float32(32767) / most_Rx1))
    return integers * (most_Rx1 / np.float32(32767))


def _check_products(rng: np.random.Generator, inner: int, outer: int, dtype: str) -> None:
    x = rng.normal(size=(kernel.MOST_ROWS, inner)).astype(np.float32)
    weight = np.asarray(jnp.asarray(30 * rng.normal(size=(outer, inner))).astype(dtype))
    *fewer, whole = jax.device_get(_products(x, weight))
    read = rounded_to_16_bits(x) if dtype == "int8" else x.astype(np.float64)
    _compare(f"rows by [{outer}, {inner}] {dtype}", whole, read @ weight.astype(np.float64).T)
    for y in fewer:
        if not np.array_equal(y, whole[: len(y)]):
            raise KernelError(f"{len(y)} rows by [{outer}, {inner}] {dtype}: not those of {len(whole)} rows")


@jax.jit
def _products(x_RxD: Array, weight_OxD: Array) -> list[Array]:
    """The products of the first rows of x: 1 to more than the kernel takes at a time, and all."""
    return [kernel.few_rows(x_RxD[:rows], weight_OxD) for rows in (*range(1, 10), x_RxD.shape[0])]


def _check_attention(rng: np.random.Generator, K: int, dtype: str, window: int | None) -> None:
    q: Any = (rng.normal(size=(2, 3, 4, K)) / K**0.5).astype(np.float32)
    k: Any
    v: Any
    k, v = (jnp.asarray(rng.normal(size=(2, 3, 50, K)), "float32") for _ in range(2))
    if dtype == "int8":
        k, v = (
            (jnp.round(40 * x).astype(dtype), jnp.asarray(rng.uniform(0.01, 0.05, (2, 3, 50, 1)), "float32"))
            for x in (k, v)
        )
    else:
        k, v = k.astype(dtype), v.astype(dtype)
    slot, start_B = 45, jnp.array([0, 9], jnp.int32)
    wide_k, wide_v = (np.asarray(x[0], float) * np.asarray(x[1]) if dtype == "int8" else np.asarray(x) for x in (k, v))
    want = attention_in_float64(q, wide_k, wide_v, slot, np.asarray(start_B), window)
    _compare(f"attention, {K} {dtype}, window {window}", kernel.attention(q, k, v, slot, start_B, window), want)


def _check_layer_norm(rng: np.random.Generator, size: int) -> None:
    x, scale, shift = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, size), size, size))
    wide = np.asarray(x, float)
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    _compare(
        f"LayerNorm of {size}", kernel.layer_norm(x, scale, shift, 1e-5), normed * np.asarray(scale) + np.asarray(shift)
    )


def _check_sequences(rng: np.random.Generator, dtype: str) -> None:
    x, y = (jnp.asarray(rng.normal(size=size)).astype(dtype) for size in ((520, 70), (610, 70)))
    wide_x, wide_y = np.asarray(x, float), np.asarray(y, float)
    _compare(f"a large product in {dtype}", sequences.matrix_product(x, y, False, True), wide_x @ wide_y.T)
    for other in ("int8",) if dtype == "float32" else ("float32", "int8"):
        beside = jnp.asarray(30 * rng.normal(size=(610, 70))).astype(other)
        read = np.asarray(beside.astype(dtype), float)  # as the product reads it
        _compare(f"{dtype} by {other}", sequences.matrix_product(x, beside, False, True), wide_x @ read.T)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, 90, 40)) / 4).astype(dtype) for _ in range(3))
    q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = (a.swapaxes(1, 2) for a in (q, k, v))
    start_BxT = jnp.zeros((2, 90), jnp.int32)
    y_BxTxHxK, _ = sequences.attention(64, 1.0, q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, start_BxT, ())
    wide_q, wide_k, wide_v = (np.asarray(a, float) for a in (q, k, v))
    want = attention_in_float64(wide_q, wide_k, wide_v, 0, np.zeros(2, int), None)
    rounded = 1e-5 if dtype == "float32" else 1e-2  # weights are rounded too
    _compare(f"attention over whole sequences in {dtype}", y_BxTxHxK.swapaxes(1, 2), want, rounded)
    if dtype == "bfloat16":
        bias = jnp.asarray(rng.normal(size=610), jnp.float32)
        u = wide_x @ wide_y.T / 8 + np.asarray(bias)
        want = u / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3)))
        _compare("gelu of a product", sequences.gelu_of_product(x / 8, y, bias).astype(jnp.float32), want, 0.005)


def _compare(what: str, got: Any, want: np.ndarray, tolerance: float = 1e-5) -> None:
    if not (error := np.abs(np.asarray(got) - want).max()) < tolerance * np.abs(want).max():
        raise KernelError(f"{what}: off by {error}")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]))
    except KernelError as error:
        sys.exit(str(error))
