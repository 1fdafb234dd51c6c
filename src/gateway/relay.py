"""A backend's reply on its way to the client, at the client's pace.

A stream passes event by event as it comes, in the backend's own bytes. Only whole events are
passed on, so that a failure in mid-stream can still be said: as one error event, and no ``[DONE]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPullProducer, IPushProducer
from twisted.web.server import Request
from zope.interface import implementer

from .backend import Answer, Stream
from .core import sse
from .core.errors import BackendFailed, GatewayError
from .core.record import Record
from .core.usage import UsageMeter

WHOLE: Final = 64 * 1024
"""Answers up to this many bytes are written at once; longer ones piece by piece as the client reads."""


def connected(request: Request) -> bool:
    """The client still waits for (more of) this answer."""
    return getattr(request, "channel", None) is not None


async def relay(reply: Answer | Stream, request: Request, record: Record, now: Callable[[], float]) -> None:
    """Send the reply to the client, and finish the request.

    What fails from here on is told to the client in the stream itself and written into the record;
    only CancelledError comes out, when the client has gone.
    """
    record.replied = now()
    record.status = reply.status
    request.setResponseCode(reply.status)
    for name, value in reply.headers:
        request.responseHeaders.addRawHeader(name, value)
    if isinstance(reply, Answer):
        await _answer(reply, request, record)
    else:
        await _stream(reply, request, record, now)


async def _answer(answer: Answer, request: Request, record: Record) -> None:
    record.usage, record.finish_reason = answer.usage, answer.finish_reason
    if answer.status >= 400:
        record.failed(GatewayError("rejected_by_backend", "The backend refused the request."))
    request.setHeader(b"content-length", b"%d" % len(answer.body))
    if len(answer.body) <= WHOLE:
        request.write(answer.body)
    else:
        await _Pieces(answer.body, request).sent
    request.finish()


@implementer(IPullProducer)
class _Pieces:
    """Writes a long body piece by piece; each is asked for when the one before has left."""

    def __init__(self, body: bytes, request: Request) -> None:
        self._body = memoryview(body)
        self._request = request
        self.sent: Deferred[None] = Deferred()
        request.registerProducer(self, False)

    def resumeProducing(self) -> None:
        self._request.write(bytes(self._body[:WHOLE]))
        self._body = self._body[WHOLE:]
        if not self._body:
            self._request.unregisterProducer()
            self.sent.callback(None)

    def stopProducing(self) -> None:
        """The client has gone; who waits for ``sent`` is cancelled in the same turn."""


async def _stream(stream: Stream, request: Request, record: Record, now: Callable[[], float]) -> None:
    request.setHeader(b"cache-control", b"no-cache")
    request.setHeader(b"x-accel-buffering", b"no")
    watch = _Watch(request, now, hide_usage=stream.usage_added)
    request.registerProducer(IPushProducer(stream), True)
    failure: GatewayError | None = None
    try:
        await stream.deliver(watch.receive)
        watch.check_end(framed=stream.framed)
    except CancelledError:
        stream.stopProducing()
        if not connected(request):
            raise
        failure = GatewayError("draining", "The gateway is shutting down.", retry_after=1.0)
    except BackendFailed as problem:
        failure = problem
    finally:
        watch.note(record)
        if connected(request):
            request.unregisterProducer()
    if failure is not None:
        record.failed(failure)
        request.write(sse.encode(failure.body()))
    request.finish()


class _Watch:
    """Passes events on, and reads in passing what the record wants to know."""

    def __init__(self, request: Request, now: Callable[[], float], *, hide_usage: bool) -> None:
        self._request = request
        self._now = now
        self._hide_usage = hide_usage
        self._decoder = sse.Decoder()
        self._meter = UsageMeter()

    def receive(self, data: bytes) -> None:
        """Write the events that these bytes complete. Raises `BackendFailed` if one grows beyond all bounds."""
        try:
            events = self._decoder.feed(data)
        except sse.TooLong as problem:
            message = "The backend sent an event that is too large."
            raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
        now = self._now()
        passed = []
        for event in events:
            is_usage = self._meter.see(event, now)
            if not (is_usage and self._hide_usage):
                passed.append(event.raw)
        if passed:
            self._request.write(b"".join(passed))

    def check_end(self, *, framed: bool) -> None:
        """Raises `BackendFailed` if the stream stopped before its answer was whole."""
        if self._meter.done or (framed and self._meter.whole and not self._decoder.pending.strip()):
            return
        raise BackendFailed("backend_protocol_error", "The backend's stream ended before its answer was complete.")

    def note(self, record: Record) -> None:
        """What was seen, into the record."""
        meter = self._meter
        record.usage, record.finish_reason = meter.usage, meter.finish_reason
        record.first_token, record.last_token = meter.first_token, meter.last_token
        if meter.failed:
            record.failed(BackendFailed("backend_error", "The backend sent an error in its stream."))
