"""Parameters from one type to another: int8 is a type of matrices, with a scale for each of their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Mapping[str, Any]


def cast_params(params: Tree, param_dtype: str) -> dict[str, Any]:
    """`params` in another `GPTConfig.param_dtype`, from whichever they are in. Leaves that have it are not copied."""
    if param_dtype == "int8":
        return _per_module(_quantised, params)
    params = _per_module(_dequantised, params)
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scales): each row of a matrix `[*out, in]` on a scale of its own.

    The scale is the row's largest absolute value / 127, so that the rounding error of a weight is at most scale / 2.

    Raises:
        ValueError: for weights that are NaN or infinite.
    """
    weight = np.asarray(weight, np.float32)
    largest = np.max(np.abs(weight), axis=-1)
    if not np.all(np.isfinite(largest)):
        raise ValueError("weights that are NaN or infinite have no int8 form: load with check_finite=True to find them")
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(127)
    return np.rint(weight / scale[..., None]).astype(np.int8), scale


def _quantised(leaves: Tree) -> dict[str, Any]:
    if "weight" not in leaves or "weight_scale" in leaves:
        return dict(leaves)
    weight, scale = quantise(leaves["weight"])
    rest = {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}
    return {**rest, "weight": jnp.asarray(weight), "weight_scale": jnp.asarray(scale)}


def _dequantised(leaves: Tree) -> dict[str, Any]:
    if "weight_scale" not in leaves:
        return dict(leaves)
    rest = {name: leaf for name, leaf in leaves.items() if name != "weight_scale"}
    return {**rest, "weight": leaves["weight"].astype(jnp.float32) * leaves["weight_scale"][..., None]}


def _per_module(change: Callable[[Tree], dict[str, Any]], tree: Tree) -> dict[str, Any]:
    """The tree with each module's own leaves changed."""
    own = {name: leaf for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
    inner = {name: _per_module(change, child) for name, child in tree.items() if isinstance(child, Mapping)}
    return {**inner, **change(own)}
