"""What the model calls, `attend`, and which backend computes it.

A backend asked for by name raises if it cannot compute the call. "auto" takes the fastest that can: for whole
sequences that of the platform if there is one, or else the blocks of `blocks.py`, which compute everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.cpu import kernel
from jaxgpt.errors import ConfigError
from jaxgpt.model.attention import native
from jaxgpt.model.attention.blocks import blocked
from jaxgpt.model.attention.fused import cudnn, cudnn_refusal, from_start, splash, splash_refusal
from jaxgpt.model.attention.plain import attention_weights, reference, scaled
from jaxgpt.model.cache import Seen
from jaxgpt.parallel import is_distributed, layout


class Backend(NamedTuple):
    """One way to compute attention.

    Attributes:
        context: (q_BxHxTxK, seen, window=, scale=, drop_rate=, dropout_key=, custom_derivatives=) to [B, H, T, K].
        refusal: why not, in words, for the same arguments and `return_weights`; None if it can compute them.
    """

    context: Callable[..., Array]
    refusal: Callable[..., str | None]


def _nothing(*_: Any, **__: Any) -> None:
    """The refusal of a backend that computes everything."""


# In the order in which "auto" tries them, which never comes to the last.
BACKENDS = {
    "cudnn": Backend(cudnn, cudnn_refusal),
    "splash": Backend(splash, splash_refusal),
    "native": Backend(native.native_attention, native.native_refusal),
    "blocked": Backend(blocked, _nothing),
    "reference": Backend(reference, _nothing),
}


def attend(
    q_BxHxTxK: Array,
    seen: Seen,
    *,
    backend: str = "auto",
    window: int | None = None,
    banded: bool | Array = True,
    scale: float | Array | None = None,
    return_weights: bool = False,
    native_kernel: bool = False,
    native: bool = False,
    **options: Any,
) -> tuple[Array, Array | None]:
    """softmax(q k^T scale) v with causal masking, in float32; by default, scale is 1 / sqrt(K).

    Query t is at slot `seen.query_slot` + t and sees the key slots from its row's start, or its document's, up to and
    including its own; with a `window`, only the last `window` of them.

    Args:
        q_BxHxTxK: queries.
        seen: keys and values, and the slots at which queries and rows start.
        backend: what computes it, as in `ComputeConfig.attention`.
        window: width of the band, at least 1: the slots that a query sees, including its own; None for no band.
        banded: whether `window` applies; an array where a scan alternates dense and banded layers.
        scale: what the scores are multiplied by; an array where it differs between the layers of a scan.
        return_weights: whether to also return all weights, at the cost of their memory.
        native_kernel: whether "auto" uses `jaxgpt.cpu.kernel` while decoding on a CPU.
        native: whether "auto" uses "native" for whole sequences.
        options: passed on to the backend: dropout, derivatives, and for `blocked` the sizes of its blocks.

    Returns:
        (context [B, H, T, K], weights [B, H, T, S] or None).

    Raises:
        ConfigError: if a backend is asked for by name that cannot compute this; says why.
    """
    chosen = choose(backend, q_BxHxTxK, seen.floats(), native, return_weights=return_weights, **options)

    decoding = not isinstance(seen.query_slot, int) and q_BxHxTxK.shape[2] <= kernel.MOST_ROWS
    undropped = options.get("dropout_key") is None
    native_kernel = native_kernel and backend == "auto" and decoding and undropped and not is_distributed(q_BxHxTxK)

    def form(window: int | None) -> tuple[Array, Array | None]:
        weights = attention_weights(q_BxHxTxK, seen.floats(), window, scale) if return_weights else None

        def context() -> Array:
            return BACKENDS[chosen].context(q_BxHxTxK, seen.floats(), window=window, scale=scale, **options)

        if native_kernel:
            native = functools.partial(kernel.attention, scaled(q_BxHxTxK, scale), *seen[:4], window)
            return lax.platform_dependent(cpu=native, default=context), weights
        return context(), weights

    if isinstance(banded, bool):
        return form(window if banded else None)
    # Two static patterns rather than one data-dependent mask: the band's blocks still skip what they cannot see, and
    # a scan still compiles each pattern only once, whatever the depth. (Without rematerialisation the backward pass
    # reserves memory for the residuals of both: about a tenth more.)
    return lax.cond(banded, lambda: form(window), lambda: form(None))


def choose(backend: str, q_BxHxTxK: Array, seen: Seen, native: bool = False, **options: Any) -> str:
    """The name of the backend that computes a call; "auto" may be "native" only if the argument `native` says so.

    Raises:
        ConfigError: as `attend`.
    """
    if backend == "auto" and not from_start(q_BxHxTxK, seen):
        return "blocked"
    if backend == "auto":
        names = (name for name in BACKENDS if native or name != "native")
        return next(name for name in names if BACKENDS[name].refusal(q_BxHxTxK, seen, **options) is None)
    if reason := BACKENDS[backend].refusal(q_BxHxTxK, seen, **options):
        raise ConfigError(f"attention={backend!r} cannot compute this: {reason}; attention='auto' takes what can")
    return backend


def backend_of(
    config: GPTConfig,
    compute: ComputeConfig,
    rows: int,
    length: int,
    dropout: bool = False,
    mesh: Mesh | None = None,
    documents: bool = False,
) -> str:
    """The name of the backend that a forward pass over whole sequences uses; nothing is computed.

    Args:
        config: the model.
        compute: how it is run.
        rows: sequences, B.
        length: their length, T.
        dropout: whether the pass drops attention weights.
        mesh: the mesh that it runs on.
        documents: whether a sequence holds several, which are kept apart.

    Raises:
        ConfigError: as `attend`.
    """
    q = jax.ShapeDtypeStruct((rows, config.n_heads, length, config.head_dim), jnp.float32)
    if mesh is not None:
        q = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=NamedSharding(mesh, layout(q.shape, "BHTK", mesh)))
    chosen = []

    def call(q_BxHxTxK: Array) -> Array:
        start_BxT = jnp.zeros((rows, length), jnp.int32) if documents else None
        seen = Seen(q_BxHxTxK, q_BxHxTxK, 0, None, compute.dtype, start_BxT)
        key = jax.random.key(0) if dropout else None
        options = {"dropout_key": key, "custom_derivatives": compute.custom_derivatives}
        chosen.append(choose(compute.attention, q_BxHxTxK, seen, compute.native_sequences, **options))
        return q_BxHxTxK

    jax.eval_shape(call, q)
    return chosen[0]
