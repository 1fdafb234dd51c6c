"""Which backend's KV cache holds how much of a prompt: a bounded mirror, kept from what was sent where.

A prompt is cut at fixed places into blocks that grow with depth, from 256 characters to 8 KiB, so that a short prompt
is matched finely and a long one takes few steps. The key of a block is the hash of its text and of the key before it, so
equal keys mean equal prefixes. One dict maps a key to a bit mask of backends; one LRU per backend, bounded in
the unit that the blocks are measured in (characters), forgets what its cache must have forgotten.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

_SIZES: Final = [256] * 4 + [1024] * 3 + [2048] * 2 + [4096] * 6 + [8192] * 508
_ENDS: Final = tuple(accumulate(_SIZES))  # of each block, in characters; what lies past 4 MiB is not matched
_SLICES: Final = [slice(begin, end) for begin, end in pairwise((0, *_ENDS))]
_TAILS: Final = [slice(end - 128, end) for end in _ENDS]


class Blocks(NamedTuple):
    """A prompt as the index sees it: the chained keys of its whole blocks, where each block ends, the prompt's size, and what
    each block ends with, which is the same in every process.

    ``ends`` (at least as long as ``keys``) and ``total`` share a unit: characters if `blocks_of` made them.
    """

    keys: list[int]
    ends: Sequence[int]
    total: int
    tails: Sequence[str] = ()


_SPARE: Final = 0.04  # of a full cache is forgotten at once

NO_BLOCKS: Final = Blocks([], (), 0)


def blocks_of(seed: str, text: str) -> Blocks:
    """The blocks of a canonical prompt: system, tools and messages in order. Prompts of different ``seed`` (model, or
    model and tenant) share nothing. The keys hold within this process only: Python's own hash is keyed."""
    key = hash(seed)
    keys = []
    for piece in _SLICES[: bisect_right(_ENDS, len(text))]:
        key = hash((key, text[piece]))
        keys.append(key)
    return Blocks(keys, _ENDS, len(text), [text[tail] for tail in _TAILS[: len(keys)]])


class PrefixIndex:
    """Backends are small integers. A backend that holds a block holds all blocks before it: an insert makes the head of a
    chain its newest part, so that its tail is forgotten first, as engines do."""

    def __init__(self) -> None:
        self.capacity: list[float] = []
        self.size: list[int] = []
        self.version = 0
        """It changes whenever `match` may have another answer."""
        self._holders: dict[int, int] = {}
        self._spans: list[dict[int, int]] = []  # by backend: the size of each block, the one forgotten next first

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, capacity: float) -> None:
        """One more backend, whose cache holds this much, in the unit of the blocks."""
        self._spans.append({})
        self.capacity.append(capacity)
        self.size.append(0)

    def match(self, blocks: Blocks) -> list[tuple[int, int]]:
        """(backend, number of the prompt's first blocks that it holds), for those that hold any."""
        found: list[tuple[int, int]] = []
        alive, depth, gone = -1, 0, 0
        for mask in map(self._holders.get, blocks.keys):
            if mask != alive:
                held = mask or 0
                if depth:
                    gone = alive & ~held
                    held &= alive
                if gone:
                    found += [(i, depth) for i in _bits(gone)]
                alive = held
                if not alive:
                    return found
            depth += 1
        return found + [(i, depth) for i in _bits(alive)] if depth else found

    def insert(self, backend: int, blocks: Blocks, known: int) -> None:
        """The backend now holds these blocks, of which it held the first ``known`` (as `match` said) before."""
        spans, holders, bit = self._spans[backend], self._holders, 1 << backend
        keys, ends = blocks.keys, blocks.ends
        depth = len(keys)
        if depth > known:
            self.version += 1
            added = 0
            for k in range(depth - 1, known - 1, -1):
                key = keys[k]
                if key not in spans:
                    span = spans[key] = ends[k] - ends[k - 1] if k else ends[0]
                    added += span
                    holders[key] = holders[key] | bit if key in holders else bit
            self.size[backend] += added
        for k in range(known - 1, -1, -1):
            key = keys[k]
            spans[key] = spans.pop(key)
        if self.size[backend] > self.capacity[backend]:
            self._shrink(backend)

    def forget(self, backend: int, blocks: Blocks, known: int) -> None:
        """The backend does not hold more than the first ``known`` of these blocks after all."""
        spans = self._spans[backend]
        self._drop(backend, [key for key in blocks.keys[known:] if key in spans])

    def clear(self, backend: int) -> None:
        """The backend's cache is empty."""
        self._drop(backend, list(self._spans[backend]))
        self._spans[backend] = {}

    def resize(self, backend: int, capacity: float) -> None:
        """The backend's cache holds this much."""
        self.capacity[backend] = capacity
        if self.size[backend] > capacity:
            self._shrink(backend)

    def _shrink(self, backend: int) -> None:
        """Forget the oldest: some more than must be, so that it is not done for every insert."""
        excess = self.size[backend] - self.capacity[backend] * (1.0 - _SPARE)
        victims = []
        for key, span in self._spans[backend].items():
            if excess <= 0:
                break
            victims.append(key)
            excess -= span
        self._drop(backend, victims)

    def _drop(self, backend: int, keys: list[int]) -> None:
        self.version += 1
        spans, holders, bit = self._spans[backend], self._holders, 1 << backend
        self.size[backend] -= sum([spans.pop(key) for key in keys])
        for key in keys:
            if holders[key] == bit:
                del holders[key]
            else:
                holders[key] ^= bit


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
