"""Low-rank adaptation (LoRA) as pure functions of trees of parameters. Source: Hu et al. 2021, arXiv:2106.09685.

A matrix W [..., out, in] stays as it is, and an adapter of rank r is trained in its place: A [..., r, in] and
B [..., out, r], which together stand for W + alpha / r B A. The axes before the last two (query/key/value, stacked
layers) count as separate matrices, each with its own A and B.

    adapters = lora.init(key, params, rank=16)                                # a plain nested dict
    with lora.attached(params, adapters) as adapted:
        logits = model.apply({"params": adapted}, ids)                        # differentiate in the adapters
    params = lora.merge(params, adapters)                                     # an ordinary model again

The tree of the adapters has the modules of `params` as its branches, each with the leaves `lora_a` and `lora_b`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import Array

from jaxgpt.accounting import LINEAR_LAYERS, select_matrices
from jaxgpt.checks import short_repr
from jaxgpt.config import ComputeConfig
from jaxgpt.model import Linear, activation, dot, leaves

Tree = Mapping[str, Any]

A, B = "lora_a", "lora_b"


def init(key: Array, params: Tree, rank: int, matrices: str = LINEAR_LAYERS) -> dict[str, Any]:
    """New adapters, float32. B is zero, so they change nothing yet; A is uniform in +-1 / sqrt(in), as in peft.

    Args:
        key: for A.
        params: the parameters to adapt; only shapes are read.
        rank: r.
        matrices: which matrices get an adapter, as patterns of paths (`jaxgpt.accounting.select`); by default all
            linear layers of the blocks. "att, ff, out_head" adds an output head of its own.

    Raises:
        ValueError: if `rank` is not a positive integer.
        ConfigError: if a pattern matches no matrix; names the nearest.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise ValueError(f"the rank of adapters must be an integer of 1 or more, not {short_repr(rank)}")
    weights = leaves(params)
    chosen = select_matrices(matrices, weights)
    flat: dict[str, Array] = {}
    for path, key_of_it in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *axes, n_out, n_in = weights[path].shape
        bound = 1 / math.sqrt(n_in)
        module = path.removesuffix("weight")
        flat[module + A] = jax.random.uniform(key_of_it, (*axes, rank, n_in), jnp.float32, -bound, bound)
        flat[module + B] = jnp.zeros((*axes, n_out, rank), jnp.float32)
    return unflatten_dict(flat, sep="/")


def merge(params: Tree, adapters: Tree, alpha: float | None = None) -> dict[str, Any]:
    """The parameters with W + alpha / r B A in place of each adapted W, computed in float32, in W's dtype.

    Args:
        params: the parameters; not modified. What has no adapter is shared with the result.
        adapters: what `init` returned, trained.
        alpha: the scale; by default r, so that alpha / r is 1.

    Raises:
        ValueError: if the adapters are not those of such parameters, or a matrix is int8.
    """
    return _combined(params, adapters, lambda module, own: {**module, "weight": _merged(module["weight"], own, alpha)})


@contextlib.contextmanager
def attached(params: Tree, adapters: Tree, alpha: float | None = None) -> Iterator[dict[str, Any]]:
    """A context in which `model.apply`, with the parameters that it yields, computes what it would with `merge`'s.

    In the blocks, W + B A is never formed: x W^T and (x A^T) B^T are added up. So neither a second copy of the
    matrices nor their gradient exists. A table (`tok_emb`, `pos_emb`, `out_head`) is merged.

    Args:
        params, adapters, alpha: as for `merge`.

    Raises:
        ValueError: as `merge`.
    """
    inside: dict[str, Any] = {name: child for name, child in adapters.items() if name.startswith("trf_blocks")}
    tables = {name: child for name, child in adapters.items() if name not in inside}

    def beside(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        linear, method = context.module, context.method_name
        adapted = isinstance(linear, Linear) and linear.has_variable("params", A)
        if adapted and method == "activated":  # of the sum, not of the first part of it
            x_BxTxD, name = args
            return activation(name)(linear(x_BxTxD))
        y = call(*args, **kwargs)
        if not adapted or method != "__call__":
            return y
        a: Array = linear.get_variable("params", A)
        b: Array = linear.get_variable("params", B)
        return (y.astype(jnp.float32) + _scale(a, alpha) * _product(args[0], a, b, linear.compute)).astype(y.dtype)

    with nn.intercept_methods(beside):
        yield _combined(merge(params, tables, alpha), inside, lambda module, own: {**module, **own})


def _product(x_BxTxD: Array, a: Array, b: Array, compute: ComputeConfig) -> Array:
    """x (B A)^T in float32, `[B, T, *out]`."""
    if (
        a.ndim > 2
    ):  # several matrices side by side, such as query, key and value; XLA on CPU has no batched product in bfloat16
        return jnp.stack([_product(x_BxTxD, *pair, compute) for pair in zip(a, b, strict=True)], axis=2)
    h_BxTxR = dot("BTD,RD->BTR", x_BxTxD, a, compute.dtype, compute.custom_derivatives)
    return dot("BTR,OR->BTO", h_BxTxR, b, compute.dtype, compute.custom_derivatives)


def _combined(params: Tree, adapters: Tree, change: Any, path: str = "") -> dict[str, Any]:
    """`params` with each module that has an adapter replaced by `change(module, its adapter)`."""
    result = dict(params)
    for name, own in adapters.items():
        module, here = params.get(name), f"{path}{name}/"
        if not isinstance(module, Mapping) or not isinstance(own, Mapping):
            raise ValueError(f"there is an adapter for {here[:-1]}, which the parameters do not have")
        if A in own:
            _check(here, module, own)
            result[name] = change(module, own)
        else:
            result[name] = _combined(module, own, change, here)
    return result


def _check(path: str, module: Tree, own: Tree) -> None:
    shape, rank = tuple(getattr(module.get("weight"), "shape", ())), own[A].shape[-2:-1]
    for name, expected in {A: (*shape[:-2], *rank, *shape[-1:]), B: (*shape[:-1], *rank)}.items():
        found = getattr(own.get(name), "shape", ())
        if found != expected:
            raise ValueError(
                f"{path}{name} is {list(found)} and should be {list(expected)}, for a matrix {list(shape)}"
            )
    if module["weight"].dtype == jnp.int8:
        raise ValueError(f"{path}weight is int8, which cannot be adapted: load the model with another param_dtype")


def _merged(weight: Array, own: Tree, alpha: float | None) -> Array:
    a, b = (own[name].astype(jnp.float32) for name in (A, B))
    change = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + _scale(a, alpha) * change).astype(weight.dtype)


def _scale(a: Array, alpha: float | None) -> float:
    rank = a.shape[-2]
    return 1.0 if alpha is None else alpha / rank
