"""Training checkpoints: orbax's, with a manifest of every array, so that damage is found and stepped over."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.errors import CheckpointError, first_line, require
from jaxgpt.parallel import distributed, sharding
from jaxgpt.weights.layout import leaves


def import_orbax() -> Any:
    """The library that writes and reads the files, `orbax.checkpoint`.

    Raises:
        MissingExtraError: without the extra [train].
    """
    library = require("orbax.checkpoint", "train", "saving and reading training checkpoints")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # it narrates, at length
    return library


class Checkpoints:
    """The checkpoints of one run, in one directory. Saving is atomic; the latest few and the best are kept.

    Args:
        directory: where they are; made if absent, unless `read_only`.
        keep: how many of the latest stay.
        losses: validation losses of earlier steps; the checkpoint of the lowest stays too.
        read_only: for looking into a run that may be running.
    """

    def __init__(
        self, directory: Path, keep: int = 1, losses: Mapping[int, float] | None = None, read_only: bool = False
    ):
        self._ocp = ocp = import_orbax()
        self._losses = dict(losses or {})
        self._stale: list[int] = []
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(keep, self.best_of, self._stale),
            enable_async_checkpointing=False,  # a save that has returned is on disk
            cleanup_tmp_directories=not read_only,  # what a killed save left
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(set(self._manager.all_steps()) - set(self._stale))

    def best_step(self) -> int | None:
        """The step with the lowest validation loss, if any of those with a checkpoint has one."""
        return self.best_of(self.steps())

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The step with the lowest validation loss among `steps`."""
        return min((step for step in steps if step in self._losses), key=self._losses.__getitem__, default=None)

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Writes `state`, a pytree of arrays; returns when it is on disk.

        Args:
            step: its number.
            state: what to save.
            loss: the step's validation loss, by which the best is chosen; one that is not finite does not count.

        Raises:
            CheckpointError: if it cannot be written; the checkpoints before it stay.
        """
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), manifest=self._ocp.args.JsonSave(_manifest(state))
        )
        try:
            if step in self._stale:
                self._delete(step)
            with _without_aftermath():
                self._manager.save(step, args=args, force=True)
            for stale in list(self._stale):
                self._delete(stale)
        except (OSError, ValueError) as error:  # a full disk reaches us as either
            reason = f"step {step} could not be written, earlier checkpoints are untouched: {first_line(error)}"
            raise CheckpointError(self._directory, reason) from error

    def _delete(self, step: int) -> None:
        self._manager.delete(step)
        self._stale.remove(step)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Reads the state of one step.

        Args:
            step: one of `steps()`.
            abstract_state: the tree of shapes and types to expect, from `jax.eval_shape`.

        Raises:
            CheckpointError: if it is damaged, or not of these shapes.
        """
        directory = self._directory / str(step)
        with distributed.together(CheckpointError(directory, "another process could not read it")):
            state, manifest = self._read(directory, abstract_state)
        found = _manifest(state)
        with distributed.together(CheckpointError(directory, "another process found it damaged")):
            if damaged := [name for name, entry in found.items() if entry != manifest[name]]:
                raise CheckpointError(directory, f"damaged: {', '.join(damaged[:5])}")
        return state

    def _read(self, directory: Path, abstract_state: Any) -> tuple[Any, dict[str, list]]:
        """(state, its manifest), the state not yet compared with it."""
        # By the handlers, because the manager lets processes wait for one that has failed.
        manifest = self._item(self._ocp.JsonCheckpointHandler, directory / "manifest", self._ocp.args.JsonRestore())
        if not isinstance(manifest, dict):
            raise CheckpointError(directory, "damaged: its manifest is not an object")
        expected = {name: [*leaf.shape, str(leaf.dtype)] for name, leaf in leaves(abstract_state).items()}
        found = {name: entry[1:] for name, entry in manifest.items()}
        if differing := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            reason = f"is not this run's: {differing[0]} and {len(differing) - 1} more are missing or of another shape"
            raise CheckpointError(directory, reason)
        args = self._ocp.args.StandardRestore(jax.tree.map(_on_device, abstract_state))
        return self._item(self._ocp.StandardCheckpointHandler, directory / "state", args), manifest

    def _item(self, handler: Callable[[], Any], directory: Path, args: Any) -> Any:
        try:
            with _without_aftermath():
                return handler().restore(directory, args=args)
        except Exception as error:  # whatever orbax and its storage raise at damaged files is open-ended
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # says nothing of the files
            reason = first_line(error.__cause__ or error)  # orbax's own is of pages
            raise CheckpointError(directory.parent, f"cannot be restored: {reason}") from error

    def restore_latest(self, abstract_state: Any, warn: Callable[[str], None]) -> tuple[int, Any]:
        """(step, state) of the latest checkpoint that is whole. Says so through `warn` when one had to be passed
        over; those are deleted once the next one is saved.

        Raises:
            CheckpointError: if there is none.
        """
        passed_over: list[int] = []
        reason = ""
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, abstract_state)
            except CheckpointError as error:
                warn(f"{error}; falling back to the checkpoint before it")
                passed_over.append(step)
                reason = error.reason
            else:
                self._stale[:] = passed_over
                return step, state
        raise CheckpointError(
            self._directory,
            "no checkpoint fits: they are damaged, or the model, the optimizer or the averaging is not the run's own; "
            f"the last that was tried {reason}",
        )

    def close(self) -> None:
        self._manager.close()


@contextlib.contextmanager
def _without_aftermath() -> Iterator[None]:
    """Keeps orbax's abandoned reads and writes quiet.

    Orbax (0.12, its v1 API included) closes its event loop at the first file that fails without waiting for the other
    reads and writes, and each of those then reports to `sys.unraisablehook` or to asyncio's log that the loop is closed
    or that it failed too: up to thousands of lines after our one, which no option turns off. They come late, so after a
    failure the hooks stay.
    """
    report, asyncio_log = sys.unraisablehook, logging.getLogger("asyncio")

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if str(unraisable.exc_value) != "Event loop is closed" and "orbax" not in getattr(code, "co_filename", ""):
            report(unraisable)

    def not_orbax(record: logging.LogRecord) -> bool:
        return not re.search("orbax|TensorStore|OCDBT", record.getMessage())

    sys.unraisablehook = hook
    asyncio_log.addFilter(not_orbax)
    yield
    sys.unraisablehook = report
    asyncio_log.removeFilter(not_orbax)


@dataclasses.dataclass
class _LatestAndBest:
    """Orbax's preservation policy: which checkpoints stay. (Its own policy for the best keeps the losses in files of
    their own, which, damaged, it cannot step over.)"""

    keep: int
    best_of: Callable[[Sequence[int]], int | None]
    stale: Sequence[int]  # they go later, and do not count here

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        good = [checkpoint.step for checkpoint in checkpoints if checkpoint.step not in self.stale]
        kept = {*sorted(good)[-self.keep :], self.best_of(good), *self.stale}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _on_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape with a layout: its own, or the default device."""
    layout = leaf.sharding or jax.sharding.SingleDeviceSharding(sharding.default_device())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


def _manifest(state: Any) -> dict[str, list]:
    """By name, each array's checksum, sizes and type."""
    arrays = leaves(state)
    checksums = jax.device_get(_checksums(arrays))
    return {name: [int(checksums[name]), *array.shape, str(array.dtype)] for name, array in arrays.items()}


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(_checksum, arrays)


def _checksum(x: Array) -> Array:
    """The sum of an array's elements, read as unsigned integers, each times an odd number of its place, modulo 2^32.

    Computed where the array lies, whichever way it is spread over devices and processes: integers add up to the same
    in any order. Any change of one element shows.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
