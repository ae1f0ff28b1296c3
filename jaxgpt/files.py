"""Files and directories that users name: where they are, what they hold, and writing them so that a crash leaves the
old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgpt.checks import short_repr
from jaxgpt.errors import CheckpointError, ConfigError

# "gs://bucket/name", also after `Path` has made one slash of two. One letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")

# Names with these endings are files', so a directory is hardly what was meant.
_FILE_ENDINGS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".gguf", ".msgpack", ".npz", ".onnx", ".json", ".txt")

# What files begin with that are not text.
_MAGIC = {
    b"\x1f\x8b": "gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it first",
    b"BZh": "bzip2: unpack it first",
    b"\xfd7zXZ": "xz: unpack it first",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"PAR1": "parquet: write its text column to a text file first",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "HDF5",
    b"\x89PNG": "a PNG picture",
    b"%PDF-": "a PDF: extract its text first",
    b"GGUF": "a GGUF model",
    b"MMIDIDX": "an index of Megatron's token files",
    struct.pack("<i", 20240520): "token ids of llm.c or modded-nanogpt",
    struct.pack("<i", 20240801): "token ids of llm.c",
    b"\xff\xfe": "UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8",
}

# Errors of file systems that cannot do what was asked, rather than of this one file.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# Errors of a rename where the directory around is read-only, or the directory is a mount point.
_IMMOVABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


def local(path: Any) -> Path:
    """Returns a path that a user gave, with its "~" expanded.

    Raises:
        TypeError: for anything but a path.
        ConfigError: for a URL: nothing but the local file system can be read or written.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected a path, not {short_repr(path)}")
    if scheme := _URL.match(os.fspath(path)):
        raise ConfigError(
            f"{os.fspath(path)}: {scheme[1]}:// is not a local path: copy it to a local disk, or mount the bucket and "
            "give the path there"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home of an unknown user
        return Path(path)


def new_directory(path: Any, force: bool = False) -> Path:
    """Returns the path of a directory that is to be written, checked before any work.

    Raises:
        ConfigError: for a URL, and for a name that is a file's.
        CheckpointError: if it exists and is not empty, unless `force` says that it may be replaced.
    """
    path = local(path)
    if path.suffix.lower() in _FILE_ENDINGS and not path.is_dir():
        raise ConfigError(
            f"{path}: a directory is written, and this is a file's name: {path.with_suffix('')}, for example"
        )
    return _new(path, force)


def new_file(path: Any, force: bool = False) -> Path:
    """Returns the path of a file that is to be written, checked before any work.

    Raises:
        ConfigError: for a URL, and for a directory.
        CheckpointError: if it exists, unless `force` says that it may be replaced.
    """
    path = local(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory: give the name of a file in it")
    return _new(path, force)


def _new(path: Path, force: bool) -> Path:
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not force:
        raise CheckpointError(path, "exists: choose another name, or pass --force to replace it")
    return path


def decode_text(data: bytes) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
        ValueError: if it is anything else; says what it looks like, or which byte is wrong.
    """
    if reason := not_text(data):
        raise ValueError(reason)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"neither a token file nor UTF-8 text (byte {error.start})") from None


def not_text(data: bytes) -> str:
    """What data looks like that is not text, although it may be valid UTF-8; '' for text."""
    for start, kind in _MAGIC.items():
        if data.startswith(start):
            return f"not text: it looks like {kind}"
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "not text: it looks like a pickle, which is never loaded"
    sample = data[: 2**20]
    zeros = [sample[parity::2].count(0) for parity in (0, 1)]
    if max(zeros) * 4 > len(sample) and min(zeros) * 40 < len(sample) and _mostly_printable(sample.replace(b"\0", b"")):
        order = "LE" if zeros[1] > zeros[0] else "BE"
        return f"not text: it looks like UTF-16 without a mark: convert it first, with iconv -f UTF-16{order} -t UTF-8"
    if not _mostly_printable(sample):
        return (
            "not text: it holds many control characters, perhaps token ids that another program wrote, such as "
            "nanoGPT's train.bin (`jaxgpt tokenize` makes ours, from the text)"
        )
    return ""


def _mostly_printable(data: bytes) -> bool:
    """Whether at most one byte in 20 is a control character."""
    controls = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
    return 20 * (len(data) - len(data.translate(None, controls))) <= len(data)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields the name of a new file to write, which replaces `path` once the block ends without an error.

    The file has the permissions of the one that it replaces, or those of any file that the user makes.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch()  # libraries may make files that only the user can read
        mode = stat.S_IMODE((path if path.exists() else partial).stat().st_mode)
        yield partial
        partial.chmod(mode)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_directory(path: Path, last: str) -> Iterator[Path]:
    """Yields a new directory to write into, which replaces `path` once the block ends without an error.

    Until then `path` is unchanged. A directory that is replaced keeps its permissions and group. A process killed
    between the last two renames leaves the complete old directory beside it, under a name that ends in ".old".

    Where the directory cannot be renamed (a mount point; a parent that is read-only) the files in it are, from and to
    directories inside it. `last` is then removed first and comes last, so that whoever reads the directory meanwhile
    finds it incomplete, and never a mixture.

    Raises:
        CheckpointError: naming `path`, if writing or the block fails; `path` then still holds what it held before.
    """
    path = path.resolve()
    token = secrets.token_hex(4)
    fresh, old = (path.with_name(f".{path.name}.{token}.{kind}") for kind in ("new", "old"))
    inside = path / f".{token}.new"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _make_like(fresh, path)
        except OSError as error:
            if error.errno not in _IMMOVABLE or not path.is_dir():
                raise
            fresh = inside
            fresh.mkdir()
        yield fresh
        for written in (*fresh.iterdir(), fresh):
            sync(written)
        try:
            if path.exists() and fresh != inside:
                path.rename(old)
        except OSError as error:
            if error.errno not in _IMMOVABLE:
                raise
            shutil.copytree(fresh, inside)
            for written in inside.iterdir():
                sync(written)
        if inside.exists():
            _exchange_files(path, inside, path / f".{token}.old", last)
        else:
            fresh.rename(path)
            sync(path.parent)
    except CheckpointError as error:  # it names the new directory, which will no longer exist
        raise CheckpointError(path, error.reason) from None
    except OSError as error:
        raise CheckpointError(path, f"could not be written ({error}); what was there before is unchanged") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (fresh, old, inside):
            shutil.rmtree(leftover, ignore_errors=True)


def _make_like(fresh: Path, path: Path) -> None:
    """Makes a directory, with the permissions and the group of `path` if that exists."""
    if not path.exists():
        fresh.mkdir()
        return
    status = path.stat()
    fresh.mkdir(mode=0o700)
    with contextlib.suppress(PermissionError):  # of a group that the user is not in
        os.chown(fresh, -1, status.st_gid)
    fresh.chmod(stat.S_IMODE(status.st_mode))


def _exchange_files(path: Path, fresh: Path, old: Path, last: str) -> None:
    old.mkdir()
    former = sorted(
        (entry for entry in path.iterdir() if entry not in (fresh, old)), key=lambda entry: entry.name != last
    )
    moved: list[tuple[Path, Path]] = []
    try:
        for entry in former:
            entry.rename(old / entry.name)
            moved.append((old / entry.name, entry))
        for entry in sorted(fresh.iterdir(), key=lambda entry: entry.name == last):
            entry.rename(path / entry.name)
            moved.append((path / entry.name, fresh / entry.name))
    except OSError:
        for now, before in reversed(moved):
            now.rename(before)
        old.rmdir()
        raise
    sync(path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of files, is on disk."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a directory
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or not unsupported(error, path, "confirm that new names are on disk (fsync)"):
            raise
    finally:
        os.close(descriptor)


def unsupported(error: OSError, directory: Path, what: str) -> bool:
    """Whether the file system cannot do `what`, of which it then warns: the work goes on without."""
    if error.errno not in _UNSUPPORTED:
        return False
    warnings.warn(f"{directory}: this file system cannot {what} ({error.strerror})", stacklevel=3)
    return True
