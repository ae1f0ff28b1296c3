"""Where a run's directory lies: on a disk, or in a bucket of Google Cloud Storage, "gs://bucket/name".

`storage` decides which, from the name alone. `Disk` and `Bucket` do the same. Objects in a bucket are replaced whole
and never appended to, no directory can be renamed, and no lock ends with the process that holds it. So

| | on a disk | in a bucket |
|---|---|---|
| a checkpoint is complete | once its directory has its name | once orbax has written its commit_success.txt |
| a line of metrics | is appended | is in memory until the next checkpoint, at most `FLUSH` seconds |
| one trainer at a time | a lock of the system | the object `.lock`, which its trainer renews (lease.py) |

A killed trainer loses no line that a resumed run would not write again: the lines up to a checkpoint's step are in the
bucket before the checkpoint is. Of several processes, each writes its own part of a checkpoint to the bucket.

Google's clients find the credentials, as after `gcloud auth application-default login`. They need the roles
storage.objectUser and, as orbax asks for the bucket itself, storage.legacyBucketReader on the bucket.

S3 is refused: to orbax 0.12.8, every URL but gs:// is a path on the disk. What works instead is a run on a disk, and
`aws s3 sync RUN s3://BUCKET/NAME` once it has ended or stopped; copied back, it resumes. A run in a mounted bucket
needs a file system that appends to files and renames directories. Mountpoint for Amazon S3 does neither in ordinary
buckets, by its documentation. Cloud Storage FUSE renames a directory object by object, so a kill can leave half a
checkpoint under its final name, and a lock there may not hold between machines: use gs:// instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt.checks import first_line
from jaxgpt.errors import CheckpointError, ConfigError, require
from jaxgpt.files import local, new_directory, replacing_directory, unsupported, write_text
from jaxgpt.textfile import parse_json, read_json
from jaxgpt.training.lease import ANOTHER, LOCK, Lease

# Seconds.
FLUSH = 30.0  # between two writes of the metrics to a bucket, without a checkpoint
REACH = 20.0  # in which a bucket must answer


def bucket_url(path: Any) -> str | None:
    """The URL of a directory in a bucket, without a "/" at its end; None for anything else. Asks no bucket.

    Raises:
        ConfigError: for s3://, and for a name that does not mean the same to all that read and write there.
    """
    found = re.match(r"(gs|s3):/+(.*)", str(path), re.IGNORECASE | re.DOTALL)  # `Path` makes one slash of two
    if found is None:
        return None
    if found[1].lower() == "s3":
        raise ConfigError(
            f"{path}: s3:// is not a local path, and orbax, which writes the checkpoints, cannot write to S3: use a "
            "local disk, and copy the run once it has ended or stopped (aws s3 sync), or gs://"
        )
    name = found[2].rstrip("/")
    parts = name.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"(?!\.+$)[A-Za-z0-9._=+@,-]+", part) for part in parts):
        raise ConfigError(
            f"{path}: expected gs://BUCKET/NAME, with names of letters, digits and . _ = + @ , - between single slashes"
        )
    return f"gs://{name}"


def storage(path: Any) -> Disk | Bucket:
    """What holds the run's directory `path`. Asks no bucket.

    Raises:
        TypeError, ConfigError: as from `files.local`; also as from `bucket_url`.
        MissingExtraError: for a bucket, without the extra [gs].
    """
    url = bucket_url(path)
    return Disk(local(path)) if url is None else Bucket(url)


class Disk:
    """A directory of the file system."""

    def __init__(self, path: Path):
        self.path: Any = path

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    def absolute(self) -> str | None:
        """The directory as another working directory names it; None if it does not exist."""
        return os.path.abspath(self.path) if os.path.exists(self.path) else None

    def holds_run(self) -> bool:
        """Whether this is a run's directory, and not a model's."""
        with contextlib.suppress(OSError):  # a name that no file can have
            return (self.path / "run.json").is_file() and not (self.path / "config.json").exists()
        return False

    def check(self) -> None:
        """Nothing that the first read or write would not say too."""

    def check_writable(self) -> None:
        """Raises as `files.new_directory` does."""
        new_directory(self.path, force=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the directory for one trainer; the lock is released when the process ends, however it ends.

        Raises:
            CheckpointError: if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(self.path, ANOTHER) from None
            except OSError as error:
                if not unsupported(error, self.path, "lock files, so a second trainer here would go unnoticed"):
                    raise
            yield

    def make(self, directory: Path) -> None:
        """Creates a directory of the run."""
        directory.mkdir(parents=True, exist_ok=True)

    def sees(self, directory: Path) -> bool:
        """Whether this process sees a directory that another has made."""
        return directory.is_dir()

    def read_json(self, path: Path) -> Any:
        """Parses a JSON file; raises a ConfigError naming it."""
        return read_json(path)

    def write(self, path: Path, text: str) -> None:
        """Writes a text, whole or not at all."""
        write_text(path, text)

    def append(self, path: Path, text: str) -> None:
        """Adds to a text."""
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def flush(self) -> None:
        """What was appended is there already."""

    @contextlib.contextmanager
    def reading(self, directory: Path) -> Iterator[Path]:
        """A local directory with the files of this one."""
        yield directory

    @contextlib.contextmanager
    def replacing(self, directory: Path, last: str) -> Iterator[Path]:
        """A new local directory, whose files replace those of this one at the end, `last` as the last."""
        with replacing_directory(directory, last=last) as fresh:
            yield fresh

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A local file to write, of the same name."""
        yield path


class Bucket:
    """A directory in a bucket of Google Cloud Storage.

    Credentials, project and endpoint are those of Google's clients: `gcloud auth application-default login`, or
    GOOGLE_APPLICATION_CREDENTIALS; on Google Cloud, the machine's own.

    Raises:
        MissingExtraError: without the extra [gs] (or [train], whose `etils` names what lies in buckets).
    """

    def __init__(self, url: str):
        for module, extra in (("etils.epath", "train"), ("gcsfs", "gs"), ("google.cloud.storage", "gs")):
            require(module, extra, f"{url}: a run in a bucket")
        import fsspec.config
        from etils import epath

        # Otherwise it lists a directory only once, and a process never sees what others write into it.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
        # It warns, at each access, that it may not ask in which of two ways the bucket keeps its names.
        logging.getLogger("gcsfs").setLevel(logging.ERROR)
        self.path: Any = epath.Path(url)
        self._lease: Lease | None = None
        self._logs: dict[Any, list[str]] = {}  # by path, the whole text, in pieces
        self._flushed = time.monotonic()

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    def absolute(self) -> str:
        """The URL."""
        return str(self.path)

    def holds_run(self) -> bool:
        """True, unasked: nothing but runs is read from buckets."""
        return True

    def check(self) -> None:
        """Raises a CheckpointError that says what to do if the bucket does not exist, cannot be reached, or may not be
        used."""
        self._open()

    check_writable = check

    def _open(self) -> Any:
        """The client's bucket."""
        from google.api_core import exceptions
        from google.auth import exceptions as auth
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        name = self.path.parts[2]
        try:
            # Orbax asks for the bucket itself too, which needs a permission that those for objects do not include.
            return storage.Client().get_bucket(name, timeout=REACH, retry=DEFAULT_RETRY.with_timeout(REACH))
        except auth.DefaultCredentialsError:
            reason = (
                "no credentials: log in with gcloud auth application-default login, or name a key file in "
                "GOOGLE_APPLICATION_CREDENTIALS"
            )
        except exceptions.NotFound:
            reason = f"there is no bucket {name}: make it first (gcloud storage buckets create gs://{name})"
        except (exceptions.Forbidden, exceptions.Unauthorized) as error:
            reason = (
                "the credentials do not suffice; a run needs the roles storage.objectUser and "
                f"storage.legacyBucketReader on the bucket ({first_line(error)})"
            )
        except Exception as error:  # of the network, of many libraries
            reason = f"the bucket cannot be reached ({first_line(error)})"
        raise CheckpointError(self.path, reason) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory for one trainer, by a `Lease`, and writes what was appended at the end.

        Raises:
            CheckpointError: if another process holds it; as from `check`.
        """
        with Lease(self.path, self._open()) as self._lease:
            try:
                yield
            except BaseException:
                with contextlib.suppress(CheckpointError):
                    self.flush()
                raise
            self.flush()

    def make(self, directory: Any) -> None:
        """A bucket has no directories."""

    def sees(self, directory: Any) -> bool:
        """Whether this process sees the lock of the one that writes."""
        return (self.path / LOCK).exists()

    def read_json(self, path: Any) -> Any:
        """Parses a JSON file; raises a ConfigError naming it."""
        return parse_json(path, path.read_bytes())

    def write(self, path: Any, text: str) -> None:
        """Writes a text, whole or not at all."""
        self._logs.pop(path, None)
        with self._errors_of(path):
            path.write_text(text)

    def append(self, path: Any, text: str) -> None:
        """Adds to a text, of which the bucket gets the whole at the next `flush`."""
        if path not in self._logs:
            self._logs[path] = [path.read_text()] if path.exists() else []
        self._logs[path].append(text)
        if time.monotonic() - self._flushed > FLUSH:
            self.flush()

    def flush(self) -> None:
        """Writes what was appended: each text whole, so that a write whose answer was lost can be tried again. (A text
        that a server adds to would then hold lines twice. A million lines of metrics are 150 MB.)

        Raises:
            CheckpointError: if it cannot be written, or if another trainer has taken over.
        """
        if self._lease is not None:
            self._lease.check()
        self._flushed = time.monotonic()
        for path, texts in self._logs.items():
            with self._errors_of(path):
                path.write_text("".join(texts))

    @contextlib.contextmanager
    def reading(self, directory: Any) -> Iterator[Path]:
        """A local directory with the files of this one."""
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            for entry in directory.iterdir() if directory.is_dir() else ():
                (copy / entry.name).write_bytes(entry.read_bytes())
            yield copy

    @contextlib.contextmanager
    def replacing(self, directory: Any, last: str) -> Iterator[Path]:
        """A new local directory, whose files replace those of this one at the end, `last` as the last."""
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
            with self._errors_of(directory):
                files = sorted(Path(name).iterdir(), key=lambda file: file.name == last)
                former = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
                for file in files:
                    (directory / file.name).write_bytes(file.read_bytes())
                for gone in former - {file.name for file in files}:
                    (directory / gone).unlink()

    @contextlib.contextmanager
    def writing(self, path: Any) -> Iterator[Path]:
        """A local file to write, of the same name, which is then copied to the bucket."""
        with tempfile.TemporaryDirectory() as name:
            yield (file := Path(name) / path.name)
            with self._errors_of(path):
                path.write_bytes(file.read_bytes())

    @contextlib.contextmanager
    def _errors_of(self, path: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the network, of many libraries
            raise CheckpointError(path, f"could not be written: {first_line(error)}") from error
