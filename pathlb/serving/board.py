"""How many connections each worker has, in memory that all of them see.

Workers accept from one queue. Of several that are idle the first to wake up would take all that come in a burst, and
with kept connections that lasts; so one that is ahead of the others leaves them a moment.
"""

from __future__ import annotations

import mmap
import tempfile
from typing import IO

_BYTES = 4
_NOBODY = -1


class Board:
    """A number for each of `size` workers; in `file`, which they inherit."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._map = mmap.mmap(descriptor, size * _BYTES)
        self._counts = memoryview(self._map).cast("i")

    def put(self, slot: int, count: int) -> None:
        """The worker in this slot has so many."""
        self._counts[slot] = count

    def clear(self, slot: int) -> None:
        """There is no worker in this slot."""
        self._counts[slot] = _NOBODY

    def is_ahead(self, slot: int) -> bool:
        """Whether another worker has clearly fewer."""
        fewest = min((count for count in self._counts if count != _NOBODY), default=0)
        return self._counts[slot] > fewest + 1 + fewest // 8


class BoardFile:
    """The supervisor's: it makes the board, and clears the slots of workers that have ended."""

    def __init__(self, size: int) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # it is open for as long as there are workers
        self._file.truncate(size * _BYTES)
        self.descriptor = self._file.fileno()
        self.board = Board(self.descriptor, size)
        for slot in range(size):
            self.board.clear(slot)

    def close(self) -> None:
        self._file.close()
