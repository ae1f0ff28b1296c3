"""Training checkpoints, written by orbax with a manifest of every array, so that damaged ones are found and skipped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgpt.checks import first_line
from jaxgpt.errors import CheckpointError, require
from jaxgpt.model import leaves
from jaxgpt.parallel import distributed, pieces, sharding


def import_orbax() -> Any:
    """Imports the library that writes and reads the files, `orbax.checkpoint`.

    Raises:
        MissingExtraError: without the extra [train].
    """
    library = require("orbax.checkpoint", "train", "saving and reading training checkpoints")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # it logs too much
    return library


class Checkpoints:
    """The checkpoints of one run, in one directory. Saving is atomic; the latest few and the best are kept.

    A checkpoint is written in the background, while the run goes on; it counts once it is complete.

    Args:
        directory: where they are; created if absent, unless `read_only`.
        keep: how many of the latest to keep.
        losses: validation losses of earlier steps; the checkpoint with the lowest is kept too.
        read_only: for reading a run that may still be training.
    """

    def __init__(
        self, directory: Path, keep: int = 1, losses: Mapping[int, float] | None = None, read_only: bool = False
    ):
        self._ocp = ocp = import_orbax()
        self._losses = dict(losses or {})
        self._stale: list[int] = []
        self._writing: int | None = None  # the step that is being written
        self._written = False  # whether one has been since the stale ones were found
        self._quiet = contextlib.ExitStack()  # while it is
        self._on_disk = isinstance(directory, Path)  # or in a bucket
        self._directory = directory.absolute() if self._on_disk else directory
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(keep, self.best_of, self._stale),
            cleanup_tmp_directories=not read_only,  # left by a killed save
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(set(self._manager.all_steps()) - set(self._stale))

    def best_step(self) -> int | None:
        """The step with the lowest validation loss among those with a checkpoint; None if none has a loss."""
        return self.best_of(self.steps())

    def best_of(self, steps: Sequence[int]) -> int | None:
        """The step with the lowest validation loss among `steps`."""
        return min((step for step in steps if step in self._losses), key=self._losses.__getitem__, default=None)

    def save(self, step: int, state: Any, loss: float | None = None) -> None:
        """Starts to write `state`, a pytree of arrays, once the save before is complete. Returns as soon as there is a
        copy of it in the host's memory, so the caller may change or donate its arrays.

        Args:
            step: its number.
            state: what to save.
            loss: the step's validation loss, by which the best is chosen; ignored unless finite.

        Raises:
            CheckpointError: if it, or the one before, cannot be written; earlier checkpoints stay.
        """
        self.finish()
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss
        cut = jax.tree.map(lambda leaf: self._ocp.SaveArgs(chunk_byte_size=pieces.piece_bytes(leaf)), state)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state, save_args=cut), manifest=self._ocp.args.JsonSave(_manifest(state))
        )
        with self._errors_of(step):
            if step in self._stale:
                self._delete(step)
            self._quiet.enter_context(_without_aftermath())
            self._manager.save(step, args=args, force=True)
            self._writing = step

    def check(self) -> None:
        """Raises the CheckpointError of the last save if it is known to have failed; never waits for it."""
        if not self._manager.is_saving_in_progress():
            self._wait()

    def finish(self) -> None:
        """Waits until the last save is complete. Of several processes that train together, all must call it.

        Raises:
            CheckpointError: if it could not be written; earlier checkpoints stay.
        """
        self._wait()
        if self._written:
            for stale in list(self._stale):
                self._delete(stale)

    def _wait(self) -> None:
        if self._writing is None:
            return
        step, self._writing = self._writing, None
        with self._errors_of(step):
            self._manager.wait_until_finished()
        self._quiet.close()
        self._written = True

    @contextlib.contextmanager
    def _errors_of(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._on_disk and not isinstance(error, (OSError, ValueError)):
                raise  # a full disk raises either of these, a bucket anything
            with contextlib.nullcontext() if self._on_disk else contextlib.suppress(Exception):
                self._manager.reload()  # it has already forgotten the checkpoints that this one would have replaced
            traceback.clear_frames(error.__traceback__)  # frees what was abandoned now, and not when the program ends
            reason = f"step {step} could not be written, earlier checkpoints are untouched: {_reason(error)}"
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
            CheckpointError: if it is damaged, or has other shapes or types.
        """
        directory = self._directory / str(step)
        with distributed.fail_together(CheckpointError(directory, "another process could not read it")):
            state, manifest = self._read(directory, abstract_state)
        state = jax.tree.map(pieces.laid_out, state, abstract_state)
        found = _manifest(state)
        with distributed.fail_together(CheckpointError(directory, "another process found it damaged")):
            if damaged := [name for name, entry in found.items() if entry != manifest[name]]:
                raise CheckpointError(directory, f"damaged: {', '.join(damaged[:5])}")
        return state

    def _read(self, directory: Path, abstract_state: Any) -> tuple[Any, dict[str, list]]:
        """(state, manifest), not yet compared with each other; some arrays may be laid out as `pieces.to_read` says."""
        # With the handlers, because the manager would make processes wait for one that has failed.
        with _reading(directory):
            handler = self._ocp.JsonCheckpointHandler()
            manifest = handler.restore(directory / "manifest", args=self._ocp.args.JsonRestore())
        if not isinstance(manifest, dict):
            raise CheckpointError(directory, "damaged: its manifest is not an object")
        expected = {name: [*leaf.shape, str(leaf.dtype)] for name, leaf in leaves(abstract_state).items()}
        found = {name: entry[1:] for name, entry in manifest.items()}
        if differing := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            reason = (
                f"does not fit this run: {differing[0]} and {len(differing) - 1} more are missing or of another shape"
            )
            raise CheckpointError(directory, reason)
        with _reading(directory):
            return self._read_state(directory / "state", jax.tree.map(_on_device, abstract_state)), manifest

    def _read_state(self, directory: Path, abstract_state: Any) -> Any:
        handler = self._ocp.StandardCheckpointHandler()
        if any(map(pieces.is_shared, jax.tree.leaves(abstract_state))):
            stored = leaves(handler.metadata(directory).tree)
            cut = [
                pieces.to_read(leaf, stored[name].storage.chunk_shape) for name, leaf in leaves(abstract_state).items()
            ]
            abstract_state = jax.tree.unflatten(jax.tree.structure(abstract_state), cut)
        return handler.restore(directory, args=self._ocp.args.StandardRestore(abstract_state))

    def restore_latest(self, abstract_state: Any, warn: Callable[[str], None]) -> tuple[int, Any]:
        """(step, state) of the latest intact checkpoint. Calls `warn` for each one that had to be skipped; those are
        deleted once the next one is saved.

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
                self._stale[:], self._written = passed_over, False
                return step, state
        raise CheckpointError(
            self._directory,
            "no checkpoint fits: they are damaged, or the model, the optimizer or the averaging is not the run's own; "
            f"the last one tried {reason}",
        )

    def close(self) -> None:
        """Finishes, unless a save has failed, which has been said."""
        try:
            self.finish()
        finally:
            self._manager.close()


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Turns what is raised while a checkpoint is read into a CheckpointError."""
    try:
        with _without_aftermath():
            yield
    except Exception as error:  # orbax and its storage raise errors of any type for damaged files
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # says nothing about the files
        reason = _reason(error.__cause__ or error)  # orbax's own message is pages long
        raise CheckpointError(directory, f"cannot be restored: {reason}") from error


def _reason(error: BaseException) -> str:
    """What the storage says, and the system's reason, which the line that is kept of a long message may not hold."""
    line, code = first_line(error), re.search(r"os_error_code='(\d+)'", str(error))
    reason = os.strerror(int(code[1])) if code else ""
    return line if reason in line else f"{line}: {reason}"


@contextlib.contextmanager
def _without_aftermath() -> Iterator[None]:
    """Silences orbax's abandoned reads and writes.

    Orbax (0.12, its v1 API included) closes its event loop at the first file that fails without waiting for the other
    reads and writes, and each of those then reports to `sys.unraisablehook` or to asyncio's log that the loop is closed
    or that it failed too: up to thousands of lines after our one, which no option turns off. They arrive late, so the
    hooks stay in place after a failure.
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
    """A preservation policy for orbax: which checkpoints to keep. (Orbax's own policy for the best one stores the
    losses in separate files, and cannot skip damaged ones.)"""

    keep: int
    best_of: Callable[[Sequence[int]], int | None]
    stale: Sequence[int]  # deleted later; they do not count here

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        good = [checkpoint.step for checkpoint in checkpoints if checkpoint.step not in self.stale]
        kept = {*sorted(good)[-self.keep :], self.best_of(good), *self.stale}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _on_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The leaf with a layout: its own, or else the default device."""
    layout = leaf.sharding or jax.sharding.SingleDeviceSharding(sharding.default_device())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


def fingerprint(params: Any) -> str:
    """A short text that changes with any value, shape, type or name of a tree of arrays."""
    return "sha256:" + hashlib.sha256(json.dumps(_manifest(params), sort_keys=True).encode()).hexdigest()


def _manifest(state: Any) -> dict[str, list]:
    """Each array's checksum, sizes and dtype, by name."""
    arrays = leaves(state)
    checksums = jax.device_get(_checksums(arrays))
    return {name: [int(checksums[name]), *array.shape, str(array.dtype)] for name, array in arrays.items()}


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(_checksum, arrays)


def _checksum(x: Array) -> Array:
    """The sum of an array's elements, read as unsigned integers, each times an odd number given by its place, mod 2^32.

    Computed where the array lies, however it is spread over devices and processes: the sum of integers does not depend
    on their order. Any change of one element changes it.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
