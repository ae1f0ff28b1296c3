"""The L blocks: as L modules, or as one module scanned over parameters with a leading axis [L, ...]; with or without
rematerialisation. All variants are called in the same way and give the same numbers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.config import ComputeConfig, GPTConfig
from jaxgpt.model.cache import Cache


def make_blocks(Block: Any, config: GPTConfig, compute: ComputeConfig) -> Any:
    """L blocks of a module class, to be assigned in `setup` and called by `apply_blocks`. A block is called with
    (x_BxTxD, cache, layer, deterministic, banded, scale, start_BxT), and returns x_BxTxD and its updated layer of the
    cache."""
    # In a scan, an argument that differs between the layers is data, one value per layer.
    scanned = [compute.scan_layers and len(set(values)) > 1 for values in _per_layer(config)]
    if compute.remat != "none":
        policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims if compute.remat == "dots" else None
        # Argument 4 is `deterministic`, 5 `banded`, 6 `scale` (0 is self). Common subexpression elimination cannot
        # undo rematerialisation inside a scan.
        static = (4, *(argument for argument, is_data in zip((5, 6), scanned, strict=True) if not is_data))
        Block = nn.remat(Block, policy=policy, static_argnums=static, prevent_cse=not compute.scan_layers)
    if not compute.scan_layers:
        return [Block(config, compute) for _ in range(config.n_layers)]
    Block = nn.scan(
        Block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0, nn.broadcast, *(0 if is_data else nn.broadcast for is_data in scanned), nn.broadcast),
        length=config.n_layers,
    )
    return Block(config, compute)


def apply_blocks(
    blocks: Any,
    x_BxTxD: Array,
    cache: Cache | None,
    deterministic: bool,
    config: GPTConfig,
    start_BxT: Array | None = None,
) -> tuple[Array, Any]:
    """Passes x through all blocks of `make_blocks`. Returns x and the updated layers of the cache."""
    per_layer = _per_layer(config)
    layers = None if cache is None else cache.layers
    if isinstance(blocks, nn.Module):
        arguments = (jnp.array(values) if len(set(values)) > 1 else values[0] for values in per_layer)
        x_BxTxD, layers = blocks(x_BxTxD, cache, layers, deterministic, *arguments, start_BxT)
    else:
        written = []
        for i, (block, banded, scale) in enumerate(zip(blocks, *per_layer, strict=True)):
            layer = None if layers is None else layers[i]
            x_BxTxD, layer = block(x_BxTxD, cache, layer, deterministic, banded, scale, start_BxT)
            written.append(layer)
        layers = written
    return x_BxTxD, layers


def _per_layer(config: GPTConfig) -> tuple[tuple[bool, ...], tuple[float, ...]]:
    """The arguments of each block that are its own: (banded, scale), each of length L."""
    return tuple(i in config.banded_layers for i in range(config.n_layers)), config.attention_scales
