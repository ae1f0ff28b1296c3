"""The lease on a run's directory in a bucket: the lock of one trainer, where no lock ends with its process.

It is an object that its holder writes again and again, and that only who has seen its latest state can write or delete
(a condition on its generation, which the server checks). That of a trainer that was killed is taken over once nobody
has renewed it for `STALE` seconds, while the next one waits. A trainer that could not renew it for so long, and lost
it, ends when it next asks (`Lease.check`).
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from typing import Any

from jaxgpt.checks import first_line
from jaxgpt.errors import CheckpointError

# The name of the lock in a run's directory, on a disk too, and what the second trainer there is told.
LOCK = ".lock"
ANOTHER = "another trainer is running in this directory"

# Seconds.
RENEWAL = 10.0  # between two signs of life of the trainer that holds a directory
STALE = 3 * RENEWAL  # after which a lock without one is another's to take


class Lease:
    """A context manager that holds a directory in a bucket.

    Args:
        directory: the directory.
        bucket: the client's bucket.

    Raises:
        CheckpointError: if another process holds it, or the bucket cannot be written.
    """

    def __init__(self, directory: Any, bucket: Any):
        self._directory = directory
        self._bucket = bucket
        self._name = "/".join((*directory.parts[3:], LOCK))
        self._text = secrets.token_hex(16)
        self._generation = 0
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="lock of a bucket")
        self._lost = False

    def __enter__(self) -> Lease:
        if not self._write(0) and not self._write(self._abandoned()):
            raise CheckpointError(self._directory, ANOTHER)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewer.join()
        with contextlib.suppress(Exception):  # what stays is taken over by the next
            self._bucket.blob(self._name).delete(if_generation_match=self._generation)

    def check(self) -> None:
        """Raises a CheckpointError if another trainer has taken over."""
        if self._lost:
            raise CheckpointError(
                self._directory,
                f"{ANOTHER}: this one gave no sign of life for {STALE:.0f} seconds, and it took over. This one ends",
            )

    def _write(self, generation: int) -> bool:
        """Writes the object if it is still at a generation (0: if there is none); whether it is ours now."""
        from google.api_core import exceptions

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(self._text, if_generation_match=generation)
        except exceptions.PreconditionFailed:
            # Of a write that succeeded, but whose answer was lost and which was therefore tried again, too.
            blob = self._bucket.get_blob(self._name)
            if blob is None or blob.download_as_text() != self._text:
                return False
        except exceptions.GoogleAPICallError as error:
            raise CheckpointError(self._directory, f"could not be written: {first_line(error)}") from None
        self._generation = blob.generation
        return True

    def _abandoned(self) -> int:
        """The generation of another's object once it has not changed for `STALE` seconds; 0 once it is gone.

        Raises:
            CheckpointError: once it has changed.
        """
        print(
            f"jaxgpt: {self._directory}/{LOCK} is there: waiting {STALE:.0f} seconds to see whether its trainer lives",
            file=sys.stderr,
            flush=True,
        )
        first, end = self._seen(), time.monotonic() + STALE
        while first and time.monotonic() < end:
            time.sleep(RENEWAL / 10)
            if (now := self._seen()) != first:
                if now:
                    raise CheckpointError(self._directory, ANOTHER)
                return 0
        return first

    def _seen(self) -> int:
        blob = self._bucket.get_blob(self._name)
        return 0 if blob is None else blob.generation

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            with contextlib.suppress(Exception):  # of the network: the next attempt may succeed
                if not self._write(self._generation):
                    self._lost = True
                    return
