"""One request to a backend and its answer, with every timer and failure that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from OpenSSL.SSL import Error as TLSError
from treq.client import HTTPClient
from twisted.internet import error, protocol
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.python.failure import Failure
from twisted.web._newclient import ParseError, RequestGenerationFailed, RequestTransmissionFailed
from twisted.web.client import ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse
from zope.interface import implementer

from .core import wire
from .core.errors import BackendFailed
from .net import pieces
from .net.deadlines import Deadlines
from .net.headers import last_of, pairs_of

END_SECONDS: Final = 1.0
"""How long a backend may take to end the body after an answer's last event."""

Receive = Callable[[bytes], None]


class Timeouts(NamedTuple):
    """Seconds; ``total`` 0 is no limit. The connect timeout is the agent's."""

    first_byte: float
    idle: float
    total: float


_TIMED_OUT: Final = {
    "first_byte_timeout": "The backend sent nothing of its answer for {:g} s.",
    "idle_timeout": "The backend fell silent for {:g} s in the middle of its answer.",
    "total_timeout": "The backend's answer took longer than {:g} s.",
}


class Timers:
    """The timers of one backend's exchanges, each kind in a table of its own."""

    def __init__(self, clock: IReactorTime, timeouts: Timeouts) -> None:
        def table(code: str, seconds: float) -> Deadlines[Exchange]:
            return Deadlines(clock, seconds, lambda exchange: exchange.expire(code, seconds))

        self.first_byte = table("first_byte_timeout", timeouts.first_byte)
        self.idle = table("idle_timeout", timeouts.idle)
        self.end = table("idle_timeout", min(END_SECONDS, timeouts.idle))
        self.total = table("total_timeout", timeouts.total) if timeouts.total else None


@implementer(IPushProducer)
class Exchange(protocol.Protocol):
    """One request to a backend and its answer: owns its timers, its connection, and how it ended.

    `open` waits for the whole body, or of an event stream for the first byte; then the stream is paused
    until `deliver` takes it. Cancelling any of them closes the connection at once. A whole body may have
    ``limit`` bytes.
    """

    transport: Any
    status = 0
    headers: list[tuple[bytes, bytes]]
    server = b""
    framed = True
    usage_added = False
    native = False
    is_event_stream = False
    _requested: Deferred[Any] | None = None
    _waiting: Deferred[None] | None = None
    _receive: Receive | None = None
    _outcome: Failure | bool = False  # True: the body ended whole; a Failure: it did not
    _paused = False
    _silence: Deadlines[Exchange] | None = None  # the table that our timer is in
    _size = 0
    _joined = 0  # of the body's pieces, the first are of many each

    def __init__(self, client: HTTPClient, timers: Timers, limit: int) -> None:
        self._client = client
        self._timers = timers
        self._limit = limit
        self._patience = timers.idle  # how long a silence within the body may be
        self._body: list[bytes] = []

    # --- the three things to wait for

    async def open(self, method: str, url: bytes, headers: Headers, body: bytes | None) -> None:
        """Send the request; returns when the answer is whole, or a stream begun. Raises `BackendFailed`."""
        self._silence = self._timers.first_byte
        self._silence.start(self)
        if self._timers.total is not None:
            self._timers.total.start(self)
        try:
            self._requested = self._client.request(method, url, headers=headers, data=body)
            response = await self._requested
        except Exception as problem:
            self._requested = None
            # A timer of ours has cancelled it if there is an outcome already; that one counts.
            self._finish(Failure(_backend_failed(problem)))
            self._outcome.raiseException()  # type: ignore[union-attr]
        self._requested = None
        self._started(response)
        begun = self._body and self._receive is None  # then it is a stream, even if it has broken since
        if not begun and self._outcome is not True:
            await self._wait()

    def deliver(self, receive: Receive) -> Deferred[None]:
        """Push the stream to ``receive`` as it comes; what it raises ends the exchange and fails the Deferred."""
        self._receive = receive
        early, self._body = self._body, []
        for data in early:
            try:
                receive(data)
            except Exception:
                self._outcome = False  # a body that ended whole is of no use to a receiver that fails
                self._finish(Failure())
                break
        if not self._paused:
            self.resumeProducing()
        return self._wait()

    async def content(self) -> bytes:
        """The whole body."""
        if self._receive is None:
            await self.deliver(self._collect)
        body = self._body
        return body[0] if len(body) == 1 else b"".join(body)

    def _collect(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limit:
            message = f"The backend's answer is larger than {self._limit} bytes, the limit of this gateway."
            raise BackendFailed("backend_protocol_error", message)
        self._body.append(data)
        if len(self._body) - self._joined == pieces.MANY:
            self._joined = pieces.join_last(self._body, self._joined)

    def _wait(self) -> Deferred[None]:
        """A Deferred for the next thing to happen, whose cancellation is a CancelledError and closes the connection."""
        waiting: Deferred[None] = Deferred(self._cancelled)
        if isinstance(self._outcome, Failure):
            waiting.errback(self._outcome)
        elif self._outcome or (self._body and self._receive is None):
            waiting.callback(None)
        else:
            self._waiting = waiting
        return waiting

    def _cancelled(self, _: object) -> None:
        self._finish(Failure(CancelledError()))

    # --- the answer, as it comes

    def _started(self, response: IResponse) -> None:
        self._requested = None
        last = last_of(response.headers)
        self.status = response.code
        self.headers = wire.returnable(pairs_of(response.headers))
        self.server = last.get(b"server", b"")
        self.is_event_stream = last.get(b"content-type", b"").lower().startswith(b"text/event-stream")
        encoding = last.get(b"content-encoding", b"identity").strip().lower()
        if not 200 <= response.code <= 599 or encoding not in (b"identity", b""):
            what = f"status {response.code}" if encoding == b"identity" else "a content encoding that was not asked for"
            self._finish(Failure(BackendFailed("backend_protocol_error", f"The backend answered with {what}.")))
        elif not self.is_event_stream:
            self._receive = self._collect
            whole: bytes | None = getattr(response, "whole", None)  # all of it came with the head
            if whole is not None:
                self._take_whole(whole)
                return
        response.deliverBody(self)

    def _take_whole(self, body: bytes) -> None:
        try:
            self._collect(body)
        except BackendFailed:
            self._finish(Failure())
        else:
            self._finish(None)

    def connectionMade(self) -> None:
        if self._outcome:
            self.transport.stopProducing()  # also under TLS, where losing a connection waits for the peer

    def dataReceived(self, data: bytes) -> None:
        if self._outcome:
            return
        if self._receive is None:
            self._body.append(data)
            self._stop_silence()
            self.transport.pauseProducing()
            self._wake()
            return
        if self._silence is self._patience:
            if self._silence is not self._timers.end:  # after the last event nothing buys more time
                self._silence.start(self)
        elif not self._paused:  # of what came before a pause the rest may still be handed over
            self._wait_in(self._patience)
        try:
            self._receive(data)
        except Exception:
            self._finish(Failure())

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self.transport = None
        if isinstance(reason.value, ResponseDone):
            self._finish(None)
        elif isinstance(reason.value, PotentialDataLoss):
            self.framed = False
            self._finish(None)
        else:
            message = "The backend closed the connection in the middle of its answer."
            self._finish(Failure(BackendFailed("backend_protocol_error", message, detail=_reasons(reason))))

    # --- ends

    def expire(self, code: str, seconds: float) -> None:
        """A timer ran out."""
        self._finish(Failure(BackendFailed(code, _TIMED_OUT[code].format(seconds))))

    def _finish(self, failure: Failure | None) -> None:
        """The exchange is over: with its body whole (None), or because of ``failure``; the first one counts."""
        if self._outcome:
            return
        self._outcome = failure or True
        if self._receive is not None:
            self._receive = _nowhere  # or it and this would keep each other until the next garbage collection
        self._stop_silence()
        if self._timers.total is not None:
            self._timers.total.stop(self)
        if failure is not None:
            self._close()
        self._wake()

    def _close(self) -> None:
        if self._requested is not None:
            self._requested.cancel()
        elif self.transport is not None:
            self.transport.stopProducing()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.called:
            return
        if isinstance(self._outcome, Failure):
            waiting.errback(self._outcome)
        else:
            waiting.callback(None)

    def _wait_in(self, table: Deadlines[Exchange]) -> None:
        """From here on the backend may be silent for so long."""
        if self._silence is not table:
            self._stop_silence()
            self._silence = table
        table.start(self)

    def _stop_silence(self) -> None:
        if self._silence is not None:
            self._silence.stop(self)
            self._silence = None

    # --- IPushProducer: the client's pace is the backend's

    def expect_end(self) -> None:
        """The answer is whole: a backend that does not end its body soon is not waited for, whatever else it sends."""
        if self._patience is self._timers.end:
            return
        self._patience = self._timers.end
        if self._silence is not None:
            self._wait_in(self._patience)

    def pauseProducing(self) -> None:
        self._paused = True
        self._stop_silence()  # who waits for the client is not silent
        if self.transport is not None and not self._outcome:
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        self._paused = False
        if self.transport is not None and not self._outcome:
            if self._silence is None:
                self._wait_in(self._patience)
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The client's connection is lost. Who waits here is cancelled in the same turn, so it is not woken."""
        self._waiting = None
        self._finish(Failure(CancelledError()))


def _nowhere(data: bytes) -> None:
    """Takes what nobody wants."""


def _backend_failed(found: Exception) -> Exception:  # noqa: PLR0911 - a table, in which the order counts
    """Twisted's many ways of saying that there is no answer, as one of ours."""
    if isinstance(found, BackendFailed | CancelledError):
        return found
    failure = Failure(found)
    detail = _reasons(failure)
    if isinstance(found, error.TimeoutError):
        return BackendFailed("connect_timeout", "The backend could not be connected to in time.", detail=detail)
    if isinstance(found, ResponseNeverReceived | RequestTransmissionFailed | ResponseFailed | RequestGenerationFailed):
        if any(reason.check(CancelledError) for reason in found.reasons):
            return CancelledError()
        begun = isinstance(found, ResponseFailed) and not isinstance(found, ResponseNeverReceived)
        if begun or any(reason.check(ParseError) for reason in found.reasons):
            return BackendFailed("backend_protocol_error", "The backend's answer is not valid HTTP.", detail=detail)
        return BackendFailed("backend_unreachable", "The backend closed the connection without an answer.", detail=detail)
    if isinstance(found, error.ConnectingCancelledError):
        return CancelledError()
    if isinstance(found, error.ConnectError | error.ConnectionClosed | error.DNSLookupError | TLSError | OSError):
        return BackendFailed("backend_unreachable", "The backend cannot be reached.", detail=detail)
    return found


def _reasons(failure: Failure) -> str:
    """What happened, for the log; of what the backend sent, which may quote a prompt, only that it was wrong."""
    reasons = getattr(failure.value, "reasons", None) or [failure]
    known = (error.ConnectError, error.ConnectionClosed, error.DNSLookupError, TLSError, OSError)
    told = (f": {reason.getErrorMessage()}" if reason.check(*known) else "" for reason in reasons)
    return "; ".join(reason.type.__name__ + text for reason, text in zip(reasons, told, strict=True))[:500]
