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
_FILE_ENDINGS = {
    *(".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".gguf", ".msgpack", ".npy", ".npz", ".onnx", ".h5", ".pkl"),
    *(
        ".json",
        ".jsonl",
        ".parquet",
        ".toml",
        ".tokens",
        ".txt",
        ".md",
        ".html",
        ".png",
        ".svg",
        ".pdf",
        ".zip",
        ".tar",
        ".gz",
    ),
}

# What files begin with that are not text. Where that is a word, a text may begin with it too, so one more byte counts.
_MAGIC = {
    b"\x1f\x8b": "gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it first",
    b"BZh": "bzip2: unpack it first",
    b"\xfd7zXZ": "xz: unpack it first",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint",
    b"PAR1\x15": "parquet: write its text column to a text file first",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "HDF5",
    b"\x89PNG": "a PNG picture",
    b"%PDF-": "a PDF: extract its text first",
    b"GGUF\2\0": "a GGUF model",
    b"GGUF\3\0": "a GGUF model",
    b"ARROW1\0\0": "an Arrow file: write its text column to a text file first",
    b"MMIDIDX\0\0": "an index of Megatron's token files",
    struct.pack("<i", 20240520): "token ids of llm.c or modded-nanogpt",
    struct.pack("<i", 20240801): "token ids of llm.c",
    b"\xff\xfe\0\0": "UTF-32: convert it first, with iconv -f UTF-32 -t UTF-8",
    b"\0\0\xfe\xff": "UTF-32: convert it first, with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it first, with iconv -f UTF-16 -t UTF-8",
}

# Errors of file systems that cannot do what was asked, rather than of this one file.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# Errors of a rename where the directory around is read-only, the directory is a mount point or comes from a container's
# image, or the file system renames no directories.
_IMMOVABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP)


def local(path: Any) -> Path:
    """Returns a path that a user gave, with its "~" expanded.

    Raises:
        TypeError: for anything but a path.
        ConfigError: for a URL: nothing but the local file system can be read or written; for an empty path, which
            would be the current directory.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected a path, not {short_repr(path)}")
    name = os.fspath(path)
    if not name:
        raise ConfigError("a path is empty: give the name of a file or directory ('.' is the current directory)")
    if found := _URL.match(name):
        scheme = found[1].lower()
        advice = "copy it to a local disk, or mount the bucket and give the path there"
        if scheme in ("http", "https"):
            advice = "download it, or give a model of the Hugging Face hub by its name, such as openai-community/gpt2"
        elif scheme == "file":
            advice = f"give the path itself, {re.sub('^/*', '/', name[found.end() :])}"
        raise ConfigError(f"{name}: {scheme}:// is not a local path: {advice}")
    try:
        return Path(path).expanduser()
    except RuntimeError:  # the home of an unknown user
        return Path(path)


def new_directory(path: Any, force: bool = False) -> Path:
    """Returns the path of a directory that is to be written, checked before any work.

    Raises:
        ConfigError: for a URL, and for a name that is a file's.
        CheckpointError: if it is a file; if it exists and is not empty, unless `force` says that it may be replaced.
    """
    path = local(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(path, "exists and is not a directory: choose another name")
    if path.suffix.lower() in _FILE_ENDINGS and not path.is_dir():
        raise ConfigError(
            f"{path}: a directory is written, and this is a file's name: {path.with_suffix('')}, for example"
        )
    return _new(path, force)


def new_file(path: Any, force: bool = False) -> Path:
    """Returns the path of a file that is to be written, checked before any work.

    Raises:
        ConfigError: for a URL, a directory, a device or a pipe, and if its directory does not exist.
        CheckpointError: if it exists, unless `force` says that it may be replaced.
    """
    path = local(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory: give the name of a file in it")
    if path.exists() and not path.is_file():  # replaced by a file, /dev/null would be gone
        raise ConfigError(f"{path}: is not a file: choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: {path.parent} is not a directory: make it first, or choose another name")
    return _new(path, force)


def _new(path: Path, force: bool) -> Path:
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not force:
        raise CheckpointError(path, "exists: choose another name, or pass --force to replace it")
    return path


def decode_text(data: bytes, errors: str = "strict") -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Args:
        data: the file's content.
        errors: "replace" to read bytes that are not UTF-8 as U+FFFD.

    Raises:
        ValueError: if it is anything else; says what it looks like, or which byte is wrong.
    """
    if reason := not_text(data):
        raise ValueError(reason)
    try:
        return data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None


def not_text(data: bytes) -> str:
    """What data looks like that is not text, although it may be valid UTF-8; '' for text."""
    for start, kind in _MAGIC.items():
        if data.startswith(start):
            return f"not text: it looks like {kind}"
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "not text: it looks like a pickle, which is never loaded"
    if data[6:9] == b"\0\0{":
        return "not text: it looks like a safetensors file"
    if data[257:262] == b"ustar":
        return "not text: it looks like a tar archive: unpack it first"
    sample = data[: 2**20]
    if (encoding := _wide_encoding(sample)) and _mostly_printable(sample.replace(b"\0", b"")):
        advice = f"convert it first, with iconv -f {encoding} -t UTF-8"
        return f"not text: it looks like {encoding[:6]} without a mark: {advice}"
    if not _mostly_printable(sample):
        return (
            "not text: it holds many control characters, perhaps token ids that another program wrote, such as "
            "nanoGPT's train.bin"
        )
    return ""


def _wide_encoding(data: bytes) -> str:
    """The encoding whose Latin letters have zeros where most of the data's are; '' for none."""
    zeros = [4 * data[i::4].count(0) > 3 * (len(data) // 4 or 1) for i in range(4)]
    places = {"UTF-16LE": (1, 3), "UTF-16BE": (0, 2), "UTF-32LE": (1, 2, 3), "UTF-32BE": (0, 1, 2)}
    return next((name for name, odd in places.items() if zeros == [i in odd for i in range(4)]), "")


def _mostly_printable(data: bytes) -> bool:
    """Whether at most one byte in 20 is a control character."""
    controls = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
    return 20 * (len(data) - len(data.translate(None, controls))) <= len(data)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields the name of a new file to write, which replaces `path` once the block ends without an error.

    The file has the permissions and group of the one that it replaces, or those of any file that the user makes.
    """
    path = path.resolve()  # of a link, the file is replaced
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.touch(0o600 if path.exists() else 0o666)  # a private file's content is not shown meanwhile
        status = (path if path.exists() else partial).stat()
        yield partial
        sync(partial)
        _set_permissions(partial, status)  # a library may have made the file again, for the user alone
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

    Until then `path` is unchanged. A directory that is replaced keeps its permissions and group, and so do the files
    in it. A process killed between the last two renames leaves the complete old directory beside it, under a name that
    ends in ".old".

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
        _finish(fresh, path)
        try:
            if path.exists() and fresh != inside:
                path.rename(old)
        except OSError as error:
            if error.errno not in _IMMOVABLE:
                raise
            inside.mkdir()
            for written in fresh.iterdir():
                shutil.copyfile(written, inside / written.name)
            _finish(inside, path)
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
    fresh.mkdir(mode=0o700)
    _set_permissions(fresh, path.stat())


def _set_permissions(path: Path, like: os.stat_result) -> None:
    """Gives a file or directory the group and the permissions of another."""
    status = path.stat()
    if status.st_gid != like.st_gid:
        with contextlib.suppress(PermissionError):  # a group that the user is not in
            os.chown(path, -1, like.st_gid)
    if path.stat().st_mode != like.st_mode:  # not all file systems have modes to set
        path.chmod(stat.S_IMODE(like.st_mode))


def _finish(fresh: Path, path: Path) -> None:
    """Waits until new files are on disk, and gives them the permissions of those in `path` that they will replace."""
    for written in fresh.iterdir():
        sync(written)
        if (former := path / written.name).exists():
            _set_permissions(written, former.stat())
    sync(fresh)


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
        sync(path)
    except OSError:
        for now, before in reversed(moved):
            now.rename(before)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def unfinished(directory: Path) -> str:
    """Says what a process left that was killed while it replaced this directory's files; '' if none was."""
    left = sorted(directory.glob(".*.old")) if directory.is_dir() else []
    return f"a process was killed while it replaced the files: the former ones are in {left[0]}" if left else ""


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of files, is on disk."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a directory
    if path.is_dir() and not os.access(path, os.R_OK):
        return  # a directory to write into, but not to list, cannot be opened either
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
