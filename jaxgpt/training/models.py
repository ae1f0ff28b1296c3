"""Models by path or name, among which a run's directory counts: it is the model of its best checkpoint."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt import weights
from jaxgpt.config import GPTConfig
from jaxgpt.errors import CheckpointError
from jaxgpt.model import GPT, cast_params, leaves, unstack_layers
from jaxgpt.parallel import sharding
from jaxgpt.training.checkpoints import fingerprint
from jaxgpt.training.config import TrainConfig
from jaxgpt.training.run_directory import Run
from jaxgpt.training.storage import storage


@functools.wraps(weights.load)
def load(path_or_name: Any, **options: Any) -> tuple[GPT, dict[str, Any]]:
    return weights.load(_opened(path_or_name), **options)


@functools.wraps(weights.load_config)
def load_config(path_or_name: Any, **options: Any) -> GPTConfig:
    return weights.load_config(_opened(path_or_name), **options)


def load_run(directory: str | Path, step: int | str = "best", *, param_dtype: str = "float32") -> tuple[int, GPT, Any]:
    """A run's model at a checkpoint: (step, model, params), with the averaged parameters if it has them.

    Args:
        directory: the run's directory; nothing in it is changed.
        step: a step that has a checkpoint, "latest", or "best": the one with the lowest validation loss (the latest,
            if none was evaluated).
        param_dtype: dtype of the parameters returned.

    Raises:
        CheckpointError: if there is no such checkpoint or it is damaged.
    """
    run = Run(directory)
    chosen = run.step(step)
    return chosen, *weights.load(_checkpoint(run, chosen), param_dtype=param_dtype)


# What a run that starts from a checkpoint decides itself; the rest, the architecture, comes from the checkpoint.
OWN_FIELDS = ("drop_rate", "drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")


def initial_params(config: TrainConfig, source: str, mesh: Mesh | None = None) -> Any:
    """The parameters of the model to start a run from, as the run's config has them.

    Args:
        config: the run's config.
        source: what `load` takes.
        mesh: what the parameters will be spread over; they are made in the host's memory then.

    Raises:
        CheckpointError, ConfigError, MissingExtraError: as from `load`.
    """
    own = {name: getattr(config.model, name) for name in (*OWN_FIELDS, "context_length")}
    # Parameters that will be spread over a mesh must not fill one device first.
    with contextlib.nullcontext() if mesh is None else sharding.on_host():
        return load(source, compute=config.compute, **own)[1]


def base_params(run: Run, config: TrainConfig, source: str | None, mesh: Mesh | None = None) -> Any:
    """The parameters that a run's adapters belong to.

    Args:
        run: the run.
        config: its config.
        source: where they are now.
        mesh: as for `initial_params`.

    Raises:
        CheckpointError: if they are not there, or not those with which the run began.
    """
    try:
        params = initial_params(config, str(source), mesh)
    except CheckpointError as error:
        raise CheckpointError(
            run.directory,
            f"holds only adapters, and the model that they belong to cannot be read: {error}; {run.resume_command} "
            "--init-from MODEL says where it is now",
        ) from None
    run.check_base(fingerprint(params), source)
    return params


def _opened(path_or_name: Any) -> Any:
    """A run's directory as an open checkpoint; anything else as it is."""
    if not isinstance(path_or_name, (str, os.PathLike)) or path_or_name in weights.BUNDLED:
        return path_or_name
    return _checkpoint(Run(path_or_name), "best") if storage(path_or_name).holds_run() else path_or_name


def _checkpoint(run: Run, step: int | str) -> weights.Checkpoint:
    config = run.config()
    return weights.Checkpoint(
        run.directory,
        config.model,
        weights.identity_rows(config.model, "float32"),
        tensors=lambda: _tensors(run, step),
        compute=config.compute.replace(param_dtype="float32"),
    )


def _tensors(run: Run, step: int | str) -> dict[str, weights.Tensor]:
    # Here, because optax takes long to import, and most models are not runs.
    from jaxgpt.training.step import abstract_state, eval_params, saved_state

    config = run.config()
    with run.reading() as checkpoints, sharding.on_host():  # with the optimizer's state, it may not fit on one device
        abstract = saved_state(config, abstract_state(config))
        state = checkpoints.restore(run.step(step), abstract)
        if config.lora.rank:
            # In float32 even if the run had it in bfloat16, in which merging would round what was trained.
            state["frozen"] = cast_params(base_params(run, config, run.init_from()), "float32")
        params = jax.tree.map(np.asarray, eval_params(config, state))
    arrays = leaves(unstack_layers(params) if config.compute.scan_layers else params)
    return {
        name: weights.Tensor(array.shape, array.dtype.name, functools.partial(np.copy, array))
        for name, array in arrays.items()
    }
