"""One connection to a backend: a request out, and the response as llhttp reads it, strictly.

What a backend sends beyond its response is never taken for the next one: such a connection is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import httptools
from twisted.internet.defer import maybeDeferred
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web._newclient import ParseError, RequestGenerationFailed
from twisted.web.client import ResponseFailed, ResponseNeverReceived
from twisted.web.http import NO_BODY_CODES, PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer

from .headers import Pairs, RawHeaders
from .response import DONE, Origin, Pending, Response

MAX_FRAMING_BYTES: Final = 64 * 1024
"""Without a byte of a body: of a head with those of interim responses, of a chunk's size, of trailers."""

JOINED: Final = 64 * 1024
"""A body of up to this many bytes is joined to its head, and leaves with it; a longer one is not copied for that."""


class _Stop(Exception):
    """Makes llhttp stop."""


class Connection(Protocol):
    """``free`` is called when a response is whole and the connection may carry another request."""

    transport: Any
    _pending: Pending | None = None
    _response: Response | None = None
    _take: Callable[[bytes], object] | None = None
    _complete = False
    _reusable = False
    _interim = False
    _framed = True
    _sent = True
    _aborted = False
    _framing_bytes = 0
    free_since = 0.0

    def __init__(self, origin: Origin, free: Callable[[Connection], object], lost: Callable[[Connection], object]) -> None:
        self.origin = origin
        self._free = free
        self._lost = lost
        self._parser = httptools.HttpResponseParser(self)
        self._pairs: Pairs = []

    # --- the request

    def send(self, pending: Pending) -> None:
        """Send a request; the connection is its own until its response is whole."""
        self._pending = pending
        pending.connection = self
        self._complete = False
        self._framing_bytes = 0
        body = pending.body
        if body is None or len(body) > JOINED:
            self.transport.write(pending.head)
            if body is not None:
                self.transport.write(body)
        else:
            self.transport.write(pending.head + body)
        if pending.producer is not None:
            self._produce(pending, pending.producer)

    def _produce(self, pending: Pending, producer: IBodyProducer) -> None:
        self._sent = False
        chunked = producer.length is UNKNOWN_LENGTH
        consumer = _Chunked(self.transport) if chunked else self.transport

        def sent(_: object) -> None:
            self._sent = True
            if chunked:
                self.transport.write(b"0\r\n\r\n")

        def failed(failure: Failure) -> None:
            pending.failed(Failure(RequestGenerationFailed([failure])))
            self.abort()

        maybeDeferred(producer.startProducing, consumer).addCallbacks(sent, failed)

    # --- the response

    def dataReceived(self, data: bytes) -> None:
        if self._pending is None and self._response is None:
            self.transport.abortConnection()  # nobody asked: what follows would be out of step
            return
        self._framing_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as problem:
            if not self._complete:
                self._broken(problem)
                return
            self._reusable = False  # more came than the response: nothing else may use this connection
        except httptools.HttpParserUpgrade as problem:
            self._broken(problem)
            return
        if self._framing_bytes > MAX_FRAMING_BYTES and not self._complete:
            self._broken(ValueError("headers, trailers or a chunk size too large"))
        elif self._response is not None and (self._complete or self._pending is not None):
            self._respond(self._response)

    def _respond(self, response: Response) -> None:
        pending, self._pending = self._pending, None
        if self._complete:
            self._response = self._take = None
            if self._reusable and self._sent:
                self._free(self)
            else:
                self.transport.loseConnection()
            response.ended(DONE)
        if pending is not None:
            pending.connection = pending.body = None  # what has an answer is not sent once more
            pending.response.callback(response)
            if self._take is None and self._response is response:
                self.transport.pauseProducing()  # until somebody takes the body

    def body_taken(self, take: Callable[[bytes], object]) -> None:
        """From here on the body goes where it is wanted."""
        self._take = take
        self.transport.resumeProducing()

    # llhttp calls these

    def on_message_begin(self) -> None:
        if self._complete:
            raise _Stop
        self._pairs = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:  # else it is a trailer
            self._pairs.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        pending = self._pending
        if pending is None:
            raise _Stop
        parser = self._parser
        code = parser.get_status_code()
        headers = RawHeaders(self._pairs)
        last = headers.last
        if code < 200:
            if code == 101 or code < 100:
                raise ValueError(f"status {code}")
            self._interim = True
            return
        if parser.get_http_version() not in ("1.1", "1.0"):
            raise ValueError("not HTTP/1.1")
        if b"transfer-encoding" in last and last[b"transfer-encoding"].lower() != b"chunked":
            raise ValueError("a transfer encoding that was not asked for")
        bodiless = pending.method == b"HEAD" or code in NO_BODY_CODES
        self._framed = b"content-length" in last or b"transfer-encoding" in last or bodiless
        length = 0 if bodiless else int(last.get(b"content-length", -1))
        self._response = Response(self, pending, code, headers, UNKNOWN_LENGTH if length < 0 else length)
        if bodiless and pending.method == b"HEAD":
            self._complete = True  # llhttp would wait for the body that the length tells of
            raise _Stop

    def on_body(self, data: bytes) -> None:
        self._framing_bytes = 0
        if self._take is not None:
            self._take(data)
        elif self._response is not None:
            self._response.early.append(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        else:
            self._complete = True
            self._reusable = self._framed and self._parser.should_keep_alive()

    # --- ends

    def abort(self) -> None:
        """Close now; what is still to come is of no use to anybody."""
        self._aborted = True
        self._take = _nowhere
        self.transport.abortConnection()

    def _broken(self, problem: Exception) -> None:
        if self._aborted:
            return
        reason = problem.__context__ or problem
        self._end(Failure(ResponseFailed([Failure(ParseError(str(reason), b""))])))
        self.abort()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._lost(self)
        pending = self._pending
        if self._response is not None and not self._framed and reason.check(ConnectionDone):
            self._end(Failure(PotentialDataLoss()))
        elif pending is not None and self._framing_bytes == 0 and self._response is None:
            self._pending = None
            if pending.again is None or not pending.again(pending):
                pending.failed(Failure(ResponseNeverReceived([reason])))
        else:
            self._end(Failure(ResponseFailed([reason])))

    def _end(self, reason: Failure) -> None:
        """There is no (more) response, for this reason."""
        pending, self._pending = self._pending, None
        response, self._response = self._response, None
        self._take = None
        if response is not None:
            response.ended(reason)
        if pending is not None:
            pending.connection = None
            if response is None:
                pending.failed(reason)
            else:
                pending.response.callback(response)


def _nowhere(data: bytes) -> None:
    """Takes what nobody wants."""


class _Chunked:
    """The consumer of a body whose length nobody knows."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.registerProducer = transport.registerProducer
        self.unregisterProducer = transport.unregisterProducer

    def write(self, data: bytes) -> None:
        if data:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
