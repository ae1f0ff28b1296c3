"""The optimizer and its schedule, built from a `TrainConfig` with optax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
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
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with decay on matrices only; with
    `optimizer="muon"` the blocks' matrices take Muon's orthogonalised momentum instead (Jordan et al. 2024)."""
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
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    tx = optax.chain(clip, adamw)
    return optax.GradientTransformation(tx.init, _promoting(tx.update))


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
