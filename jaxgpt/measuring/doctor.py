"""Checks whether this installation works: its versions, its arithmetic against float64, its files and its caches.

A faulty build of JAX is detected by what it computes, not by a list of bad versions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jaxgpt import startup
from jaxgpt.config import DTYPES, GPTConfig

ASSETS = Path(__file__).parent.parent / "assets"
# Of the bundled model as released. (The tokenizer checks its own file whenever it is built.)
MODEL_SHA256 = "32d0b83a4ab40dfbfd817f39dcb3de77b61a5edd4655d87b833f0eba6f9d64de"
PACKAGES = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "numpy", "tiktoken", "safetensors")

SMALL = GPTConfig(vocab_size=300, context_length=96, emb_dim=48, n_heads=4, n_layers=3, drop_rate=0.0)
# Largest allowed error of the logits, relative to the largest logit, by dtype. Observed errors: 1e-6, 1e-2, 1e-6.
TOLERANCES = {"float32": 2e-5, "bfloat16": 5e-2, "int8": 2e-4}
REINSTALL = "pip install --force-reinstall --no-deps jaxgpt"
OTHER_JAX = "this build of JAX computes wrong results: install other versions of jax and jaxlib, and report it to JAX"


class Wrong(Exception):
    """A check that failed: what was found, and what to do."""

    def __init__(self, found: str, advice: str):
        super().__init__(found)
        self.found, self.advice = found, advice


@dataclasses.dataclass(frozen=True)
class Result:
    """What a check found; `advice` is empty unless it failed. `good` is None for a check that was skipped."""

    name: str
    good: bool | None
    found: str
    advice: str = ""


def examine() -> Iterator[Result]:
    """Runs every check, one after another. A check that raises has failed; the others still run. Without a platform
    that JAX can use, the first check that needs one fails, and the others are skipped."""
    no_platform = False
    for name, check in CHECKS.items():
        try:
            yield Result(name, True, check())
        except Wrong as wrong:
            yield Result(name, False, wrong.found, wrong.advice)
        except Exception as error:  # report whatever a broken installation raises
            if reason := startup.missing_platform():
                found, _, advice = reason.partition(". ")
                yield (
                    Result(name, None, "skipped, because JAX has no device")
                    if no_platform
                    else Result(name, False, found, advice)
                )
                no_platform = True
                continue
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
            yield Result(name, False, found, "see the message; if it names a package, reinstall that package")


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _machine() -> str:
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kinds = ", ".join(f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices())
    return f"Python {platform.python_version()} on {platform.platform()}, {cores} threads; devices: {kinds}"


def _arithmetic(dtype: str) -> str:
    """Compares the jitted logits of a small model with float64."""
    import jax
    import numpy as np

    from jaxgpt.cpu import kernel
    from jaxgpt.generation import prepare
    from jaxgpt.model import reference

    with mock.patch.dict(os.environ, {kernel.VARIABLE: "0"}):  # the kernel has a separate check
        model, params = prepare(*_small_model(), dtype)
    rounded = _float64(params)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 80)).astype(np.int32)
    got = np.asarray(jax.jit(lambda params, ids: model.apply({"params": params}, ids))(params, ids), np.float64)
    want = reference.gpt(rounded, model.config, ids)
    return _compare("logits", got, want, TOLERANCES[dtype])


def _attention(dtype: str) -> str:
    """Compares the backend of attention that this machine chooses with float64, at a length that kernels take."""
    import jax
    import numpy as np

    from jaxgpt.config import ComputeConfig
    from jaxgpt.model import Seen, attend, backend_of, reference

    config, T = GPTConfig(emb_dim=128, n_heads=2), 128
    q, k, v = np.random.default_rng(3).normal(size=(3, 1, config.n_heads, T, config.head_dim)).astype(np.float32)
    got, _ = jax.jit(lambda q, k, v: attend(q, Seen(k, v, 0, None, dtype)))(q, k, v)
    exact = [x[0].astype(np.float64) for x in (q, k, v)]
    want = np.stack([reference.attention_weights(q, k) @ v for q, k, v in zip(*exact, strict=True)])
    backend = backend_of(config, ComputeConfig(dtype=dtype), 1, T)
    return _compare(f"attention by {backend}", np.asarray(got)[0], want, TOLERANCES[dtype])


def _generation() -> str:
    """Compares the cached generator's ids with those of a full float64 forward pass per id."""
    import numpy as np

    from jaxgpt.generation import generate
    from jaxgpt.model import reference

    model, params = _small_model()
    prompts = [[1, 2, 3], [200, 7, 7, 7, 9, 250, 11]]
    for prompt, row in zip(prompts, generate(model, params, prompts, 24).tokens, strict=True):
        want = reference.generate_greedy(_float64(params), SMALL, prompt, 24)
        if not np.array_equal(row, want):
            raise Wrong(f"greedy ids are {row.tolist()}, but float64 gives {want}", OTHER_JAX)
    return "24 greedy ids of two prompts equal float64's"


def _gradient() -> str:
    """Compares the loss's derivative along a direction with a difference quotient in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt.model import reference
    from jaxgpt.training import model_loss

    model, params = _small_model()
    ids = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 70)).astype(np.int32)

    def mean_loss(params: Any) -> Any:
        total, count = model_loss(model, params, jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:]))
        return total / count

    grads = jax.jit(jax.grad(mean_loss))(params)
    # Along the gradient itself, so that nothing cancels.
    exact, direction = _float64(params), _float64(grads)
    length = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(direction))))
    step = 1e-4 / length
    ahead, behind = (
        reference.loss(jax.tree.map(lambda p, d, s=sign: p + s * step * d, exact, direction), SMALL, ids)
        for sign in (1, -1)
    )
    return _compare("slope of the loss", np.array(length), np.array((ahead - behind) / (2 * step) / length), 1e-3)


def _large_product() -> str:
    """Checks one row times more than 32,768 rows, then a reduction: some builds got it wrong (JAX issue 39103)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt.config import ComputeConfig
    from jaxgpt.model import ops

    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(1, 1, 64)).astype(np.float32), rng.normal(size=(50_257, 64)).astype(np.float32)
    got = jax.jit(lambda x, w: jnp.max(ops.product(x, ops.Matrix(w, None), ComputeConfig()), axis=-1))(x, weight)
    return _compare(
        "largest of 50,257 products", np.asarray(got)[0], (x[0] @ weight.astype(np.float64).T).max(-1), 1e-5
    )


def _kernel() -> str:
    from jaxgpt.cpu import kernel, sequences
    from jaxgpt.errors import KernelError

    if os.environ.get(kernel.VARIABLE) == "0":
        return f"switched off by {kernel.VARIABLE}"
    try:
        file = kernel.built()
        if file is None:
            failure = kernel.failure()
            return f"not built: {failure or 'jaxgpt build-kernel makes decoding on a CPU faster'}"
        kernel.check_apart(file)
    except (KernelError, OSError) as error:
        raise Wrong(str(error), f"run jaxgpt build-kernel, or set {kernel.VARIABLE}=0 to do without") from None
    whole = "" if sequences.missing("float32") else ", also for whole sequences in float32 and bfloat16"
    return f"{file}: equals float64{whole}"


def _tokenizer() -> str:
    from jaxgpt.tokenizer import get_tokenizer

    text, want = "Hello, I am 北京", [15496, 11, 314, 716, 10263, 234, 245, 12859, 105]
    if (got := get_tokenizer("gpt2").encode(text)) != want:
        raise Wrong(f"{text!r} encodes to {got} instead of {want}", "install another version of tiktoken")
    return "GPT-2's merge table is the released one, and a sample text encodes correctly"


def _bundled_model() -> str:
    try:
        digest = hashlib.sha256((ASSETS / "shakespeare" / "model.safetensors").read_bytes()).hexdigest()
    except OSError as error:
        raise Wrong(str(error), REINSTALL) from None
    if digest != MODEL_SHA256:
        raise Wrong(f"its sha256 is {digest[:12]}… instead of {MODEL_SHA256[:12]}…", REINSTALL)
    from jaxgpt.weights import load

    model, _ = load("shakespeare", check_finite=True)
    return f"as released; {model.config.n_layers} layers, all values finite"


def _compile_cache() -> str:
    if os.environ.get(startup.CACHE_VARIABLE) == "0":
        return f"switched off by {startup.CACHE_VARIABLE}"
    try:
        directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or startup.private_directory("xla"))
        _try_to_write(directory)
    except (OSError, RuntimeError) as error:
        raise Wrong(
            f"{error}", f"make it writable by you alone, or set XDG_CACHE_HOME or {startup.CACHE_VARIABLE}=0"
        ) from None
    return f"{directory} can be written"


def _hub_cache() -> str:
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return "none: without the extra [hub] nothing is downloaded"
    directory = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        return f"{directory} is only read, because of HF_HUB_OFFLINE"
    try:
        _try_to_write(next(path for path in (directory, *directory.parents) if path.exists()))
    except OSError as error:
        raise Wrong(f"{error}", "make it writable, set HF_HOME, or set HF_HUB_OFFLINE=1 to work offline") from None
    return f"{directory} can be written"


def _try_to_write(directory: Path) -> None:
    probe = directory / f"doctor-{os.getpid()}"
    probe.write_bytes(b"?")
    probe.unlink()


CHECKS: dict[str, Callable[[], str]] = {
    "versions": _versions,
    "machine": _machine,
    **{f"arithmetic in {dtype}": functools.partial(_arithmetic, dtype) for dtype in TOLERANCES},
    **{f"attention in {dtype}": functools.partial(_attention, dtype) for dtype in DTYPES},
    "generation": _generation,
    "gradient": _gradient,
    "large product": _large_product,
    "native kernel": _kernel,
    "tokenizer": _tokenizer,
    "bundled model": _bundled_model,
    "compile cache": _compile_cache,
    "hub cache": _hub_cache,
}


def _small_model() -> tuple[Any, Any]:
    """A model in which every parameter matters, because biases and scales are random too."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt.model import GPT

    model = GPT(SMALL)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


def _float64(params: Any) -> Any:
    """Converts parameters to float64; an int8 matrix and its scales become one matrix, their product."""
    import numpy as np

    if not isinstance(params, dict):
        return np.asarray(params, np.float64)
    wide = {name: _float64(child) for name, child in params.items() if name != "weight_scale"}
    if "weight_scale" in params:
        wide["weight"] = wide["weight"] * np.asarray(params["weight_scale"], np.float64)[..., None]
    return wide


def _compare(what: str, got: Any, want: Any, tolerance: float) -> str:
    import numpy as np

    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error <= tolerance:  # NaN is wrong too
        raise Wrong(f"{what}: off by {error:.1e} of the largest value ({tolerance:.0e} allowed)", OTHER_JAX)
    return f"{what}: within {error:.1e} of float64 ({tolerance:.0e} allowed)"
