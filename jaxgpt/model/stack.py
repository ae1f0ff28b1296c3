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
    (x_BxTxD, cache, layer, deterministic, banded), and returns x_BxTxD and its updated layer of the cache."""
    alternates = compute.scan_layers and bool(config.banded_layers)  # then `banded` is data, one value per layer
    if compute.remat != "none":
        policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims if compute.remat == "dots" else None
        # Argument 4 is `deterministic`, 5 `banded` (0 is self). Common subexpression elimination cannot undo
        # rematerialisation inside a scan.
        static = (4,) if alternates else (4, 5)
        Block = nn.remat(Block, policy=policy, static_argnums=static, prevent_cse=not compute.scan_layers)
    if not compute.scan_layers:
        return [Block(config, compute) for _ in range(config.n_layers)]
    Block = nn.scan(
        Block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0, nn.broadcast, 0 if alternates else nn.broadcast),
        length=config.n_layers,
    )
    return Block(config, compute)


def apply_blocks(
    blocks: Any, x_BxTxD: Array, cache: Cache | None, deterministic: bool, config: GPTConfig
) -> tuple[Array, Any]:
    """Passes x through all blocks of `make_blocks`. Returns x and the updated layers of the cache."""
    banded = config.banded_layers
    layers = None if cache is None else cache.layers
    if isinstance(blocks, nn.Module):
        pattern = jnp.array([i in banded for i in range(config.n_layers)]) if banded else False
        x_BxTxD, layers = blocks(x_BxTxD, cache, layers, deterministic, pattern)
    else:
        written = []
        for i, block in enumerate(blocks):
            layer = None if layers is None else layers[i]
            x_BxTxD, layer = block(x_BxTxD, cache, layer, deterministic, i in banded)
            written.append(layer)
        layers = written
    return x_BxTxD, layers
