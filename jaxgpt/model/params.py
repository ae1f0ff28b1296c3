"""Trees of parameters: leaves by path, stacking and unstacking the blocks, conversion between dtypes, and other
vocabularies. Only matrices can be int8, with one scale per row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.model.gpt import GPT

Tree = Mapping[str, Any]


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by paths such as "trf_blocks_0/att/qkv/weight"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters for `scan_layers=True`: trf_blocks_0, trf_blocks_1, ... become one `trf_blocks` [L, ...].

    Raises:
        ValueError: if the blocks are not numbered 0 to L - 1.
    """
    blocks = {name: child for name, child in params.items() if re.fullmatch(r"trf_blocks_\d+", name)}
    names = [f"trf_blocks_{i}" for i in range(len(blocks))]
    if not blocks or set(names) != set(blocks):
        raise ValueError(f"expected blocks trf_blocks_0, trf_blocks_1, ..., not {sorted(blocks) or 'none'}")
    rest = {name: child for name, child in params.items() if name not in blocks}
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *(blocks[name] for name in names))
    return {**rest, "trf_blocks": stacked}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`.

    Raises:
        ValueError: if there is no subtree `trf_blocks`.
    """
    if "trf_blocks" not in params:
        raise ValueError("expected stacked parameters, with a subtree 'trf_blocks'")
    stacked = params["trf_blocks"]
    L = jax.tree.leaves(stacked)[0].shape[0]
    blocks = {f"trf_blocks_{i}": jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(L)}
    return {**{name: child for name, child in params.items() if name != "trf_blocks"}, **blocks}


def resize_embeddings(model: GPT, params: Tree, vocab_size: int) -> tuple[GPT, dict[str, Any]]:
    """Gives a model another number of ids: adds rows for new tokens, such as special ones, or drops the last rows.

    The token embedding changes, and so does the output head if it is not tied to it. All other leaves are shared with
    `params`, and the logits of ids that stay do not change. Each new row is the mean of the old rows (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"). A new id's logit is then the mean of the old
    ones, so that it gets at most 1 / vocab_size of the probability, whatever the text. With a row near zero, as at
    initialisation, it could get nearly all of it.

    Args:
        model: the model, in any form: scanned, bfloat16, int8, tied or not.
        params: its parameters; not modified. On a mesh, `shard` the result again.
        vocab_size: the new number of ids.

    Returns:
        (model, params) with that vocabulary.

    Raises:
        ConfigError: if `vocab_size` is out of range.
        ValueError: if `params` are not the model's.
    """
    config = model.config.replace(vocab_size=vocab_size)
    resized = {}
    for name in ("tok_emb",) if config.tie_embeddings else ("tok_emb", "out_head"):
        table = params.get(name, {})
        shape, expected = np.shape(table.get("weight")), (model.config.vocab_size, config.emb_dim)
        if shape != expected:
            raise ValueError(
                f"expected the model's parameters, with {name}/weight {expected}, not {shape or 'nothing'}"
            )
        resized[name] = _resized(table, vocab_size)
    return GPT(config, model.compute), {**params, **resized}


def _resized(table: Tree, rows: int) -> dict[str, Any]:
    added = rows - len(table["weight"])
    if added <= 0:
        return {name: leaf[:rows] for name, leaf in table.items()}
    mean = jnp.mean(_dequantised(table)["weight"], axis=0, dtype=jnp.float32)
    new = {"weight": jnp.broadcast_to(mean, (added, *mean.shape))}
    if "weight_scale" in table:
        new = _quantised(new)
    return {name: jnp.concatenate([leaf, new[name].astype(leaf.dtype)]) for name, leaf in table.items()}


def cast_params(params: Tree, param_dtype: str) -> dict[str, Any]:
    """Converts `params` to another `ComputeConfig.param_dtype`. Leaves that already have it are not copied."""
    if param_dtype == "int8":
        return _per_module(_quantised, params)
    params = _per_module(_dequantised, params)
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scales), with one scale per row of a matrix `[*out, in]`.

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
    """Applies `change` to each module's own leaves."""
    own = {name: leaf for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
    inner = {name: _per_module(change, child) for name, child in tree.items() if isinstance(child, Mapping)}
    return {**inner, **change(own)}
