"""What a device can do at most: how fast it reads its memory, multiplies matrices and starts a program. The same lines
of JAX measure a CPU, a GPU and a TPU; only the sizes differ, so that a measurement takes a millisecond or more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Sizes(NamedTuple):
    """Bytes to read, and rows and columns of the matrices."""

    read_bytes: int
    matrix: int


CPU, ACCELERATOR = Sizes(2**29, 2048), Sizes(2**32, 8192)


def sizes(platform: str) -> Sizes:
    """Those for a platform, as JAX names it."""
    return CPU if platform == "cpu" else ACCELERATOR


# What the operands of a product are, in memory, and how they are multiplied: float32 exactly, and TF32 as NVIDIA's
# tensor cores multiply float32 (on a CPU the two are the same).
PRODUCTS = {
    "float32": ("float32", lax.Precision.HIGHEST),
    "tf32": ("float32", lax.Precision.DEFAULT),
    "bfloat16": ("bfloat16", lax.Precision.DEFAULT),
}


def read(read_bytes: int) -> Callable[[], Any]:
    """Sums so many bytes of float32."""
    x = jnp.ones(read_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(x).block_until_ready()


def matmul(matrix: int, product: str) -> Callable[[], Any]:
    """Multiplies two square matrices, as `PRODUCTS` says, into one of float32."""
    dtype, precision = PRODUCTS[product]
    x, y = (jax.random.normal(jax.random.key(i), (matrix, matrix)).astype(dtype) for i in range(2))
    multiply = jax.jit(
        lambda x, y: jnp.einsum("ij,kj->ik", x, y, precision=precision, preferred_element_type=jnp.float32)
    )
    return lambda: multiply(x, y).block_until_ready()


def launch() -> Callable[[], Any]:
    """Runs a program that adds 1 to a number, and waits for it."""
    x = jnp.zeros((), jnp.float32)
    increment = jax.jit(lambda x: x + 1)
    return lambda: increment(x).block_until_ready()


def device() -> dict[str, str]:
    """The platform, as JAX names it, and the first of its devices, such as "NVIDIA H100 80GB HBM3"; and how many there
    are, if several."""
    devices = jax.devices()
    several = f", the first of {len(devices)}" if len(devices) > 1 else ""
    return {"platform": devices[0].platform, "device": f"{devices[0].device_kind}{several}"}


def peak_device_bytes() -> int | None:
    """The peak of the first device's memory in this process; None for a CPU, whose memory is the process's."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")
