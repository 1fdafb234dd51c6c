"""Which backend's KV cache holds how much of a prompt: a bounded mirror, kept from what was sent where.

A prompt is cut at fixed places into blocks that grow with depth, from 128 characters to 4 KiB, so that a short prompt
is matched finely and a long one takes few steps. The key of a block is the hash of its text and of the key before it, so
equal keys mean equal prefixes. One dict maps a key to a bit mask of backends; one LRU per backend, bounded in
the unit that the blocks are measured in (characters), forgets what its cache must have forgotten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

_SIZES: Final = [128] * 4 + [512] * 7 + [2048] * 6 + [4096] * 1020
_ENDS: Final = tuple(accumulate(_SIZES))  # of each block, in characters; what lies past 4 MiB is not matched
_SLICES: Final = [slice(begin, end) for begin, end in pairwise((0, *_ENDS))]


class Blocks(NamedTuple):
    """A prompt as the index sees it: the chained keys of its whole blocks, where each block ends, and the prompt's size.

    ``ends`` (at least as long as ``keys``) and ``total`` share a unit: characters if `blocks_of` made them.
    """

    keys: list[int]
    ends: Sequence[int]
    total: int


NO_BLOCKS: Final = Blocks([], (), 0)


def blocks_of(seed: str, text: str) -> Blocks:
    """The blocks of a canonical prompt: system, tools and messages in order. Prompts of different ``seed`` (model, or
    model and tenant) share nothing. The keys hold within this process only: Python's own hash is keyed."""
    key = hash(seed)
    keys = []
    for piece in _SLICES[: bisect_right(_ENDS, len(text))]:
        key = hash((key, text[piece]))
        keys.append(key)
    return Blocks(keys, _ENDS, len(text))


class PrefixIndex:
    """Backends are small integers. A backend that holds a block holds all blocks before it: an insert makes the head of a
    chain its newest part, so that its tail is forgotten first, as engines do."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._lru: list[OrderedDict[int, int]] = []
        self.capacity: list[float] = []
        self.size: list[int] = []
        self.version = 0
        """It changes whenever `match` may have another answer."""

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, capacity: float) -> None:
        """One more backend, whose cache holds this much, in the unit of the blocks."""
        self._lru.append(OrderedDict())
        self.capacity.append(capacity)
        self.size.append(0)

    def match(self, blocks: Blocks) -> list[tuple[int, int]]:
        """(backend, number of the prompt's first blocks that it holds), for those that hold any."""
        found: list[tuple[int, int]] = []
        alive = depth = 0
        for mask in map(self._holders.get, blocks.keys):
            if mask != alive:
                if not depth:
                    alive = mask or 0
                gone = alive & ~(mask or 0)
                if gone:
                    found += [(i, depth) for i in _bits(gone)]
                alive &= mask or 0
                if not alive:
                    return found
            depth += 1
        return found + [(i, depth) for i in _bits(alive)]

    def insert(self, backend: int, blocks: Blocks, known: int) -> None:
        """The backend now holds these blocks, of which it held the first ``known`` (as `match` said) before."""
        lru, keys, ends = self._lru[backend], blocks.keys, blocks.ends
        bit = 1 << backend
        holders = self._holders
        depth = len(keys)
        self.version += depth > known
        for k in range(depth - 1, known - 1, -1):
            key = keys[k]
            if key not in lru:
                span = lru[key] = ends[k] - (ends[k - 1] if k else 0)
                self.size[backend] += span
                holders[key] = holders.get(key, 0) | bit
        for key in reversed(keys[:known]):
            lru.move_to_end(key)
        if self.size[backend] > self.capacity[backend]:
            self._shrink(backend)

    def forget(self, backend: int, blocks: Blocks, known: int) -> None:
        """The backend does not hold more than the first ``known`` of these blocks after all."""
        self.version += 1
        lru = self._lru[backend]
        for key in blocks.keys[known:]:
            if key in lru:
                self.size[backend] -= lru.pop(key)
                self._unmark(key, 1 << backend)

    def clear(self, backend: int) -> None:
        """The backend's cache is empty."""
        self.version += 1
        for key in self._lru[backend]:
            self._unmark(key, 1 << backend)
        self._lru[backend].clear()
        self.size[backend] = 0

    def resize(self, backend: int, capacity: float) -> None:
        """The backend's cache holds this much."""
        self.version += 1
        self.capacity[backend] = capacity
        self._shrink(backend)

    def _shrink(self, backend: int) -> None:
        lru, capacity, bit = self._lru[backend], self.capacity[backend], 1 << backend
        size, holders = self.size[backend], self._holders
        while size > capacity and lru:
            key, span = lru.popitem(last=False)
            size -= span
            if holders[key] == bit:
                del holders[key]
            else:
                holders[key] &= ~bit
        self.size[backend] = size

    def _unmark(self, key: int, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
