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
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data.documents import PIECE, Piece
from jaxgpt.data.tokens import id_type
from jaxgpt.errors import DataError
from jaxgpt.tokenizer import Tokenizer

# Texts that are encoded at a time, if they are short. (If not, it is `PIECE` characters.)
_TEXTS = 4096
# What a user is told whose texts are `marked`.
MARKED = "holds end-of-text as ordinary text: --allow-special makes it the token"


class Encoded(NamedTuple):
    """Pieces, and their ids.

    Attributes:
        pieces: the pieces.
        ids_N: the ids of all.
        marked: how many of them hold the text of end-of-text, as ordinary text.
        size: the bytes of their texts, in UTF-8.
    """

    pieces: list[Piece]
    ids_N: NDArray[np.unsignedinteger]
    marked: int
    size: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes pieces; end-of-text follows each document that has a text and does not end in it already.

    Attributes:
        tokenizer: its tokenizer.
        separate: whether end-of-text follows.
        allow_special: as in `Tokenizer.encode`.
    """

    tokenizer: Tokenizer
    separate: bool = True
    allow_special: bool = False

    def __call__(self, texts: list[str], lasts: list[bool]) -> Any:
        """All of `Encoded` but the pieces; of a text that cannot be encoded, its number and the reason."""
        end_of_text = self.tokenizer.end_of_text if self.separate else None
        mark = None if self.allow_special else self._mark()
        ids: list[int] = []
        for i, (text, last) in enumerate(zip(texts, lasts, strict=True)):
            try:
                new = self.tokenizer.encode(text, allow_special=self.allow_special)
            except DataError as error:
                return i, str(error)
            ids += new
            if last and text and end_of_text is not None and new[-1:] != [end_of_text]:
                ids.append(end_of_text)
        marked = 0 if mark is None else sum(mark in text for text in texts)
        size = sum(len(text) if text.isascii() else len(text.encode(errors="replace")) for text in texts)
        ids_N = np.frombuffer(array.array("I", ids), np.uint32)  # faster than np.array(ids)
        return ids_N.astype(id_type(self.tokenizer.vocab_size)), marked, size

    def _mark(self) -> str | None:
        """The text of end-of-text."""
        added = self.tokenizer.content.added
        return next((token.content for token in added if token.id == self.tokenizer.end_of_text), None)


def encode(pieces: Iterable[Piece], encoder: Encoder, workers: int = 1) -> Generator[Encoded]:
    """Encodes pieces in order, some at a time; which ones together depends on nothing but the pieces.

    Args:
        pieces: read as they are needed.
        encoder: encodes them.
        workers: the number of processes; 1 for none besides this one.

    Raises:
        DataError: if a text cannot be encoded, with its place; if a process is killed.
    """
    with _Workers(encoder, workers) as pool:
        waiting: deque[tuple[list[Piece], concurrent.futures.Future]] = deque()
        for batch in _batches(pieces):
            waiting.append((batch, pool.submit([piece.text for piece in batch], [piece.last for piece in batch])))
            if len(waiting) > 2 * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _result(batch: list[Piece], future: concurrent.futures.Future) -> Encoded:
    result = future.result()
    if len(result) == 2:
        number, reason = result
        raise DataError(f"{batch[number].where}: {reason}")
    return Encoded(batch, *result)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE or len(batch) >= _TEXTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Workers:
    """Processes that encode, each with a thread here that sends it a batch and waits for the ids.

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

    def submit(self, texts: list[str], lasts: list[bool]) -> concurrent.futures.Future:
        return self._threads.submit(self._send if self._processes else self._encoder, texts, lasts)

    def _send(self, texts: list[str], lasts: list[bool]) -> Any:
        connection = self._free.get()
        try:
            connection.send((texts, lasts))
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
            texts, lasts = connection.recv()
            try:
                result = encoder(texts, lasts)
            except Exception as error:
                result = error
            connection.send(result)
