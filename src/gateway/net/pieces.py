"""Bodies that are held in the pieces that they come in, however small these are."""

from __future__ import annotations

from typing import Final

MANY: Final = 1024
"""Pieces that are held before they are joined: one of a byte or two costs twenty times its length."""


def join_last(pieces: list[bytes], joined: int) -> int:
    """Put those behind the first ``joined``, which are `MANY`, into one; how many are joined by now."""
    pieces[joined:] = [b"".join(pieces[joined:])]
    return joined + 1
