"""In which order backends suit a key, the same in every process: rendezvous hashing (Thaler and Ravishankar 1998).

Each backend's number for a key comes from the two alone, so that those who know the same backends agree without a word,
and a backend that comes or goes moves only the keys that it gets or had.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

KEYS: Final = 4096
"""Keys whose order is remembered."""

_MASK: Final = (1 << 64) - 1


def mark(text: str) -> int:
    """64 bits of a text, which no process has a key of its own for."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def distance(key: int, backend: int) -> int:
    """How far a backend is from a key, both as marks: the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = key ^ backend
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Rendezvous:
    """Backends by place."""

    def __init__(self) -> None:
        self._marks: list[int] = []
        self._orders: dict[str, tuple[int, ...]] = {}

    def put(self, i: int, name: str) -> None:
        """Place ``i``, which is new or free, is this backend's now."""
        self._marks[i : i + 1] = [mark(name)]
        self._orders.clear()

    def order(self, key: str) -> tuple[int, ...]:
        """All places, the one that suits the key best first."""
        found = self._orders.get(key)
        if found is None:
            if len(self._orders) >= KEYS:
                self._orders.clear()
            wanted = mark(key)
            far = [distance(wanted, one) for one in self._marks]
            found = self._orders[key] = tuple(sorted(range(len(far)), key=far.__getitem__))
        return found
