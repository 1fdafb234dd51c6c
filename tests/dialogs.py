"""A client's connection in memory: bytes in, bytes out, on a stopped clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET
from zope.interface import implementer

from gateway.net.channel import Limits, Refusal
from gateway.net.server import Server

from .corpus import MAX_BODY

LIMITS = Limits(max_body=MAX_BODY, max_connections=10, client_timeout=60.0, idle_timeout=60.0)


class Seen(NamedTuple):
    """A request as it reached its resource; names of headers are in lower case, headers sorted."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


def sorted_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Sorted by name alone: the values of one name keep their order."""
    return tuple(sorted(((name.lower(), value) for name, value in headers), key=lambda header: header[0]))


class Recorder(Resource):
    """Answers each request with what it was, at once or when it is told to."""

    isLeaf = True

    def __init__(self, *, later: bool) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.waiting: list[Request] = []
        self._later = later

    def render(self, request: Request) -> Any:
        raw = request.requestHeaders.getAllRawHeaders()
        headers = sorted_headers((name, value) for name, values in raw for value in values)
        body = request.content.read()  # type: ignore[union-attr]  # there once the request is in
        self.seen.append(Seen(request.method, request.uri, headers, body))
        self.waiting.append(request)
        if not self._later:
            self.answer()
        return NOT_DONE_YET

    def answer(self) -> None:
        """Answer the request that waits."""
        request = self.waiting.pop(0)
        told = b"%d %b %d" % (len(self.seen), request.method, len(self.seen[-1].body))
        request.setHeader(b"content-length", b"%d" % len(told))
        request.write(told)
        request.finish()


class Wire(StringTransport):
    """As a TCP connection whose other side takes everything at once."""

    def loseWriteConnection(self) -> None:
        """The other side goes on sending."""

    def unregisterProducer(self) -> None:
        if self.producer is not None:
            super().unregisterProducer()

    def resumeProducing(self) -> None:
        if not self.closed:
            super().resumeProducing()

    def pauseProducing(self) -> None:
        if not self.closed:
            super().pauseProducing()

    @property
    def closed(self) -> bool:
        return bool(self.disconnecting or self.disconnected)


@implementer(ILogObserver)
class Dialog:
    """One connection to a `Server`. Leaving the block loses it; then nothing may be left of it."""

    def __init__(self, *, later: bool = False) -> None:
        self.clock = Clock()
        self.resource = Recorder(later=later)
        self.refusals: list[Refusal] = []
        self.failures: list[LogEvent] = []
        self.seen_when_refused = 0
        server: Any = Server(self.resource, LIMITS, self.clock, self._refused)
        self.wire = Wire()
        self.protocol = server.buildProtocol(None)
        self.protocol.makeConnection(self.wire)

    def __call__(self, event: LogEvent) -> None:
        if "log_failure" in event:
            self.failures.append(event)

    def __enter__(self) -> Dialog:
        globalLogPublisher.addObserver(self)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.protocol.connectionLost(Failure(ConnectionDone()))
        finally:
            globalLogPublisher.removeObserver(self)
        assert not self.clock.getDelayedCalls(), self.clock.getDelayedCalls()
        assert not self.failures, [event["log_failure"].getTraceback() for event in self.failures]

    def _refused(self, refusal: Refusal) -> str:
        self.refusals.append(refusal)
        self.seen_when_refused = len(self.resource.seen)
        return f"refusal-{len(self.refusals)}"

    @property
    def seen(self) -> list[Seen]:
        return self.resource.seen

    def send(self, *pieces: bytes) -> Dialog:
        """What the client sends, piece by piece; who answers later does so after each."""
        for piece in pieces:
            self.wait_until_read()
            if self.wire.closed and not self.refusals:
                break  # a transport that closes reads no more
            self.protocol.dataReceived(piece)
            self.clock.advance(0)
            assert len(self.resource.waiting) <= 1, "a request was begun before the one before it was answered"
        while self.resource.waiting:
            self.answer()
        return self

    def wait_until_read(self) -> None:
        """A transport that is paused reads no more, until an answer is out."""
        while self.wire.producerState == "paused" and self.resource.waiting:
            self.answer()

    def answer(self) -> None:
        self.resource.answer()
        self.clock.advance(0)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The bytes in pieces, cut at these places, each taken modulo their number."""
    ends = sorted({place % len(data) for place in places} - {0} if data else [])
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
