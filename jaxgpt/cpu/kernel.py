"""The optional C++ kernel for the operations of a decode step, `kernel.cc`: `jaxgpt build-kernel` builds it once, into
the user's cache, and the models that `jaxgpt.prepare` returns then use it. Without it, XLA computes the same.

With it, a token's result has the same bits whatever is computed beside it: other rows of a batch, or the tokens that
follow, if there are at most `MOST_ROWS` in all.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

from jaxgpt import startup
from jaxgpt.errors import KernelError

SOURCE = Path(__file__).with_name("kernel.cc")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-w")
MOST_ROWS = 32
# Set to 0 to disable a kernel that was built.
VARIABLE = "JAXGPT_KERNEL"
TARGET = "jaxgpt_few_rows"
# The kernel's functions, by the names that XLA knows them by.
FUNCTIONS = {TARGET: "JaxgptFewRows", "jaxgpt_attention": "JaxgptAttention", "jaxgpt_layer_norm": "JaxgptLayerNorm"}
DIRECTORY = "kernel"  # in the user's cache


def few_rows(x_RxD: Array, weight_OxD: Array) -> Array:
    """x W^T in float32, [R, O], for a float32 x of 1 to `MOST_ROWS` rows and W in float32, bfloat16 or int8.

    Sums are float32. Like the others, this works only on a CPU and if `available()`, and has no gradient.
    """
    result = jax.ShapeDtypeStruct((x_RxD.shape[0], weight_OxD.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")(x_RxD, weight_OxD)


def attention(
    q_BxHxTxK: Array, k_BxHxSxK: Array, v_BxHxSxK: Array, slot: Array, start_B: Array, window: int | None
) -> Array:
    """softmax(q k^T) v in float32, [B, H, T, K], for a float32 q and a cache in float32 or bfloat16, not rounding q.

    Query t is at slot `slot` + t and sees the key slots from `start_B` up to its own, or the last `window` of them.
    """
    B, S = q_BxHxTxK.shape[0], k_BxHxSxK.shape[2]
    if B == 1:  # as the cache holds them: otherwise XLA copies them
        k_BxHxSxK, v_BxHxSxK = k_BxHxSxK[0], v_BxHxSxK[0]
    result = jax.ShapeDtypeStruct(q_BxHxTxK.shape, jnp.float32)
    call = jax.ffi.ffi_call("jaxgpt_attention", result, vmap_method="sequential")
    return call(q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, slot, start_B, window=np.int64(window or S))


def layer_norm(x: Array, scale_D: Array, shift_D: Array | None, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + shift over the last axis, for a float32 x."""
    scale_D = scale_D.astype(jnp.float32)
    shift_D = jnp.zeros_like(scale_D) if shift_D is None else shift_D.astype(jnp.float32)
    x_RxD = x.reshape(-1, x.shape[-1])
    result = jax.ShapeDtypeStruct(x_RxD.shape, jnp.float32)
    call = jax.ffi.ffi_call("jaxgpt_layer_norm", result, vmap_method="sequential")
    return call(x_RxD, scale_D, shift_D, eps=np.float32(eps)).reshape(x.shape)


def few(x: Array) -> bool:
    """Whether the kernel is meant for as many rows as x [..., D] has."""
    return math.prod(x.shape[:-1]) <= MOST_ROWS


def available() -> bool:
    """Whether the kernel is built for this source, jaxlib and processor, and loads. Builds nothing.

    Warns if there is one that cannot be used.
    """
    if os.environ.get(VARIABLE) == "0":
        return False
    try:
        file = built()
    except OSError as error:
        warnings.warn(f"the native kernel is not used: {error}. {VARIABLE}=0 switches it off.", stacklevel=2)
        return False
    return file is not None and _load(file)


def built() -> Path | None:
    """The kernel's file, if there is one.

    Raises:
        OSError: if other users could have written it, or it cannot be inspected.
    """
    try:
        file = path()
    except RuntimeError:  # no home directory
        return None
    if not file.is_file():
        return None
    for directory in (file.parent, file.parent.parent):
        startup.check_private(directory)
    return file


def build() -> Path:
    """Compiles the kernel with $CXX, c++, g++ or clang++, checks it in a separate process, and keeps it.

    Returns:
        The kernel's file.

    Raises:
        KernelError: if there is no compiler, it fails, or the kernel computes wrong results.
        OSError: if the user's cache cannot be written, or others can write to it.
    """
    compiler = next((found for name in (*_chosen(), "c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelError("no C++ compiler: install g++ or clang++, or name one in CXX; without it XLA does the work")
    file = path()
    with tempfile.TemporaryDirectory(dir=startup.private_directory(DIRECTORY)) as work:
        made = Path(work) / file.name
        command = [compiler, *_chosen()[1:], *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(made)]
        _run(command, "the compiler failed")
        check_apart(made)
        made.replace(file)
    return file


def check_apart(file: Path) -> None:
    """Runs `check` in a separate process, because a miscompiled kernel may crash it.

    Raises:
        KernelError: if the kernel does not load, or computes wrong results.
    """
    _run([sys.executable, "-m", "jaxgpt.cpu.kernel", str(file)], "the kernel is wrong")


def _chosen() -> list[str]:
    return shlex.split(os.environ.get("CXX", ""))


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(
            f"{failure} ({shlex.join(command)}): {done.stderr.strip()[-500:] or f'exit {done.returncode}'}"
        )


def path() -> Path:
    """Where the kernel is or will be. Its name depends on the source, jaxlib and the flags."""
    parts = (SOURCE.read_text(encoding="utf-8"), jaxlib.__version__, *FLAGS)
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return startup.cache_directory(DIRECTORY) / f"{digest}.so"


# JAX accepts a kernel's name only once per process.
_loaded: set[Path] = set()


def _load(path: Path) -> bool:
    if path in _loaded:
        return True
    try:
        library = ctypes.CDLL(str(path))
        for target, name in FUNCTIONS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (OSError, AttributeError) as error:
        warnings.warn(f"{path} does not load, so XLA is used instead: {error}. Run jaxgpt build-kernel.", stacklevel=3)
        return False
    _loaded.add(path)
    return True


def check(file: Path) -> None:
    """Loads a kernel and compares it with float64, for all its numbers of rows and dtypes, and for odd sizes.

    Raises:
        KernelError: if they differ, or if a row's result depends on how many rows come with it.
    """
    if not _load(file):
        raise KernelError(f"{file} does not load")
    rng = np.random.default_rng(0)
    for inner, outer in ((7, 1), (100, 33), (768, 50), (3072, 700)):
        for dtype in ("float32", "bfloat16", "int8"):
            x = rng.normal(size=(MOST_ROWS, inner)).astype(np.float32)
            weight = np.asarray(jnp.asarray(30 * rng.normal(size=(outer, inner))).astype(dtype))
            *fewer, whole = jax.device_get(_each_number_of_rows(x, weight))
            want = x.astype(np.float64) @ weight.astype(np.float64).T
            if not (error := np.abs(whole - want).max()) < 1e-5 * np.abs(want).max():
                raise KernelError(f"rows by [{outer}, {inner}] {dtype}: off by {error}")
            for y in fewer:
                if not np.array_equal(y, whole[: len(y)]):
                    raise KernelError(f"{len(y)} rows by [{outer}, {inner}] {dtype}: not those of {MOST_ROWS} rows")


@jax.jit
def _each_number_of_rows(x_RxD: Array, weight_OxD: Array) -> list[Array]:
    """The products of the first 1, 2, ... rows of x."""
    return [few_rows(x_RxD[: rows + 1], weight_OxD) for rows in range(x_RxD.shape[0])]


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]))
    except KernelError as error:
        sys.exit(str(error))
