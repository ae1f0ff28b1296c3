"""Reading all of a corpus once, to check its hashes and ids: before a run, or beside it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from jaxgpt.data.sources import Corpus

# Tokens that are checked before the first step in any case; it takes about a second.
AT_ONCE = 2**26


class Verification:
    """Reads every shard of a corpus once. A small corpus, or one for which that is asked, has been read when this is
    made; of a larger one, batches check the ids that they hold, and a thread reads the rest meanwhile.

    Args:
        corpus: what to read.
        vocab_size: the model's.
        at_once: whether to read all of it before anything else.
        part: (i, n): of n processes, this is number i, and reads its share of the shards.

    Raises:
        DataError: if a shard does not have the hash that it states, or holds an id outside the vocabulary.
    """

    def __init__(self, corpus: Corpus, vocab_size: int, *, at_once: bool = False, part: tuple[int, int] = (0, 1)):
        self._unread, self._vocab_size = corpus.shards[part[0] :: part[1]][::-1], vocab_size  # the last is the next
        self._error: BaseException | None = None
        self._stop = threading.Event()
        if at_once or sum(len(shard.ids_N) for shard in corpus.shards) <= AT_ONCE:
            self._read()

    @property
    def unread(self) -> int:
        """How many shards have not been read to their end."""
        return len(self._unread)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Reads what has not been read yet, in a thread, until the block ends."""
        thread = threading.Thread(target=self._read_aside, name="verification", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def check(self) -> None:
        """Raises the DataError that the thread has come upon, if any."""
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        while self._unread and self._unread[-1].verify(self._vocab_size, self._stop.is_set):
            self._unread.pop()

    def _read_aside(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self._error = error
