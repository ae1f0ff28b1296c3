"""Encodes documents, in this process or in several, in order and in bounded memory."""

from __future__ import annotations

import array
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import queue
import signal
from collections import deque
from collections.abc import Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data.documents import Block, Place
from jaxgpt.data.tokens import id_type
from jaxgpt.errors import DataError
from jaxgpt.tokenizer import Tokenizer

# What a user is told whose texts are `marked`.
MARKED = "holds end-of-text as ordinary text: --allow-special makes it the token"


@dataclasses.dataclass
class Counts:
    """What was come upon.

    Attributes:
        empty: documents without a character, which are left out.
        bad: records without a text, which are left out.
        first_bad: the first of these, and what is wrong with it.
        marked: pieces of documents that hold the text of end-of-text, as ordinary text.
    """

    empty: int = 0
    bad: int = 0
    first_bad: str = ""
    marked: int = 0

    def add(self, other: Counts) -> None:
        """Adds what was come upon afterwards."""
        self.empty, self.bad, self.marked = self.empty + other.empty, self.bad + other.bad, self.marked + other.marked
        self.first_bad = self.first_bad or other.first_bad


class Encoded(NamedTuple):
    """The ids of a block.

    Attributes:
        end: where the block ends.
        ids_N: the ids.
        documents: how many documents that are not left out end in it.
        size: the bytes of its texts, in UTF-8.
        counts: what was come upon.
    """

    end: Place
    ids_N: NDArray[np.unsignedinteger]
    documents: int
    size: int
    counts: Counts


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes blocks; end-of-text follows each document that has a text and does not end in it already.

    Attributes:
        tokenizer: its tokenizer.
        separate: whether end-of-text follows.
        allow_special: as in `Tokenizer.encode`.
        skip_bad: whether to leave out records without a text instead of raising.
    """

    tokenizer: Tokenizer
    separate: bool = True
    allow_special: bool = False
    skip_bad: bool = False

    def __call__(self, block: Block) -> Encoded:
        """Raises DataError if a text cannot be encoded, with its place."""
        end_of_text = self.tokenizer.end_of_text if self.separate else None
        mark = None if self.allow_special else self._mark()
        ids, counts, documents, size = array.array("I"), Counts(), 0, 0
        for where, _, text, last, error in block.pieces(self.tokenizer.find_cut, skip_bad=self.skip_bad):
            if not text:
                counts.add(Counts(bad=1, first_bad=error) if error else Counts(empty=1))
                continue
            try:
                new = self.tokenizer.encode(text, allow_special=self.allow_special)
            except DataError as reason:
                raise DataError(f"{where}: {reason}") from None
            if last and end_of_text is not None and new[-1:] != [end_of_text]:
                new.append(end_of_text)
            ids.fromlist(new)
            documents += last
            size += len(text) if text.isascii() else len(text.encode(errors="replace"))
            counts.marked += mark is not None and mark in text
        ids_N = np.frombuffer(ids, np.uint32).astype(id_type(self.tokenizer.vocab_size))
        return Encoded(block.end, ids_N, documents, size, counts)

    def _mark(self) -> str | None:
        """The text of end-of-text."""
        added = self.tokenizer.content.added
        return next((token.content for token in added if token.id == self.tokenizer.end_of_text), None)


def encode(blocks: Iterable[Block], encoder: Encoder, workers: int = 1) -> Generator[Encoded]:
    """Encodes blocks in order.

    Args:
        blocks: read as they are needed.
        encoder: encodes them.
        workers: the number of processes; 1 for none besides this one.

    Raises:
        DataError: if a text cannot be encoded, with its place; if a process is killed.
    """
    with _Workers(encoder, workers) as pool:
        waiting: deque[concurrent.futures.Future[Encoded]] = deque()
        for block in blocks:
            waiting.append(pool.submit(block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Workers:
    """Processes that encode, each with a thread here that sends it a block and waits for the ids.

    The processes are spawned, because forking a process that runs JAX's threads may lock it up. Each ends when its pipe
    does, so none is left behind if this process is killed.
    """

    def __init__(self, encoder: Encoder, workers: int):
        self._encoder, self._count = encoder, workers
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, "encode")
        self._processes: list[Any] = []
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def __enter__(self) -> _Workers:
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count if self._count > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._encoder), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._free.put(ours)
        return self

    def submit(self, block: Block) -> concurrent.futures.Future[Encoded]:
        return self._threads.submit(self._send if self._processes else self._encoder, block)

    def _send(self, block: Block) -> Encoded:
        connection = self._free.get()
        try:
            connection.send(block)
            result = connection.recv()
        except (EOFError, OSError):
            raise DataError(
                "a process that encodes was killed, perhaps for lack of memory: fewer --workers need less"
            ) from None
        finally:
            self._free.put(connection)
        if isinstance(result, BaseException):
            raise result
        return result

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()
            process.close()


def _work(connection: Connection, encoder: Encoder) -> None:
    """The life of a process that encodes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that feeds this one
    with contextlib.suppress(EOFError, OSError):
        while True:
            block = connection.recv()
            try:
                result: Encoded | Exception = encoder(block)
            except Exception as error:
                result = error
            connection.send(result)
