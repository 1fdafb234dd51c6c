"""The load that a backend reports of itself; others may use it besides us."""

from __future__ import annotations

from typing import Final, NamedTuple

FRESH_INTERVALS: Final = 3
"""A report counts for so many probe intervals; what is older says nothing."""


class Load(NamedTuple):
    """``running`` and ``waiting`` are requests; ``kv_usage`` the part of its KV cache in use, 0 to 1, None if it does not
    tell; ``at`` when it was asked, in seconds of the monotonic clock."""

    running: int
    waiting: int
    kv_usage: float | None
    at: float


def fresh(load: Load | None, now: float, interval: float) -> Load | None:
    """The load, unless it is older than `FRESH_INTERVALS` probe intervals (seconds)."""
    return load if load is not None and now - load.at <= FRESH_INTERVALS * interval else None
