"""Training checkpoints: orbax's, with a checksum of every array, so that damage is found and stepped over."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.errors import CheckpointError, MissingExtraError


class Checkpoints:
    """The checkpoints of one run, in one directory. Saving is atomic; the latest few and the best are kept.

    Args:
        directory: where they are; made if absent, unless `read_only`.
        keep: how many of the latest stay.
        read_only: for looking into a run that may be running.
    """

    def __init__(self, directory: Path, keep: int = 1, read_only: bool = False):
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise MissingExtraError("orbax-checkpoint", "train", "saving and reading training checkpoints") from None
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
        policies = ocp.checkpoint_managers

        def loss(metrics):
            return metrics["loss"]

        best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,  # without it, metrics are not written
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            enable_async_checkpointing=False,  # a save that has returned is on disk
            cleanup_tmp_directories=not read_only,  # what a killed save left
            read_only=read_only,
            create=not read_only,
        )
        self._directory = directory
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest loss, if any was saved with one."""
        losses = {}
        for step in self.steps():
            metrics = self._manager.metrics(step)
            if metrics:
                losses[step] = metrics["loss"]
        return min(losses, key=losses.__getitem__, default=None)

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Writes `state`, a pytree of arrays; returns when it is on disk.

        Raises:
            CheckpointError: if it cannot be written; the checkpoints before it stay.
        """
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), checksums=self._ocp.args.JsonSave(_checksums(state))
        )
        try:
            self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss}, force=True)
        except (OSError, ValueError) as error:  # a full disk reaches us as either
            reason = f"the checkpoint of step {step} could not be written, earlier ones are untouched: {error}"
            raise CheckpointError(self._directory, reason) from error

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Reads the state of one step.

        Args:
            step: one of `steps()`.
            abstract_state: the tree of shapes and types to expect, from `jax.eval_shape`.

        Raises:
            CheckpointError: if it is damaged, or not of these shapes.
        """
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(jax.tree.map(_on_device, abstract_state)),
            checksums=self._ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=args)
            damaged = [name for name, crc in _checksums(restored.state).items() if restored.checksums[name] != crc]
        except Exception as error:  # whatever orbax and its storage raise at damaged files is open-ended
            raise CheckpointError(self._directory / str(step), f"cannot be restored: {error}") from error
        if damaged:
            raise CheckpointError(self._directory / str(step), f"damaged: {', '.join(damaged[:5])}")
        return restored.state

    def restore_latest(self, abstract_state: Any, warn: Callable[[str], None]) -> tuple[int, Any]:
        """(step, state) of the latest checkpoint that is whole; says so through `warn` when one had to be passed over.

        Raises:
            CheckpointError: if there is none.
        """
        for step in reversed(self.steps()):
            try:
                return step, self.restore(step, abstract_state)
            except CheckpointError as error:
                warn(f"{error}; falling back to the checkpoint before it")
        raise CheckpointError(self._directory, "no checkpoint that can be restored")

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints after `step`, which a resumed run writes anew."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        self._manager.close()


def _on_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _checksums(state: Any) -> dict[str, int]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8))
        for path, leaf in leaves
    }
