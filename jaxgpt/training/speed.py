"""How fast a run is: tokens per second, and the share of the devices' peak that its operations take."""

from __future__ import annotations

import time
from typing import NamedTuple

from jax.sharding import Mesh

from jaxgpt.accounting import PEAK_FLOPS, forward_flops
from jaxgpt.parallel import sharding
from jaxgpt.training.config import TrainConfig


class Speed(NamedTuple):
    """What a run did per second since the last look.

    Attributes:
        seconds: per step.
        tokens: per second.
        share: of the devices' peak (MFU); None where that is not known.
    """

    seconds: float
    tokens: float
    share: float | None


class Clock:
    """Measures a run between two of its steps, without the pauses in which it evaluates.

    Args:
        config: the run's config.
        mesh: the mesh that it runs on.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh | None):
        # By convention, utilisation counts three forward passes, whatever is recomputed (Chowdhery et al. 2022,
        # appendix B).
        self._flops = 3 * forward_flops(config.model, config.batch_size, config.T).total
        self._tokens, self._peak = config.batch_size * config.T, peak(config, mesh)

    def start(self, step: int) -> None:
        """Counts from now, and from this step on."""
        self._last = time.perf_counter(), step

    def look(self, step: int) -> Speed:
        """The speed from the last step at which it was started, or looked at, to this one."""
        then, before = self._last
        self.start(step)
        seconds = (self._last[0] - then) / (step - before)
        return Speed(seconds, self._tokens / seconds, self._peak and self._flops / seconds / self._peak)


def peak(config: TrainConfig, mesh: Mesh | None) -> float | None:
    """Operations per second that the devices can do, for the utilisation (MFU); None where the peak is not known, and
    for products in float32. A run that trains only a part of a model has none, as its step does less."""
    if config.compute.dtype != "bfloat16" or config.lora.rank or config.freeze:
        return None
    device = sharding.default_device() if mesh is None else mesh.devices.flat[0]
    peak = PEAK_FLOPS.get(device.device_kind)
    return None if peak is None else peak * (1 if mesh is None else mesh.size)
