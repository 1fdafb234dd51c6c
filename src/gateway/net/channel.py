"""The server's side of a connection: requests come in time and within bounds, and are answered in order.

Headers and bodies must come in time, requests are answered one at a time in the order they came, a client
that does not read its answer is let go, and every refusal is an OpenAI error body.
"""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from twisted.internet.interfaces import IDelayedCall, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.http_headers import Headers
from zope.interface import implementer

from ..core.errors import GatewayError
from ..core.forwarded import UNIX
from .reader import Bad, Limits, Message, Reader
from .request import Request

if TYPE_CHECKING:
    from .server import Server

__all__ = ["Channel", "Limits", "OnRefused", "Refusal"]

LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 64 * 1024 * 1024
"""What a refused client may still send, so that it reads the refusal instead of a reset."""

HEADER_SECONDS: Final = 10.0
"""From the first byte of a request to the end of its headers."""

MIN_BODY_RATE: Final = 1024
"""Bytes per second that a request body must keep up on average once the client timeout has passed once."""

MAX_PIPELINED: Final = 64 * 1024
"""Bytes that a client may send while the request before them is being answered."""


class Refusal(NamedTuple):
    """A request that was turned away before it reached a route."""

    error: GatewayError
    method: str
    client: str
    headers: Headers


OnRefused = Callable[[Refusal], str]
"""Told of every refusal; returns the request id to answer with."""


@implementer(IPushProducer)
class Channel(Protocol):
    """HTTP/1.1 from a client, within `Limits`. Made by `gateway.net.server.Server`."""

    transport: Any
    _request: Request | None = None
    _serving = False
    _ending = False  # nothing more is read
    _paused = False
    _gone = False
    _owed = ""  # what there is a deadline for
    _deadline: IDelayedCall | None = None
    _stalled: IDelayedCall | None = None
    _linger_left = LINGER_BYTES

    def __init__(self, site: Server, peer: Any = None) -> None:
        self.site = site
        self.peer = peer
        self._reader = Reader(site.limits, site.known)
        self._held: list[bytes] = []

    @property
    def idle(self) -> bool:
        """No request is being received or answered."""
        return self._request is None and not self._reader.ready and not self._reader.partial

    # --- receiving

    def connectionMade(self) -> None:
        with suppress(AttributeError):  # not all transports are sockets
            self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)
        self.peer = self.peer or self.transport.getPeer()  # a proxy may have said whose connection it is
        self.site.idle.start(self)

    def dataReceived(self, data: bytes) -> None:
        if self._ending:
            self._discard(data)
        elif self._request is not None or self._reader.ready:
            self._hold(data)
        else:
            self._reader.feed(data)
            self._serve()

    def _discard(self, data: bytes) -> None:
        """Nobody listens any more; but who is still sending may not yet have read what we said."""
        self._linger_left -= len(data)
        if self._linger_left < 0:
            self.transport.abortConnection()

    def _hold(self, data: bytes) -> None:
        """Keep it for later. (Not to read it from the socket would hide that the client leaves.)"""
        self._held.append(data)
        if sum(map(len, self._held)) > MAX_PIPELINED:
            self.transport.abortConnection()

    # --- answering

    def _serve(self) -> None:
        """Answer what has been read, one request after the other, then what was held back meanwhile."""
        if self._serving or self._gone:
            return
        self._serving = True
        reader = self._reader
        while self._request is None and not self._ending and not self._paused:
            if reader.ready:
                self._start(reader.ready.pop(0))
            elif self._held:
                data = b"".join(self._held)
                self._held = []
                reader.feed(data)
            else:
                break
        self._serving = False
        self._await_client()

    def _start(self, message: Message | Bad) -> None:
        if isinstance(message, Bad):
            self._refuse(message)
            return
        self._request = request = Request(self, message)
        request.start(self.site.known.get((message.method, message.path)))

    def request_done(self, request: Request) -> None:
        """The request has its answer."""
        self._request = None
        if request.persistent:
            self._serve()
        else:
            self.loseConnection()

    # --- deadlines

    def _await_client(self) -> None:
        """Set the timers of what the client owes us now: the rest of a request, or the next one."""
        if self._request is not None or self._ending:
            owed = ""
        else:
            reader = self._reader
            owed = "body" if reader.in_body else "head" if reader.partial else ""
            self.site.idle.start(self)
            if reader.expects:
                reader.expects = False
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if owed != self._owed:
            self._owed = owed
            self._clear_deadline()
            timeout = self.site.limits.client_timeout
            if owed == "head":
                self._set_deadline(min(HEADER_SECONDS, timeout), self._too_slow)
            elif owed == "body":
                self._set_deadline(timeout, self._check_body_rate, self.site.clock.seconds())

    def setTimeout(self, period: float | None) -> None:
        """Wait for the client, or (None) do not. How long is the site's affair."""
        if period is None:
            self.site.idle.stop(self)
        else:
            self.site.idle.start(self)

    def timeoutConnection(self) -> None:
        """The client has been silent for the client timeout; who waits for an answer, or still reads one, may be."""
        if self._paused or self._request is not None:
            self.site.idle.start(self)
        else:
            self._too_slow()

    def _set_deadline(self, seconds: float, then: Callable[..., None], *args: float) -> None:
        self._clear_deadline()
        self._deadline = self.site.clock.callLater(seconds, then, *args)

    def _clear_deadline(self) -> None:
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = None

    def _check_body_rate(self, started: float) -> None:
        if self._reader.body_bytes < MIN_BODY_RATE * (self.site.clock.seconds() - started):
            self._too_slow()
        else:
            self._set_deadline(self.site.limits.client_timeout, self._check_body_rate, started)

    def _too_slow(self) -> None:
        if self._reader.partial:
            self._reader.refuse(GatewayError("request_timeout", "The request did not arrive in time."))
            self._serve()
        else:  # nothing asked yet: nobody waits for an answer
            self._set_deadline(LINGER_SECONDS, self.transport.abortConnection)  # cuts what the last answer could not deliver
            self.loseConnection()

    # --- IPushProducer: the transport's buffer is full, or has room again

    def pauseProducing(self) -> None:
        self._paused = True
        if self._request is not None and self._request.producer is not None:
            self._request.producer.pauseProducing()
        if self._stalled is None:
            self._watch_reader()

    def resumeProducing(self) -> None:
        self._paused = False
        self._clear_stalled()
        if self._request is not None and self._request.producer is not None:
            self._request.producer.resumeProducing()
        elif self._reader.ready or self._held:
            self._serve()

    def stopProducing(self) -> None:
        if self._request is not None and self._request.producer is not None:
            self._request.producer.stopProducing()

    def _watch_reader(self) -> None:
        idle = self.site.limits.idle_timeout
        self._stalled = self.site.clock.callLater(idle, self._check_reader, _acknowledged(self.transport))

    def _check_reader(self, before: int) -> None:
        """A pause may outlast the timeout while a slow reader empties the kernel's buffer: what counts is whether it reads."""
        self._stalled = None
        if _acknowledged(self.transport) > before:
            self._watch_reader()
        else:
            self.transport.abortConnection()

    def _clear_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # --- the end

    def _refuse(self, bad: Bad) -> None:
        """Answer with the error, then discard what the client still sends, for a while, so that it reads the answer."""
        self._ending = True
        method = bad.method.decode("ascii", "replace")
        client = getattr(self.peer, "host", UNIX)
        request_id = self.site.on_refused(Refusal(bad.error, method, client, bad.headers))
        self.transport.unregisterProducer()
        self.transport.write(_refusal(bad.error, request_id, body=bad.method != b"HEAD"))
        self.transport.loseWriteConnection()
        self._owed = ""
        self._set_deadline(LINGER_SECONDS, self.transport.abortConnection)

    def drain(self) -> None:
        """Take no further request; an idle connection closes now, a busy one after its answer."""
        if self._request is not None:
            self._request.persistent = False
        elif self.idle and not self._ending:
            self._ending = True
            self.transport.loseConnection()

    def loseConnection(self) -> None:
        """Close once all is written; from here on nobody pauses us, so whoever does not read is watched at once."""
        self._ending = True
        self.setTimeout(None)
        self.transport.unregisterProducer()
        self.transport.loseConnection()
        if self._stalled is None and not self._gone:
            self._watch_reader()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._gone = self._ending = True
        self.setTimeout(None)
        self._clear_deadline()
        self._clear_stalled()
        request, self._request = self._request, None
        if request is not None:
            request.connectionLost(reason)
        self.site.closed(self)


def _acknowledged(transport: Any) -> int:
    """A number that grows while the client reads: the bytes that its machine has taken so far, as Linux counts them
    (tcpi_bytes_acked in struct tcp_info); on a UNIX socket, those that nobody has read, less than zero."""
    handle = getattr(transport, "getHandle", lambda: None)()
    if not isinstance(handle, socket.socket) or not hasattr(socket, "TCP_INFO"):
        return 0
    try:
        if handle.family == socket.AF_UNIX:
            unread = int.from_bytes(fcntl.ioctl(handle, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
            waiting: int = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
            return -(unread + waiting)
        told = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    except OSError:
        return 0
    return int.from_bytes(told[120:128], sys.byteorder)


def _refusal(error: GatewayError, request_id: str, *, body: bool) -> bytes:
    content = error.body()
    lines = [
        f"HTTP/1.1 {error.status} {http.RESPONSES.get(error.status, b'Refused').decode('ascii')}",
        f"X-Request-ID: {request_id}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "\r\n"]).encode("ascii") + (content if body else b"")
