"""Nothing may fail in silence here either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from twisted.logger import globalLogPublisher

from ..conftest import Logged


@contextmanager
def no_failures() -> Iterator[None]:
    """No failure is logged within the block."""
    seen = Logged()
    globalLogPublisher.addObserver(seen)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(seen)
    assert not seen.failures, [event["log_failure"].getTraceback() for event in seen.failures]
