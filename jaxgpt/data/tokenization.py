"""Text files to shards of token ids: in parallel, in bounded memory, and resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.checks import short_repr
from jaxgpt.data.contents import TEXT_KEY
from jaxgpt.data.documents import PIECE, Block, open_documents
from jaxgpt.data.encoding import Counts, Encoded, Encoder, encode
from jaxgpt.data.finding import TEXT_ENDINGS, find_files
from jaxgpt.data.shards import (
    INDEX,
    PROGRESS,
    ShardEntry,
    ShardIndex,
    open_shard,
    read_entries,
    remove_partial,
    remove_shards,
    shard_name,
)
from jaxgpt.data.tokens import writing
from jaxgpt.errors import CheckpointError, ConfigError, DataError
from jaxgpt.files import new_directory, sync, unsupported, write_text
from jaxgpt.textfile import read_json
from jaxgpt.tokenizer import Tokenizer, get_tokenizer

# Bytes of text that are worth a process.
_WORTH_A_PROCESS = 2**23
_FORMAT = "jaxgpt-token-progress"
_PROGRESS_LIMIT = 2**28  # bytes; it lists every source


class Report(NamedTuple):
    """How far `tokenize` has come.

    Attributes:
        read: bytes of the files that have been read.
        total: bytes of all files.
        size: bytes of text that have been encoded since it was started.
        tokens: ids in all shards.
    """

    read: int
    total: int
    size: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What `tokenize` has written.

    Attributes:
        index: the index of the shards.
        counts: what it came upon.
        kept: how many of the shards had been finished when it was started.
    """

    index: ShardIndex
    counts: Counts
    kept: int


def tokenize(
    sources: Sequence[str | Path],
    out: str | Path,
    tokenizer: str | Path = "gpt2",
    *,
    workers: int | None = 1,
    shard_tokens: int = 100_000_000,
    text_key: str = TEXT_KEY,
    allow_special: bool = False,
    skip_bad: bool = False,
    force: bool = False,
    report: Callable[[Report], object] = lambda _: None,
) -> Tokenized:
    """Encodes documents into a directory of shards. End-of-text follows each document, if the tokenizer has it.

    What is written depends on neither `workers` nor on how often the work was interrupted: called again with the same
    arguments, it goes on after the last whole shard. Memory does not grow with the files; but a tokenizer whose
    `find_cut` finds nothing (as a rule, one that is not byte-level BPE) encodes each document whole.

    Args:
        sources: files of the formats of `jaxgpt.data.documents`, directories and patterns of such files.
        out: the directory to write.
        tokenizer: anything that `get_tokenizer` takes.
        workers: processes that encode; None for one per CPU core, if there is enough to do. In a script, more than one
            need the usual `if __name__ == "__main__":`.
        shard_tokens: a shard is closed once it has so many ids; it may have some 100,000 more.
        text_key: where a record has its text.
        allow_special: whether special tokens in texts, such as `<|endoftext|>`, are tokens.
        skip_bad: whether to leave out records without a text instead of raising.
        force: whether to replace the shards in the directory.
        report: called after every block.

    Raises:
        DataError: if a source cannot be read, or holds something else than documents; if there are no tokens; if a
            shard cannot be written.
        CheckpointError: if the directory holds something else, or another process writes there; `force` replaces the
            former.
        ConfigError: for a `workers` or `shard_tokens` below 1; if sources or settings are not those of the shards that
            are there.
    """
    for name, value in (("workers", workers), ("shard_tokens", shard_tokens)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} must be a number from 1 on, not {short_repr(value)}")
    directory = new_directory(out, force=True)
    files = [file for source in sources for file in find_files(source, TEXT_ENDINGS)]
    encoder = Encoder(get_tokenizer(tokenizer), allow_special=allow_special, skip_bad=skip_bad)
    encoder.tokenizer.encode("")  # it may lack a library
    settings = {
        "tokenizer": encoder.tokenizer.name,
        "shard_tokens": shard_tokens,
        "text_key": text_key,
        "allow_special": allow_special,
        "piece": PIECE,
    }
    for file in filter(os.path.isfile, files):  # a pipe can be read only once
        with open_documents(file, text_key):
            pass
    job = _Job(directory, encoder.tokenizer, files, settings)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(cores, job.total // _WORTH_A_PROCESS))
    with _locked(directory):
        kept = job.begin(force)
        blocks = job.blocks(text_key)
        with contextlib.closing(blocks), contextlib.closing(encode(blocks, encoder, workers)) as encoded:
            job.write(encoded, shard_tokens, report)
        return Tokenized(job.finish(), job.counts, kept)


class _Job:
    """The work on one directory; `progress.json` holds what is needed to go on with it.

    Attributes:
        directory: what is written.
        tokenizer: makes the ids.
        files: the sources, with their sizes and times of modification.
        settings: what else the ids and their order depend on.
        shards: those that are finished.
        position: a file, and the number of its blocks that are in these, as are the files before it.
        counts: what was in these blocks.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, files: Sequence[Path], settings: dict[str, Any]):
        self.directory, self.tokenizer, self.settings = directory, tokenizer, settings
        self.files = {os.path.abspath(file): _stamp(file) for file in files}
        if len(self.files) < len(files):
            twice = next(file for i, file in enumerate(files) if file in files[:i])
            raise ConfigError(f"{twice} is given twice")
        self.shards: list[ShardEntry] = []
        self.position = (os.path.abspath(files[0]), 0)
        self.counts = Counts()

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def begin(self, force: bool) -> int:
        """Prepares the directory, and returns how many finished shards it has."""
        remove_partial(self.directory)
        if force:
            remove_shards(self.directory)
        elif (self.directory / PROGRESS).exists() and not (self.directory / INDEX).exists():
            self._restore(self.directory / PROGRESS)
        elif any(self.directory.iterdir()):
            raise CheckpointError(self.directory, "exists: choose another name, or pass --force to replace it")
        self._save()
        return len(self.shards)

    def blocks(self, text_key: str) -> Generator[Block]:
        """The blocks that are not yet in shards."""
        first, done = self.position
        for path in itertools.dropwhile(lambda path: path != first, self.files):
            with open_documents(path, text_key) as documents:
                blocks = documents.blocks(self.tokenizer.find_cut)
                yield from itertools.islice(blocks, done if path == first else 0, None)

    def write(self, encoded: Iterator[Encoded], shard_tokens: int, report: Callable[[Report], object]) -> None:
        """Writes all blocks into shards, each closed by the block with which it is full."""
        encoded = self._counted(encoded, report)
        for first in encoded:
            name, documents, block = shard_name(len(self.shards)), 0, first
            with writing(self.directory / name, self.tokenizer.name, self.tokenizer.vocab_size) as shard:
                for block in itertools.chain([first], encoded):
                    shard.write(block.ids_N)
                    documents += block.documents
                    if shard.count >= shard_tokens:
                        break
            self.position = (str(block.end.path), block.end.blocks)
            self.shards.append(ShardEntry(name, shard.count, documents, shard.sha256))
            self._save()

    def finish(self) -> ShardIndex:
        """Writes the index."""
        if not self.shards:
            remove_shards(self.directory)
            raise DataError(f"{next(iter(self.files))}: holds no text, and nor do the other sources, if any")
        shards = tuple(self.shards)
        index = ShardIndex(self.tokenizer.name, self.tokenizer.vocab_size, self.tokenizer.end_of_text, shards)
        index.write(self.directory)
        (self.directory / PROGRESS).unlink()
        sync(self.directory)
        return index

    def _counted(self, encoded: Iterator[Encoded], report: Callable[[Report], object]) -> Iterator[Encoded]:
        """The blocks that hold ids. All are counted and reported."""
        before = dict(
            zip(self.files, itertools.accumulate((size for size, _ in self.files.values()), initial=0), strict=False)
        )
        size, tokens = 0, sum(shard.tokens for shard in self.shards)
        for block in encoded:
            self.counts.add(block.counts)
            size, tokens = size + block.size, tokens + len(block.ids_N)
            if len(block.ids_N):
                yield block
            report(Report(before[str(block.end.path)] + block.end.read, self.total, size, tokens))

    def _save(self) -> None:
        content = {
            "format": _FORMAT,
            "settings": self.settings,
            "files": self.files,
            "position": self.position,
            "counts": dataclasses.asdict(self.counts),
            "shards": [shard._asdict() for shard in self.shards],
        }
        try:
            write_text(self.directory / PROGRESS, json.dumps(content) + "\n")
        except OSError as error:
            raise DataError(f"{self.directory / PROGRESS}: cannot be written: {error}") from None

    def _restore(self, path: Path) -> None:
        content = read_json(path, _PROGRESS_LIMIT)
        names = {field.name: type(field.default) for field in dataclasses.fields(Counts)}
        good = (
            isinstance(content, dict)
            and content.get("format") == _FORMAT
            and isinstance(content.get("settings"), dict)
            and isinstance(content.get("files"), dict)
            and isinstance(content.get("counts"), dict)
            and {name: type(value) for name, value in content["counts"].items()} == names
            and isinstance(content.get("position"), list)
            and [type(value) for value in content["position"]] == [str, int]
            and content["position"][1] >= 0
        )
        if not good:
            raise DataError(f"{path}: damaged: --force starts again")
        differences = [
            f"{name}: {short_repr(content['settings'].get(name))} before, {short_repr(value)} now"
            for name, value in self.settings.items()
            if content["settings"].get(name) != value
        ]
        if list(content["files"]) != list(self.files):
            differences.append("other sources, or in another order")
        else:
            changed = [file for file, stamp in self.files.items() if content["files"][file] != list(stamp)]
            differences += [f"{file} has changed" for file in changed[:1]]
        if differences:
            raise ConfigError(
                f"{self.directory}: was begun with other settings or sources: {'; '.join(differences)}. The same again "
                "continue it; --force starts again"
            )
        self.shards = list(read_entries(content["shards"], path)) if content.get("shards") else []
        for shard in self.shards:
            open_shard(self.directory, shard, self.tokenizer.name, PROGRESS)
        if content["position"][0] not in self.files:
            raise DataError(f"{path}: damaged: --force starts again")
        self.position = tuple(content["position"])
        self.counts = Counts(**content["counts"])


def _stamp(path: Path) -> tuple[int, int]:
    """What changes if a file does: its size, and the time of its last modification."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Creates a directory, and locks it until the block ends, or the process.

    Raises:
        CheckpointError: if another process holds it, or it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(directory, f"cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(directory, "another process writes into this directory") from None
    except OSError as error:
        if not unsupported(error, directory, "lock directories, so a second process here would go unnoticed"):
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)
