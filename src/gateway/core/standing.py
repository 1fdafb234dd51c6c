"""How a key stands, as the headers ``x-ratelimit-*`` say it (OpenAI's six; a limit that a key does not have has none)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from .principal import Limits
from .ratelimit import PARTS, Counts

_REQUESTS: Final = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
_TOKENS: Final = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")


@lru_cache(maxsize=4096)
def go_duration(milliseconds: int) -> bytes:
    """A duration as Go's ``time.Duration.String`` writes it: ``0s``, ``12ms``, ``1.5s``, ``6m0s``, ``1h0m0s``."""
    if milliseconds <= 0:
        return b"0s"
    if milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = (b"%d.%03d" % divmod(rest, 1000)).rstrip(b"0").rstrip(b".") if rest % 1000 else b"%d" % (rest // 1000)
    if not minutes:
        return seconds + b"s"
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%bs" % (hours, minutes, seconds) if hours else b"%dm%bs" % (minutes, seconds)


def headers(limits: Limits, counts: Counts) -> list[tuple[bytes, bytes]]:
    """(lower-case name, value). ``remaining`` is whole ones; ``reset`` is when all of them are there again."""
    found: list[tuple[bytes, bytes]] = []
    if limits.requests is not None:
        found += _three(_REQUESTS, limits.requests, counts.requests)
    if limits.tokens is not None:
        found += _three(_TOKENS, limits.tokens, counts.tokens)
    return found


def _three(names: tuple[bytes, bytes, bytes], limit: int, used: int) -> tuple[tuple[bytes, bytes], ...]:
    left = limit - -(-used // PARTS)
    full = go_duration(-(-used // limit) if limit else 0)
    return (names[0], b"%d" % limit), (names[1], b"%d" % left if left > 0 else b"0"), (names[2], full)
