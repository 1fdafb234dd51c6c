"""What the echo says where there is no model: as plain as can be, always the same, and still of some use to try things with."""

from __future__ import annotations

import math
import re
from hashlib import blake2b
from typing import Final

DIMENSIONS: Final = 64
_PIECE: Final = re.compile(r"\s*\S+|\s+$")
_WORD: Final = re.compile(r"\w+")


def pieces(text: str) -> list[str]:
    """The text in the pieces that a stream brings it in: words, with the white space before them."""
    return _PIECE.findall(text)


def count(text: str) -> int:
    """Its tokens: words with white space between."""
    return len(text.split())


def vector(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """A unit vector: each word adds 1 or takes 1 away in one dimension, both by its hash (K. Weinberger et al., "Feature
    Hashing for Large Scale Multitask Learning", ICML 2009). Texts that share words are near each other."""
    found = [0.0] * dimensions
    for word in _WORD.findall(text.lower()):
        hashed = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        found[(hashed >> 1) % dimensions] += 1.0 if hashed & 1 else -1.0
    length = math.hypot(*found)
    return [one / length for one in found] if length else [1.0, *found[1:]]


def ranked(query: str, documents: list[str]) -> list[tuple[int, float]]:
    """(index, score) of the documents, best first: the share of the query's words that they have."""
    wanted = set(_WORD.findall(query.lower()))
    scores = [len(wanted.intersection(_WORD.findall(one.lower()))) / max(len(wanted), 1) for one in documents]
    return sorted(enumerate(scores), key=lambda one: -one[1])
