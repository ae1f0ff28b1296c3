"""Encodes documents, in this process or in several, in order and in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.data.documents import Block, Place
from jaxgpt.data.tokens import id_type
from jaxgpt.errors import DataError
from jaxgpt.tokenizer import Tokenizer

# Blocks that a process has at a time: one to encode, and one to go on with.
_QUEUED = 2
# Blocks per process between the first whose ids are awaited and the last that was sent.
_AHEAD = 4
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
        dtype = id_type(self.tokenizer.vocab_size)
        end_of_text = self.tokenizer.end_of_text if self.separate else None
        end = np.array([] if end_of_text is None else [end_of_text], dtype)
        mark = None if self.allow_special else self._mark()
        rows, counts, documents, size = [end[:0]], Counts(), 0, 0
        # All are parsed before the first is encoded: in turn, each would push the other's tables out of the cache.
        pieces = list(block.pieces(self.tokenizer.find_cut, skip_bad=self.skip_bad))
        for where, _, text, last, error in pieces:
            if not text:
                counts.add(Counts(bad=1, first_bad=error) if error else Counts(empty=1))
                continue
            try:
                ids_T = self.tokenizer.encode_array(text, allow_special=self.allow_special)
            except DataError as reason:
                raise DataError(f"{where}: {reason}") from None
            rows.append(ids_T)
            if last and not (len(ids_T) and ids_T[-1] == end_of_text):
                rows.append(end)
            documents += last
            size += len(text) if text.isascii() else len(text.encode(errors="replace"))
            counts.marked += mark is not None and mark in text
        ids_N = np.concatenate(rows, dtype=dtype, casting="unsafe")
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
    if workers == 1:
        yield from map(encoder, blocks)
        return
    with _workers(encoder, workers) as connections:
        for result in _exchange(iter(blocks), connections):
            if isinstance(result, Exception):
                raise result
            yield result


def _exchange(blocks: Iterator[Block], connections: Sequence[Connection]) -> Iterator[Encoded | Exception]:
    """Sends each block to the process that is the first to have room for it, and yields what becomes of it, in order.

    Results that arrive before that of an earlier block wait here. There are at most `_AHEAD` per process of these and
    of the blocks that are sent, so that one long block does not fill the memory with what comes after it.
    """
    sent: dict[Connection, deque[int]] = {connection: deque() for connection in connections}
    results: dict[int, Encoded | Exception] = {}
    count = done = 0
    while True:
        while count - done < _AHEAD * len(connections):
            connection = min(connections, key=lambda connection: len(sent[connection]))
            if len(sent[connection]) == _QUEUED or (block := next(blocks, None)) is None:
                break
            with _noticing_death():
                connection.send(block)
            sent[connection].append(count)
            count += 1
        if done == count:
            return
        ready = wait(connections, timeout=0 if done in results else None)
        for connection in connections:
            if connection in ready:
                with _noticing_death():
                    result = connection.recv()
                results[sent[connection].popleft()] = result
        if done in results:
            yield results.pop(done)
            done += 1


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    """Raises what happens to a pipe whose other end is gone as a DataError."""
    try:
        yield
    except (EOFError, OSError):
        raise DataError(
            "a process that encodes was killed, perhaps for lack of memory: fewer --workers need less"
        ) from None


@contextlib.contextmanager
def _workers(encoder: Encoder, count: int) -> Iterator[list[Connection]]:
    """Processes that encode, each at the other end of a pipe.

    The processes are spawned, because forking a process that runs JAX's threads may lock it up. Each ends when its pipe
    does, so none is left behind if this process is killed.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            connections.append(ours)
            process = context.Process(target=_work, args=(theirs, encoder), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
            process.close()
        for connection in connections:
            connection.close()


def _work(connection: Connection, encoder: Encoder) -> None:
    """The life of a process that encodes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that feeds this one
    blocks: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, blocks), daemon=True).start()
    with contextlib.suppress(OSError):
        while (block := blocks.get()) is not None:
            try:
                result: Encoded | Exception = encoder(block)
            except Exception as error:
                result = error
            connection.send(result)


def _receive(connection: Connection, blocks: queue.SimpleQueue[Block | None]) -> None:
    """Takes in blocks while another is encoded or its ids are sent: otherwise both ends of the pipe might wait for the
    other to read."""
    try:
        with contextlib.suppress(EOFError, OSError):
            while True:
                blocks.put(connection.recv())
    finally:  # whatever it was: a process that gets no more blocks ends
        blocks.put(None)
