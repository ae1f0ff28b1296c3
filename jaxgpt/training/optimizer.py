"""The optimizer and its schedule, built from a `TrainConfig` with optax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax import contrib

from jaxgpt import lora
from jaxgpt.training.config import TrainConfig


def schedule(config: TrainConfig, peak: float) -> optax.Schedule:
    """Linear warm-up from 0 to `peak` over `config.warmup` steps, then a cosine to `final_learning_rate` * `peak` at
    `steps`.

    With a warm-up, step 0 has learning rate peak / (warmup + 1) rather than 0, so that no step is wasted.
    """
    warmup, end = config.warmup, config.final_learning_rate
    cosine = optax.cosine_decay_schedule(peak, max(1, config.steps - warmup), alpha=end)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else cosine
    return _promoting(optax.join_schedules([rise, cosine], [warmup]))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only; with `optimizer="muon"` the blocks' matrices take
    Muon's orthogonalised momentum instead (Jordan et al. 2024). Gradients come clipped (`clipping`)."""
    adamw = optax.adamw(
        schedule(config, config.learning_rate),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    if config.optimizer == "muon":
        muon = contrib.muon(
            schedule(config, config.matrix_learning_rate),
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_dimensions,
            consistent_rms=0.2,  # updates as large as AdamW's typically are: Liu et al. 2025, section 2.2
        )
        adamw = optax.partition({"muon": muon, "adamw": adamw}, _optimizer_labels)
    tx = optax.chain(optax.identity(), adamw)  # two parts, of which the second has the state: as in checkpoints
    return optax.GradientTransformation(tx.init, _promoting(tx.update))


def clipping(config: TrainConfig, grad_norm: Array) -> Array:
    """What to multiply gradients of this global norm by so that theirs is at most `clip_norm` (Pascanu et al. 2013); 1
    if that is 0, which is no limit."""
    most = config.clip_norm
    return jnp.where(grad_norm < most, 1.0, most / grad_norm) if most else jnp.ones_like(grad_norm)


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps functions of optax, which mix integers and floats, so that they also work for users who forbid that
    (`jax_numpy_dtype_promotion="strict"`)."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return call


def is_matrix(params: Any) -> Any:
    """A tree of bools: which leaves weight decay acts on. By name, because stacked biases have two axes too."""
    matrices = ("weight", lora.A, lora.B)
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in matrices, params)


def _optimizer_labels(params: Any) -> Any:
    def label(path, _):
        in_block = str(path[0].key).startswith("trf_blocks")
        return "muon" if in_block and path[-1].key == "weight" else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _muon_dimensions(params: Any) -> Any:
    # Axes before the last two (query/key/value, layer) count as separate matrices.
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2), params)
