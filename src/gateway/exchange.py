"""One request to a backend and its answer, with every timer and failure that belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from OpenSSL.SSL import Error as TLSError
from treq.client import HTTPClient
from twisted.internet import error, protocol
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.python.failure import Failure
from twisted.web._newclient import ParseError, RequestGenerationFailed, RequestTransmissionFailed
from twisted.web.client import ResponseDone, ResponseFailed, ResponseNeverReceived
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse
from zope.interface import implementer

from .core import wire
from .core.errors import BackendFailed

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


@implementer(IPushProducer)
class Exchange(protocol.Protocol):
    """One request to a backend and its answer: owns its timers, its connection, and how it ended.

    `open` waits for the first byte of the body, then the body is paused until `deliver` or `content`
    takes it. Cancelling any of them closes the connection at once.
    """

    transport: Any
    status = 0
    headers: list[tuple[bytes, bytes]]
    server = b""
    framed = True
    usage_added = False
    is_event_stream = False

    def __init__(self, client: HTTPClient, clock: IReactorTime, timeouts: Timeouts) -> None:
        self._client = client
        self._clock = clock
        self._timeouts = timeouts
        self._requested: Deferred[Any] | None = None
        self._waiting: Deferred[None] | None = None
        self._receive: Receive | None = None
        self._early: list[bytes] = []
        self._outcome: Failure | bool = False  # True: the body ended whole; a Failure: it did not
        self._paused = False
        self._silence: IDelayedCall | None = None
        self._total: IDelayedCall | None = None

    # --- the three things to wait for

    def open(self, method: str, url: bytes, headers: Headers, body: bytes | None) -> Deferred[None]:
        """Send the request; fires at the first byte of the answer's body, or at its end if it has none."""
        times = self._timeouts
        self._silence = self._clock.callLater(times.first_byte, self._expire, "first_byte_timeout", times.first_byte)
        if times.total:
            self._total = self._clock.callLater(times.total, self._expire, "total_timeout", times.total)
        requested: Deferred[Any] = self._client.request(method, url, headers=headers, data=body)
        self._requested = requested
        requested.addCallbacks(self._started, lambda failure: self._finish(Failure(_backend_failed(failure))))
        return self._wait()

    def deliver(self, receive: Receive) -> Deferred[None]:
        """Push the body to ``receive`` as it comes; what it raises ends the exchange and fails the Deferred."""
        self._receive = receive
        early, self._early = self._early, []
        for data in early:
            self._take(data)
        if not self._paused:
            self.resumeProducing()
        return self._wait()

    async def content(self, limit: int) -> bytes:
        """The whole body, of at most ``limit`` bytes."""
        chunks: list[bytes] = []
        left = limit

        def receive(data: bytes) -> None:
            nonlocal left
            left -= len(data)
            if left < 0:
                message = f"The backend's answer is larger than {limit} bytes, the limit of this gateway."
                raise BackendFailed("backend_protocol_error", message)
            chunks.append(data)

        await self.deliver(receive)
        return b"".join(chunks)

    def _wait(self) -> Deferred[None]:
        """A Deferred for the next thing to happen, whose cancellation is a CancelledError and closes the connection."""
        waiting: Deferred[None] = Deferred(lambda _: self._finish(Failure(CancelledError())))
        if isinstance(self._outcome, Failure):
            waiting.errback(self._outcome)
        elif self._outcome or (self._early and not self._receive):
            waiting.callback(None)
        else:
            self._waiting = waiting
        return waiting

    # --- the answer, as it comes

    def _started(self, response: IResponse) -> None:
        self._requested = None
        raw = list(response.headers.getAllRawHeaders())
        single = {name.lower(): values[-1] for name, values in raw}
        self.status = response.code
        self.headers = wire.returnable(raw)
        self.server = single.get(b"server", b"")
        self.is_event_stream = single.get(b"content-type", b"").lower().startswith(b"text/event-stream")
        encoding = single.get(b"content-encoding", b"identity").strip().lower()
        if not 200 <= response.code <= 599 or encoding not in (b"identity", b""):
            what = f"status {response.code}" if encoding == b"identity" else "a content encoding that was not asked for"
            self._finish(Failure(BackendFailed("backend_protocol_error", f"The backend answered with {what}.")))
        response.deliverBody(self)

    def connectionMade(self) -> None:
        if self._outcome:
            self.transport.stopProducing()  # also under TLS, where losing a connection waits for the peer

    def dataReceived(self, data: bytes) -> None:
        if self._outcome:
            return
        if self._receive is None:
            self._early.append(data)
            self._stop_silence()
            self.transport.pauseProducing()
            self._wake()
            return
        if self._silence is not None:
            self._silence.reset(self._timeouts.idle)
        self._take(data)

    def _take(self, data: bytes) -> None:
        if self._receive is None or isinstance(self._outcome, Failure):
            return
        try:
            self._receive(data)
        except Exception:
            self._outcome = False  # a body that ended whole is of no use to a receiver that fails
            self._finish(Failure())

    def connectionLost(self, reason: Failure = protocol.connectionDone) -> None:
        self.transport = None
        if reason.check(ResponseDone):
            self._finish(None)
        elif reason.check(PotentialDataLoss):
            self.framed = False
            self._finish(None)
        else:
            message = "The backend closed the connection in the middle of its answer."
            self._finish(Failure(BackendFailed("backend_protocol_error", message, detail=_reasons(reason))))

    # --- ends

    def _expire(self, code: str, seconds: float) -> None:
        self._finish(Failure(BackendFailed(code, _TIMED_OUT[code].format(seconds))))

    def _finish(self, failure: Failure | None) -> None:
        """The exchange is over: with its body whole (None), or because of ``failure``; the first one counts."""
        if self._outcome:
            return
        self._outcome = failure or True
        self._stop_silence()
        if self._total is not None and self._total.active():
            self._total.cancel()
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

    def _expect_more(self) -> None:
        """From here on the backend may be silent for the idle timeout."""
        if self._silence is None:
            idle = self._timeouts.idle
            self._silence = self._clock.callLater(idle, self._expire, "idle_timeout", idle)

    def _stop_silence(self) -> None:
        if self._silence is not None and self._silence.active():
            self._silence.cancel()
        self._silence = None

    # --- IPushProducer: the client's pace is the backend's

    def expect_end(self) -> None:
        """The answer is whole: a backend that does not end its body soon is not waited for."""
        self._timeouts = self._timeouts._replace(idle=min(END_SECONDS, self._timeouts.idle))
        if self._silence is not None:
            self._silence.reset(self._timeouts.idle)

    def pauseProducing(self) -> None:
        self._paused = True
        self._stop_silence()  # who waits for the client is not silent
        if self.transport is not None and not self._outcome:
            self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        self._paused = False
        if self.transport is not None and not self._outcome:
            self._expect_more()
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The client's connection is lost. Who waits here is cancelled in the same turn, so it is not woken."""
        self._waiting = None
        self._finish(Failure(CancelledError()))


def _backend_failed(failure: Failure) -> Exception:
    """Twisted's many ways of saying that there is no answer, as one of ours."""
    found = failure.value
    detail = _reasons(failure)
    if isinstance(found, error.TimeoutError):
        return BackendFailed("connect_timeout", "The backend could not be connected to in time.", detail=detail)
    if isinstance(found, ResponseNeverReceived | RequestTransmissionFailed | ResponseFailed | RequestGenerationFailed):
        begun = isinstance(found, ResponseFailed) and not isinstance(found, ResponseNeverReceived)
        if begun or any(reason.check(ParseError) for reason in found.reasons):
            return BackendFailed("backend_protocol_error", "The backend's answer is not valid HTTP.", detail=detail)
        return BackendFailed("backend_unreachable", "The backend closed the connection without an answer.", detail=detail)
    if isinstance(found, error.ConnectError | error.ConnectionClosed | error.DNSLookupError | TLSError | OSError):
        return BackendFailed("backend_unreachable", "The backend cannot be reached.", detail=detail)
    return found if isinstance(found, Exception) else RuntimeError(detail)


def _reasons(failure: Failure) -> str:
    """What happened, for the log; of what the backend sent, which may quote a prompt, only that it was wrong."""
    reasons = getattr(failure.value, "reasons", None) or [failure]
    known = (error.ConnectError, error.ConnectionClosed, error.DNSLookupError, TLSError, OSError)
    told = (f": {reason.getErrorMessage()}" if reason.check(*known) else "" for reason in reasons)
    return "; ".join(reason.type.__name__ + text for reason, text in zip(reasons, told, strict=True))[:500]
