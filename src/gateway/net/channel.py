"""The server's side of a connection: what twisted.web leaves unbounded is bounded here.

A body is capped before it is read whole, headers and bodies must come in time, a client that
does not read its answer is let go, the number of connections is limited, and every refusal is an
OpenAI error body.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http, server
from twisted.web.http_headers import Headers

from ..core.errors import GatewayError

if TYPE_CHECKING:
    from .server import Server

LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 64 * 1024 * 1024
"""What a refused client may still send, so that it reads the refusal instead of a reset."""

HEADER_SECONDS: Final = 10.0
"""From the first byte of a request to the end of its headers."""

MIN_BODY_RATE: Final = 1024
"""Bytes per second that a request body must keep up on average once the client timeout has passed once."""

MAX_PIPELINED: Final = 64 * 1024
"""Bytes that a client may send while the request before them is being answered."""

_LENGTH_DIGITS: Final = 20
"""A longer Content-Length is no number of bytes, and int() has a limit of its own."""

_TARGET: Final = re.compile(rb"[!-~]+")
_ABSOLUTE: Final = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
_HOST: Final = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")


class Limits(NamedTuple):
    """Bounds on what clients may do. Bytes, seconds."""

    max_body: int
    max_connections: int
    client_timeout: float
    idle_timeout: float
    max_headers: int = 100
    max_header_bytes: int = 32 * 1024


class Refusal(NamedTuple):
    """A request that was turned away before it reached a route."""

    error: GatewayError
    method: str
    client: str
    headers: Headers


OnRefused = Callable[[Refusal], str]
"""Told of every refusal; returns the request id to answer with."""


class Request(server.Request):
    """A twisted.web request without what nobody reads: no form parsing, no temporary files."""

    def gotLength(self, length: int | None) -> None:
        self.content = BytesIO()

    def getRequestHostname(self) -> bytes:
        """A constant: routes never depend on Host, and werkzeug fails on an odd one outside our handlers."""
        return b"gateway"

    def process(self) -> None:
        """As in twisted.web, without its Server header, its special case for ``*`` and its content encoders."""
        absolute = _ABSOLUTE.match(self.path)  # absolute-form, RFC 9112 section 3.2.2
        path = self.path[absolute.end() :] if absolute else self.path
        self.site = self.channel.site  # type: ignore[attr-defined]
        self.setHeader(b"date", http.datetimeToString())
        self.prepath = []
        self.postpath = [unquote_to_bytes(segment) for segment in path.lstrip(b"/").split(b"/")]
        try:
            self.render(self.site.getResourceFor(self))
        except Exception:
            self.processingFailed(Failure())


class _BodyTooLarge(Exception):
    """The chunked body went over the cap."""


class Channel(http.HTTPChannel):
    """HTTP/1.1 from a client, within `Limits`. Made by `gateway.net.server.Server`."""

    site: Server
    transport: Any
    callLater: Callable[..., IDelayedCall]
    maxHeaders = 100
    _optimisticEagerReadSize = MAX_PIPELINED
    _deadline: IDelayedCall | None = None
    _stalled: IDelayedCall | None = None
    _refused = False
    _gone = False
    _linger_left = LINGER_BYTES
    _body_bytes = 0

    @property
    def idle(self) -> bool:
        """No request is being received or answered."""
        return not self.requests

    # --- receiving

    def connectionMade(self) -> None:
        super().connectionMade()
        self.MAX_LENGTH = self.site.limits.max_header_bytes
        self.totalHeadersSize = self.site.limits.max_header_bytes
        self.maxHeaders = self.site.limits.max_headers

    def dataReceived(self, data: bytes) -> None:
        if self._refused:
            self._linger_left -= len(data)
            if self._linger_left < 0:
                self.transport.abortConnection()
            return
        if self._deadline is None and not self._handlingRequest:
            self._set_deadline(min(HEADER_SECONDS, self.site.limits.client_timeout), self._too_slow)
        super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        if line[:1] in (b" ", b"\t"):  # obs-fold, which RFC 9112 section 5.2 lets a server refuse
            self._respondToBadRequestAndDisconnect()
        else:
            super().lineReceived(line)

    def headerReceived(self, line: bytes) -> bool:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and len(value) > _LENGTH_DIGITS:
            self._refuse(_too_large(self.site.limits.max_body))
            return False
        return bool(super().headerReceived(line))

    def allHeadersReceived(self) -> None:
        request = self.requests[-1]
        problem = self._problem(request.requestHeaders)
        if problem is not None:
            self._refuse(problem)
            return
        super().allHeadersReceived()
        if self.length != 0:
            self._count_body(request)
            self._body_bytes = 0
            self._set_deadline(self.site.limits.client_timeout, self._check_body_rate, self.site.clock.seconds())

    def _problem(self, headers: Headers) -> GatewayError | None:
        limit = self.site.limits.max_body
        if self.length is not None and self.length > limit:
            return _too_large(limit)
        if not _TARGET.fullmatch(self._path) or not _is_utf8(unquote_to_bytes(self._path)):
            return GatewayError("bad_http", "The request target must be percent-encoded UTF-8 (RFC 3986).")
        hosts = headers.getRawHeaders(b"host", [])
        if len(hosts) > 1 or (not hosts and self._version == b"HTTP/1.1") or not all(map(_HOST.fullmatch, hosts)):
            return GatewayError("bad_http", "The request needs exactly one valid Host header (RFC 9112 section 3.2).")
        encoding = headers.getRawHeaders(b"transfer-encoding", [])
        if encoding and (self._version != b"HTTP/1.1" or self.length is not None):
            return GatewayError("bad_http", "Transfer-Encoding must be 'chunked', and needs HTTP/1.1 (RFC 9112 section 6.1).")
        return None

    def checkPersistence(self, request: http.Request, version: bytes) -> bool:
        values = request.requestHeaders.getRawHeaders(b"connection", [])
        tokens = {token.strip().lower() for value in values for token in value.split(b",")}
        if version == b"HTTP/1.1" and b"close" not in tokens and not self.site.draining:
            return True
        request.responseHeaders.setRawHeaders(b"connection", [b"close"])
        return False

    def _count_body(self, request: http.Request) -> None:
        """Count what the body brings; a chunked one is refused at the byte that goes over the cap."""
        limit = self.site.limits.max_body

        def count(data: bytes) -> None:
            self._body_bytes += len(data)
            if self._body_bytes > limit:
                raise _BodyTooLarge
            request.handleContentChunk(data)

        self._transferDecoder.dataCallback = count  # type: ignore[union-attr]  # there is one while a body is expected

    def rawDataReceived(self, data: bytes) -> None:
        if self._refused:
            return
        if self._handlingRequest and sum(map(len, self._dataBuffer)) + len(data) > MAX_PIPELINED:
            # twisted.web would stop reading, and then not notice that the client leaves.
            self.transport.abortConnection()
            return
        try:
            super().rawDataReceived(data)
        except _BodyTooLarge:
            self._refuse(_too_large(self.site.limits.max_body))

    def allContentReceived(self) -> None:
        self._clear_deadline()
        super().allContentReceived()

    # --- deadlines

    def _set_deadline(self, seconds: float, then: Callable[..., None], *args: float) -> None:
        self._clear_deadline()
        self._deadline = self.callLater(seconds, then, *args)

    def _clear_deadline(self) -> None:
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = None

    def _check_body_rate(self, started: float) -> None:
        if self._body_bytes < MIN_BODY_RATE * (self.site.clock.seconds() - started):
            self._too_slow()
        else:
            self._set_deadline(self.site.limits.client_timeout, self._check_body_rate, started)

    def _too_slow(self) -> None:
        if self.requests:
            self._refuse(GatewayError("request_timeout", "The request did not arrive in time."))
        else:  # nothing asked yet: nobody waits for an answer
            self._close_idle()

    def timeoutConnection(self) -> None:
        self._too_slow()

    def _close_idle(self) -> None:
        """Close, and cut what the last answer could not deliver."""
        self._set_deadline(LINGER_SECONDS, self.transport.abortConnection)
        self.loseConnection()

    def pauseProducing(self) -> None:
        super().pauseProducing()
        if self._stalled is None:
            self._watch_reader()

    def resumeProducing(self) -> None:
        self._clear_stalled()
        super().resumeProducing()

    def _watch_reader(self) -> None:
        idle = self.site.limits.idle_timeout
        self._stalled = self.callLater(idle, self._check_reader, _acknowledged(self.transport))

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

    # --- refusing

    def lineLengthExceeded(self, line: bytes) -> None:
        self._refuse(_headers_too_large(self.site.limits))

    def _respondToBadRequestAndDisconnect(self) -> None:
        limits = self.site.limits
        over = self._receivedHeaderSize > limits.max_header_bytes or self._receivedHeaderCount > limits.max_headers
        self._refuse(_headers_too_large(limits) if over else GatewayError("bad_http", "The request is not valid HTTP/1.1."))

    def _refuse(self, error: GatewayError) -> None:
        """Answer with the error, then discard what the client still sends, for a while, so that it reads the answer."""
        if self._refused:
            return
        self._refused = True
        self._clear_deadline()
        self.setTimeout(None)
        request = self.requests.pop() if self.requests else None
        method = getattr(self, "_command", b"")
        headers = request.requestHeaders if request else Headers()
        client = getattr(self.transport.getPeer(), "host", "")
        request_id = self.site.on_refused(Refusal(error, method.decode("ascii", "replace"), client, headers))
        self.transport.unregisterProducer()
        self.transport.write(_refusal(error, request_id, body=method != b"HEAD"))
        self.length = None  # LineReceiver goes on in raw mode: nothing is taken for another request
        self.setRawMode()
        self.transport.loseWriteConnection()
        self._deadline = self.callLater(LINGER_SECONDS, self.transport.abortConnection)

    # --- the end

    def drain(self) -> None:
        """Take no further request; an idle connection closes now, a busy one after its answer."""
        if self._refused:
            return
        if self.idle:
            self.transport.loseConnection()
            return
        self.persistent = False
        for request in self.requests:
            if not request.startedWriting:
                request.responseHeaders.setRawHeaders(b"connection", [b"close"])

    def loseConnection(self) -> None:
        """Close once all is written; from here on nobody pauses us, so whoever does not read is watched at once."""
        super().loseConnection()
        if self._stalled is None and not self._gone:
            self._watch_reader()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._gone = True
        self._clear_deadline()
        self._clear_stalled()
        super().connectionLost(reason)
        self.site.closed(self)


def _acknowledged(transport: Any) -> int:
    """Bytes that the client's machine has taken so far, as Linux counts them (tcpi_bytes_acked in struct tcp_info)."""
    handle = getattr(transport, "getHandle", lambda: None)()
    if not isinstance(handle, socket.socket) or not hasattr(socket, "TCP_INFO"):
        return 0
    try:
        told = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    except OSError:
        return 0
    return int.from_bytes(told[120:128], sys.byteorder)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _too_large(limit: int) -> GatewayError:
    return GatewayError("request_too_large", f"The request body is larger than {limit} bytes, the limit of this gateway.")


def _headers_too_large(limits: Limits) -> GatewayError:
    return GatewayError(
        "headers_too_large",
        f"The request line and headers may be {limits.max_header_bytes} bytes and {limits.max_headers} headers at most.",
    )


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
