"""Which parameters a run trains: all, all but frozen ones (`freeze`), or only LoRA adapters (`[lora]`).

A model's parameters are two trees: what is trained, for which alone there are gradients and optimizer states, and
what is frozen. With LoRA the first are the adapters, and the second is the whole model that the run started from.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

from flax.traverse_util import unflatten_dict
from jax import Array

from jaxgpt import lora
from jaxgpt.accounting import parameter_shapes, select, select_matrices
from jaxgpt.errors import ConfigError
from jaxgpt.model import leaves
from jaxgpt.training.config import TrainConfig


def check(config: TrainConfig) -> None:
    """Raises ConfigError, naming the field, if a pattern of the config matches nothing in its model, or if nothing is
    left to train."""
    chosen = _chosen(config)
    if config.freeze and len(chosen) == len(_shapes(config)):
        raise ConfigError(f"freeze: {config.freeze!r} matches every parameter, so there is nothing left to train")


def count(config: TrainConfig) -> int:
    """How many parameters a run trains."""
    shapes, chosen = _shapes(config), _chosen(config)
    if not config.lora.rank:
        trained = [shape for path, same in shapes.items() if path not in chosen for shape in same]
        return sum(map(math.prod, trained))
    adapted = [shape for path in chosen for shape in shapes[path]]
    return sum(math.prod(shape[:-2]) * config.lora.rank * (shape[-2] + shape[-1]) for shape in adapted)


def _chosen(config: TrainConfig) -> list[str]:
    """The paths that the config's pattern matches: of the matrices to adapt, or of the frozen parameters."""
    name, patterns = ("lora.matrices", config.lora.matrices) if config.lora.rank else ("freeze", config.freeze)
    if not config.lora.rank and not patterns:
        return []
    try:
        return (select_matrices if config.lora.rank else select)(patterns, list(_shapes(config)))
    except ConfigError as error:
        scanned = "; compute.scan_layers makes all blocks one, trf_blocks" * config.compute.scan_layers
        raise ConfigError(f"{name}: {error}{scanned}") from None


def _shapes(config: TrainConfig) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of each leaf of the model's tree, of which those of all layers are one if they are stacked."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for path, shape in parameter_shapes(config.model).items():
        stacked = re.sub(r"^trf_blocks_\d+", "trf_blocks", path) if config.compute.scan_layers else path
        shapes.setdefault(stacked, []).append(shape)
    return shapes


def split(config: TrainConfig, params: Any, key: Array) -> tuple[Any, Any]:
    """(trained, frozen) of a model's parameters; the key is for new adapters."""
    if config.lora.rank:
        return lora.init(key, params, config.lora.rank, config.lora.matrices), params
    if not config.freeze:
        return params, {}
    flat = leaves(params)
    frozen = set(select(config.freeze, flat))
    parts = ({path: leaf for path, leaf in flat.items() if (path in frozen) == side} for side in (False, True))
    trained, kept = (unflatten_dict(part, sep="/") for part in parts)
    return trained, kept


def whole(config: TrainConfig, trained: Any, frozen: Any) -> Any:
    """The inverse of `split`: the parameters of an ordinary model, adapters merged."""
    if config.lora.rank:
        return lora.merge(frozen, trained, config.lora.alpha or None)
    return unflatten_dict(leaves(trained) | leaves(frozen), sep="/") if frozen else trained


@contextlib.contextmanager
def applied(config: TrainConfig, trained: Any, frozen: Any) -> Iterator[Any]:
    """`whole` for `model.apply`, in this context only: without merging adapters."""
    if not config.lora.rank:
        yield whole(config, trained, frozen)
        return
    with lora.attached(frozen, trained, config.lora.alpha or None) as params:
        yield params
