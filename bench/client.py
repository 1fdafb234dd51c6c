"""The connections of the load, and the tally they keep."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from bench.wire import Reader, status_of

STAMP = re.compile(rb'"ts": ?(\d+),')
LONGEST_STAMP = 32
"""A stamp that is cut in two by the network is at most so long."""


@dataclass
class Tally:
    """What happened since it was last taken."""

    units: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """Seconds."""

    def take(self) -> Tally:
        """What is counted so far; the count begins anew."""
        taken = Tally(self.units, self.errors, self.latencies)
        self.units, self.errors, self.latencies = 0, Counter(), []
        return taken


class Connection(asyncio.Protocol):
    """Sends the same request as often as it is told to, and tells `on_idle` when it can be told again."""

    def __init__(self, request: bytes, tally: Tally, on_idle: Callable[[Connection], None]) -> None:
        self._request = request
        self.on_idle = on_idle
        self._reader = Reader(self.message)
        self._since = 0.0
        self.tally = tally
        self.busy = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected to the proxy."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop has classes of its own
        self.on_idle(self)

    def ask(self) -> None:
        """Send the request."""
        self.busy = True
        self._since = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """A part of the answer."""
        try:
            self._reader.feed(data)
        except ValueError:
            self.fail("not HTTP")

    def message(self, head: bytes) -> None:
        """A whole answer."""
        status = status_of(head)
        if status == 200:
            self.good()
        else:
            self.tally.errors[f"status {status}"] += 1
        self.busy = False
        if b"\r\nconnection: close" in head.lower():
            self.transport.close()
        else:
            self.on_idle(self)

    def good(self) -> None:
        """Count an answer."""
        self.tally.units += 1
        self.tally.latencies.append(time.monotonic() - self._since)

    def fail(self, why: str) -> None:
        """Count an answer that is none, and give up the connection."""
        self.tally.errors[why] += 1
        self.busy = False
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The proxy closed the connection, or we did."""
        if self.busy:
            self.tally.errors["broken off"] += 1
            self.busy = False
        if not self.closed.done():
            self.closed.set_result(None)


class Stream(Connection):
    """The same for streams: counts events, and how old each one is."""

    def __init__(self, request: bytes, tally: Tally, on_idle: Callable[[Connection], None]) -> None:
        super().__init__(request, tally, on_idle)
        self._tail = b""
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Some events."""
        now = time.monotonic_ns()
        text = self._tail + data
        seen = 0
        for stamp in STAMP.finditer(text):
            self.tally.units += 1
            self.tally.latencies.append((now - int(stamp[1])) / 1e9)
            seen = stamp.end()
        self._tail = text[max(seen, len(text) - LONGEST_STAMP) :]
        if seen and not self.first.done():
            self.first.set_result(None)
        super().data_received(data)

    def good(self) -> None:
        """A stream has ended: did it end well?"""
        if b"[DONE]" not in self._tail:
            self.tally.errors["cut short"] += 1
        self._tail = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody need wait for the first event any longer."""
        super().connection_lost(exc)
        if not self.first.done():
            self.first.cancel()
