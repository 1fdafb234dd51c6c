"""How many connections each of several workers has, in memory that they share: who has more than another leaves it the next.

All of them are woken by a new connection, and the one that is quickest, often the same each time, would get them all.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Final

MORE: Final = 1
"""Connections, and an eighth of the other's, that a worker may have more than another and still take the next."""

LEAVE_SECONDS: Final = 0.002
"""What another worker gets to take a connection that is left to it: it may be busy, or hang."""

_GONE: Final = (1 << 63) - 1
_BYTES: Final = 8


def shared_file(workers: int) -> int:
    """A file in memory, in which nobody is there yet. Raises OSError."""
    file = os.memfd_create("inference-gateway-shares")
    for worker in range(workers):
        is_gone(file, worker)
    return file


def is_gone(file: int, worker: int) -> None:
    """Its process has ended: it takes no connections any more."""
    os.pwrite(file, _GONE.to_bytes(_BYTES, sys.byteorder), worker * _BYTES)


class Shares:
    """``file`` is a `shared_file`, and need not stay open; ``own`` is which of the ``workers`` this one is. It counts as gone
    until it tells of its connections."""

    def __init__(self, file: int, workers: int, own: int) -> None:
        self._counts = memoryview(mmap.mmap(file, _BYTES * workers)).cast("q")
        self._own = own
        self._left = False

    def tell(self, connections: int) -> None:
        """So many we have."""
        if not self._left:
            self._counts[self._own] = connections

    def leave(self) -> None:
        """We want none any more, whatever is told from now on: as long as another one is there, all are for that."""
        self._left = True
        self._counts[self._own] = _GONE

    def is_ahead(self) -> bool:
        """Another one should have the next."""
        own, least = self._counts[self._own], self._least()
        return own > least + MORE + least // 8

    def leaves_all(self) -> bool:
        """Another one should have the next, however long that takes."""
        return self._left and self._least() < _GONE

    def _least(self) -> int:
        """Connections of the one of the others that has the fewest."""
        counts = self._counts.tolist()
        del counts[self._own]
        return min(counts, default=_GONE)
