"""A backend's reply on its way to the client, at the client's pace.

A stream passes event by event as it comes, in the backend's own bytes. Only whole events are
passed on, so that a failure in mid-stream can still be said: as one error event, and no ``[DONE]``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IPullProducer, IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.web.server import Request
from zope.interface import implementer

from .backend import Answer, Stream
from .core import sse
from .core.endpoints import endpoint_of
from .core.errors import BackendFailed, GatewayError, internal_error
from .core.message_usage import MessageMeter
from .core.record import Record
from .core.scheduler import Scheduler
from .core.tickets import Ticket
from .core.trace_context import Trace
from .core.wire import Call
from .net.request import forget_body

_log: Final = Logger("gateway.relay")

WHOLE: Final = 64 * 1024
"""Answers up to this many bytes are written at once; longer ones piece by piece as the client reads."""


def connected(request: Request) -> bool:
    """The client still waits for (more of) this answer."""
    return getattr(request, "channel", None) is not None


def cut(request: Request) -> None:
    """End the connection now: the client sees that its answer is not whole."""
    transport: Any = request.transport
    if connected(request):
        transport.abortConnection()


def relay(
    reply: Answer | Stream,
    request: Request,
    record: Record,
    now: Callable[[], float],
    call: Call | None = None,
) -> Awaitable[None]:
    """Send the reply to the client, and finish the request. A stream goes through the translation of its ``call``, if there is
    one; the call is forgotten once the client has something of the answer.

    What fails after the first byte is told to the client in the stream itself and written into the
    record; what fails before it is raised, as is CancelledError when the client has gone.
    """
    if isinstance(reply, Answer):
        return _answer(reply, request, record)
    return _stream(reply, request, record, _Watch(reply, request, record, now, call))


async def _answer(answer: Answer, request: Request, record: Record) -> None:
    record.usage, record.finish_reason = answer.usage, answer.finish_reason
    record.sent_bytes = len(answer.body)
    if record.trace is not None and record.trace.sampled:
        record.trace.answered(answer.body)
    in_stream = bool(request.startedWriting)  # comments have gone before
    if not in_stream:
        _start(answer, request, record)
    if answer.status >= 400:
        record.failed(GatewayError("rejected_by_backend", "The backend refused the request."))
    if in_stream:
        request.write(record.error_form.event(answer.body) if answer.status >= 400 else sse.encode(answer.body))
        request.finish()
        return
    request.setHeader(b"content-length", b"%d" % len(answer.body))
    if len(answer.body) <= WHOLE:
        request.write(answer.body)
    else:
        try:
            await _Pieces(answer.body, request).sent
        finally:
            if connected(request):
                request.unregisterProducer()
    request.finish()


def _start(reply: Answer | Stream, request: Request, record: Record) -> None:
    """Status and headers; they leave with the first bytes of the body."""
    record.status = reply.status
    request.setResponseCode(reply.status)
    for name, value in reply.headers:
        request.setHeader(name, value)


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
        if not self._body and not self.sent.called:
            self.sent.callback(None)

    def stopProducing(self) -> None:
        """The client has gone; who waits for ``sent`` is cancelled in the same turn."""


async def _stream(stream: Stream, request: Request, record: Record, watch: _Watch) -> None:
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
        failure = None if watch.done else problem
    except Exception:
        _log.failure("{id}: a bug in the relay", id=record.request_id)
        failure = internal_error()
    finally:
        watch.note()
        if connected(request):
            request.unregisterProducer()
    if failure is not None:
        if not request.startedWriting:
            raise failure
        record.failed(failure)
        request.write(_event_of(failure, record))
    request.finish()


def _event_of(failure: GatewayError, record: Record) -> bytes:
    return record.error_form.event(record.error_form.body(failure, record.request_id))


def unbuffered(request: Request) -> None:
    """Proxies on the way pass events on as they come."""
    request.setHeader(b"cache-control", b"no-cache")
    request.setHeader(b"x-accel-buffering", b"no")


class Heartbeat:
    """A comment every ``interval`` seconds in a stream whose first event has not come: that it waits, and for how long yet.

    The first one commits the status 200, so that what fails later is told in the stream.
    """

    ticket: Ticket | None = None
    """What waits; whoever makes a new one says so."""

    def __init__(self, request: Request, record: Record, scheduler: Scheduler, clock: IReactorTime, interval: float) -> None:
        self.begun = False
        self._request = request
        self._record = record
        self._scheduler = scheduler
        self._clock = clock
        self._interval = interval
        self._timer: IDelayedCall | None = clock.callLater(interval, self._beat)

    def _beat(self) -> None:
        self._timer = self._clock.callLater(self._interval, self._beat)
        if not self.begun:
            self.begun = True
            self._record.status = 200
            self._request.setResponseCode(200)
            self._request.setHeader(b"content-type", b"text/event-stream")
            unbuffered(self._request)
        self._request.write(self._comment())

    def _comment(self) -> bytes:
        ticket = self.ticket
        if ticket is None or not ticket.waiting:
            return b": keep-alive\n\n"
        ahead, seconds = self._scheduler.position(ticket, self._clock.seconds())
        eta = b"" if seconds is None else b", eta %ds" % max(seconds, 1)
        return b": queued %d%b\n\n" % (ahead + 1, eta)

    def fail(self, error: GatewayError) -> None:
        """Tell the client in the stream that has begun, and end it."""
        self._record.failed(error)
        self._request.write(_event_of(error, self._record))
        self._request.finish()

    def stop(self) -> None:
        """No further comments."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


MakeHeartbeat = Callable[[Request, Record, Scheduler], Heartbeat | None]


def no_heartbeat(request: Request, record: Record, scheduler: Scheduler) -> None:
    """Streams that wait do so in silence."""


class _Watch:
    """Passes events on, and reads in passing what the record wants to know."""

    def __init__(self, stream: Stream, request: Request, record: Record, now: Callable[[], float], call: Call | None) -> None:
        translation = None if call is None or stream.native else call.translation
        self._told = None if translation is None else translation.stream()
        self._stream = stream
        self._call = call
        self._request = request
        self._record = record
        self._now = now
        self._decoder = sse.Decoder()
        self._meter = MessageMeter() if stream.native else endpoint_of(record.route).meter()
        self._sent = 0
        self._trace = record.trace if record.trace is not None and record.trace.sampled else None

    @property
    def done(self) -> bool:
        """The answer is whole: its last event has passed."""
        return self._meter.done or (self._told is not None and self._told.failed)

    def receive(self, data: bytes) -> None:
        """Write the events that these bytes complete. Raises `BackendFailed` if one grows beyond all bounds."""
        try:
            events = self._decoder.feed(data)
        except sse.TooLong as problem:
            message = "The backend sent an event that is too large."
            raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
        if not events:
            return
        if self._trace is not None:
            self._look(self._trace, events)
        now = self._now()
        meter, hide, told = self._meter, self._stream.usage_added, self._told
        passed = []
        for event in events:
            added = meter.see(event, now) and hide
            if told is not None:
                passed.append(told.see(event))
            elif not added:
                passed.append(event.raw)
        if meter.done or (told is not None and told.failed):
            self._stream.expect_end()
            if told is not None:
                passed.append(told.end(meter.usage))
        if passed:
            self._pass(passed[0] if len(passed) == 1 else b"".join(passed))

    def _pass(self, data: bytes) -> None:
        if data:
            if not self._sent:
                self._begin()
            self._sent += len(data)
            self._request.write(data)

    def _look(self, trace: Trace, events: list[sse.Event]) -> None:
        """The first event that says something names the answer."""
        for event in events:
            if event.data is not None and self._trace is not None:
                trace.answered(event.data)
                self._trace = None

    def _begin(self) -> None:
        """From here on there is no other attempt."""
        if not self._request.startedWriting:
            _start(self._stream, self._request, self._record)
            unbuffered(self._request)
        forget_body(self._request)
        if self._call is not None:
            self._call.forget()

    def check_end(self, *, framed: bool) -> None:
        """Raises `BackendFailed` if the stream stopped before its answer was whole."""
        if self._told is not None and self._told.failed:
            return
        if self._meter.done or self._meter.failed or (framed and self._meter.whole and not self._decoder.pending.strip()):
            if self._told is not None:
                self._pass(self._told.end(self._meter.usage))
            return
        raise BackendFailed("backend_protocol_error", "The backend's stream ended before its answer was complete.")

    def note(self) -> None:
        """What was seen, into the record."""
        meter, record = self._meter, self._record
        record.usage, record.finish_reason = meter.usage, meter.finish_reason
        record.first_token, record.last_token = meter.first_token, meter.last_token
        record.sent_bytes = self._sent
        if meter.failed:
            record.failed(BackendFailed("backend_error", "The backend sent an error in its stream."))
        elif self._told is not None and self._told.failed:
            record.failed(BackendFailed("backend_protocol_error", "The backend's stream is no chat completion."))
