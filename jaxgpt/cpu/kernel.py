"""The optional C++ kernel, two sources in one library: `kernel.cc` has the operations of a decode step, which this
module calls, `sequences.cc` those of whole sequences, for `jaxgpt.cpu.sequences`. Without it, XLA computes the same.

It is built once, into the user's cache: by `jaxgpt build-kernel`, or without being asked, in the background, by the
first process that prepares a large model where there is a compiler. From then on the models that `jaxgpt.prepare`
returns use it. JAXGPT_KERNEL=0 switches both off. (A kernel in the wheel would have to make do with what the oldest
processor has, or hold a variant for each, and would fit one jaxlib's interface; a compiler on the spot knows them.)

With it, a decoded token's result has the same bits whatever is computed beside it: other rows of a batch, or the tokens
that follow, if there are at most `MOST_ROWS` in all.
"""

from __future__ import annotations

import ctypes
import functools
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

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernel.cc", "sequences.cc"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "tiles.h", "products.h"))
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-w")
MOST_ROWS = 32
# Set to 0 to disable a kernel that was built.
VARIABLE = "JAXGPT_KERNEL"
TARGET = "jaxgpt_few_rows"
# The kernel's functions, by the names that XLA knows them by.
FUNCTIONS = {
    TARGET: "JaxgptFewRows",
    "jaxgpt_attention": "JaxgptAttention",
    "jaxgpt_layer_norm": "JaxgptLayerNorm",
    "jaxgpt_product": "JaxgptProduct",
    "jaxgpt_gelu_of_product": "JaxgptGeluOfProduct",
    "jaxgpt_sequence_attention": "JaxgptSequenceAttention",
    "jaxgpt_sequence_attention_gradients": "JaxgptSequenceAttentionGradients",
}
DIRECTORY = "kernel"  # in the user's cache


def few_rows(x_RxD: Array, weight_OxD: Array) -> Array:
    """x W^T in float32, [R, O], for a float32 x of 1 to `MOST_ROWS` rows and W in float32, bfloat16 or int8.

    Sums are float32. Beside a W in int8, each row of x is rounded to 16 bits, and sums are those of integers. Like the
    others, this works only on a CPU and if `available()`, and has no gradient.
    """
    result = jax.ShapeDtypeStruct((x_RxD.shape[0], weight_OxD.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")(x_RxD, weight_OxD)


def attention(
    q_BxHxTxK: Array,
    k_BxHxSxK: Array | tuple[Array, Array],
    v_BxHxSxK: Array | tuple[Array, Array],
    slot: int | Array,
    start_B: Array | None,
    window: int | None,
) -> Array:
    """softmax(q k^T) v in float32, [B, H, T, K], for a float32 q and a cache in float32, bfloat16, or in int8
    with scales [B, H, S, 1], not rounding q.

    Query t is at slot `slot` + t and sees the key slots from `start_B` (0) up to its own, or the last `window` of them.
    """
    B = q_BxHxTxK.shape[0]
    # What has no scales passes none.
    cache = [x if isinstance(x, tuple) else (x, jnp.zeros((B, 0))) for x in (k_BxHxSxK, v_BxHxSxK)]
    S = cache[0][0].shape[2]
    start_B = jnp.zeros(B, jnp.int32) if start_B is None else start_B
    if B == 1:  # as the cache holds them: otherwise XLA copies them
        cache = jax.tree.map(lambda x: x[0], cache)
    result = jax.ShapeDtypeStruct(q_BxHxTxK.shape, jnp.float32)
    call = jax.ffi.ffi_call("jaxgpt_attention", result, vmap_method="sequential")
    return call(q_BxHxTxK, *cache[0], *cache[1], jnp.asarray(slot, jnp.int32), start_B, window=np.int64(window or S))


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
    return file is not None and load(file)


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
    compiler = _compiler()
    if compiler is None:
        raise KernelError("no C++ compiler: install g++ or clang++, or name one in CXX; without it XLA does the work")
    file = path()
    with tempfile.TemporaryDirectory(dir=startup.private_directory(DIRECTORY)) as work:
        made = Path(work) / file.name
        command = [compiler, *_chosen()[1:], *FLAGS, "-I", jax.ffi.include_dir(), *map(str, SOURCES), "-o", str(made)]
        _run(command, "the compiler failed")
        check_apart(made)
        made.replace(file)
    return file


def can_build() -> bool:
    """Whether there is no kernel yet, nothing forbids one, and building it has not failed before."""
    if os.environ.get(VARIABLE) == "0" or _compiler() is None:
        return False
    try:
        startup.private_directory(DIRECTORY)
        return built() is None and not _failure().exists()
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return False


def build_in_background() -> None:
    """Starts a process that builds the kernel, for later ones, if it `can_build`."""
    global _builder
    if _builder is None and can_build():
        _builder = subprocess.Popen(
            [sys.executable, "-m", "jaxgpt.cpu.kernel"],
            env=startup.child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def builds_in_background() -> bool:
    """Whether this process has started to build the kernel."""
    return _builder is not None


def build_once() -> None:
    """Builds the kernel if it `can_build` and no other process is at it. If that fails, notes why, so that it is not
    tried again."""
    import fcntl

    if not can_build():
        return
    descriptor = os.open(startup.private_directory(DIRECTORY), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if can_build():  # still
            build()
    except BlockingIOError:
        return
    except KernelError as error:
        _failure().write_text(f"{error}\n", encoding="utf-8")
    finally:
        os.close(descriptor)


def failure() -> str | None:
    """Why the kernel could not be built without being asked, if that was tried."""
    try:
        return _failure().read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError):
        return None


def _failure() -> Path:
    return path().with_suffix(".failed")


_builder: subprocess.Popen[bytes] | None = None


def check_apart(file: Path) -> None:
    """Runs `jaxgpt.cpu.kernel_check` in a separate process, because a miscompiled kernel may crash it.

    Raises:
        KernelError: if the kernel does not load, or computes wrong results.
    """
    _run([sys.executable, "-m", "jaxgpt.cpu.kernel_check", str(file)], "the kernel is wrong")


def _compiler() -> str | None:
    return next((found for name in (*_chosen(), "c++", "g++", "clang++") if (found := shutil.which(name))), None)


def _chosen() -> list[str]:
    return shlex.split(os.environ.get("CXX", ""))


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, env=startup.child_environment(), capture_output=True, text=True)
    if done.returncode:
        raise KernelError(
            f"{failure} ({shlex.join(command)}): {done.stderr.strip()[-500:] or f'exit {done.returncode}'}"
        )


def path() -> Path:
    """Where the kernel is or will be. Its name depends on the source, jaxlib and the flags."""
    return startup.cache_directory(DIRECTORY) / f"{_digest((*SOURCES, *HEADERS))}.so"


@functools.cache  # every product that is traced may ask
def _digest(files: tuple[Path, ...]) -> str:
    parts = (*(file.read_text(encoding="utf-8") for file in files), jaxlib.__version__, *FLAGS)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# JAX accepts a kernel's name only once per process.
_loaded: set[Path] = set()


def load(path: Path) -> bool:
    """Makes the kernel in this file the one that this module's functions call. Warns if it does not load."""
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


if __name__ == "__main__":
    os.nice(10)  # whoever started this is at work
    build_once()
