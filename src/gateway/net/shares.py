"""How many connections each of several workers has, in memory that they share: who has more than another leaves it the next.

All of them are woken by a new connection, and the one that is quickest, often the same each time, would get them all.
"""

from __future__ import annotations

import mmap
import os
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
    os.write(file, _GONE.to_bytes(_BYTES, "little") * workers)
    return file


class Shares:
    """``file`` is a `shared_file`; ``own`` is which of the ``workers`` this one is. Gone until it tells of its connections."""

    def __init__(self, file: int, workers: int, own: int) -> None:
        self._counts = memoryview(mmap.mmap(file, _BYTES * workers)).cast("q")
        self._own = own

    def tell(self, connections: int) -> None:
        """So many we have."""
        self._counts[self._own] = connections

    def leave(self) -> None:
        """We take none any more."""
        self._counts[self._own] = _GONE

    def is_ahead(self) -> bool:
        """Another one should have the next."""
        counts = self._counts.tolist()
        own = counts.pop(self._own)
        least = min(counts, default=_GONE)
        return own > least + MORE + least // 8
