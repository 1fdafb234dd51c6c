"""Fuzzes the backend's side: ``python -m tests.fuzz.fuzz_backend``, or ``make fuzz``.

A backend that says anything at all gives one answer or one failure, leaves no timer behind, and no failure in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import atheris
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from .harness import pieces, run
from .logged import no_failures


def connection() -> tuple[Any, Callable[[], Any]]:
    """A connection that is not yet connected, and how to ask it something: the call returns a Deferred of an IResponse."""
    with atheris.instrument_imports(include=["gateway"]):
        from gateway.net.connection import Connection
        from gateway.net.response import Origin, Pending
    made: Any = Connection(Origin(None), lambda _: None, lambda _: None)  # type: ignore[arg-type]  # it never connects

    def ask() -> Any:
        pending = Pending(b"GET", b"http://g/", None, b"GET / HTTP/1.1\r\nhost: g\r\n\r\n", None, None)
        made.send(pending)
        return pending.response

    return made, ask


class Body(Protocol):
    """Counts how often the body ended."""

    def __init__(self) -> None:
        self.ended = 0

    def connectionLost(self, reason: object = None) -> None:
        self.ended += 1


class Wire(StringTransport):
    """Forgives what a TCP transport forgives."""

    def loseWriteConnection(self) -> None:
        pass

    def resumeProducing(self) -> None:
        if not (self.disconnecting or self.disconnected):
            super().resumeProducing()

    def pauseProducing(self) -> None:
        if not (self.disconnecting or self.disconnected):
            super().pauseProducing()


def one(data: bytes) -> None:
    with no_failures():
        talk(data)


def talk(data: bytes) -> None:
    """Ask, answer with the data in pieces, close."""
    clock, wire, body = Clock(), Wire(), Body()
    protocol, ask = connection()
    protocol.makeConnection(wire)
    outcomes: list[Any] = []
    ask().addCallback(_take, body).addBoth(outcomes.append)
    for piece in pieces(data):
        if wire.disconnecting or wire.disconnected:
            break
        protocol.dataReceived(piece)
    protocol.connectionLost(Failure(ConnectionDone()))
    assert len(outcomes) == 1
    assert body.ended == (0 if isinstance(outcomes[0], Failure) else 1)
    assert not clock.getDelayedCalls()


def _take(response: Any, body: Body) -> Any:
    assert 100 <= response.code <= 999
    response.deliverBody(body)
    return response


def seeds() -> list[bytes]:
    """What the scripted backends of the conformance tests say."""
    from ..integration.test_conformance import SAYS

    return [first + row.data for row in SAYS.values() if len(row.data) < 4096 for first in (b"\xff", b"\x05")]


if __name__ == "__main__":
    run(one, seeds())
