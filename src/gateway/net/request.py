"""A client's request and the answer to it: twisted's Request, in which nothing is made before somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

from twisted.internet._producer_helpers import _PullToPush
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, ISSLTransport
from twisted.python.failure import Failure
from twisted.web import http, server
from twisted.web.http_headers import Headers

from .headers import pairs_of
from .reader import Message

if TYPE_CHECKING:
    from .channel import Channel

_NO_BODY: Final = frozenset(http.NO_BODY_CODES)
_STATUS_LINES: Final = {
    code: b"HTTP/1.1 %d %b\r\n" % (code, phrase) for code, phrase in http.RESPONSES.items() if isinstance(phrase, bytes)
}

Handle = Callable[["Request"], "Deferred[None]"]
"""Answers a request, whose method and path were found without a router. Cancelled when the client goes away."""


class Request(server.Request):
    """One request, whole, and its answer, whose headers leave with the first bytes of its body in one write.

    ``uri`` is the target as it was sent, ``path`` the part of it that routes are found by. The connection
    is closed after an answer that is not ``persistent``.
    """

    channel: Channel  # type: ignore[assignment]  # does for a Request what twisted's own does
    _fields: dict[bytes, bytes] | None
    _running: Deferred[None] | None = None
    _bodiless = False
    left = 0.0
    """When the client went away, if it did before its answer was whole; seconds of the site's clock."""
    lines: Sequence[bytes] = ()
    """Further headers of the answer, as they leave; see `Lines`."""

    def __init__(self, channel: Channel, message: Message) -> None:
        # Not super().__init__: it would make a dozen things that nobody reads.
        site = channel.site
        self.channel = channel
        self.site = site
        self.transport = channel.transport
        self.client = channel.peer
        self.method = message.method
        self.uri = message.uri
        self.path = message.path
        self.clientproto = message.version
        self.requestHeaders = message.headers
        self.body = message.body
        self.persistent = message.persistent and not site.draining
        self.notifications = []
        self._fields = {}

    # --- what was asked

    @cached_property
    def content(self) -> BytesIO:  # type: ignore[override]
        return BytesIO(self.body)

    @cached_property
    def args(self) -> dict[bytes, list[bytes]]:  # type: ignore[override]
        found: dict[bytes, list[bytes]] = http.parse_qs(self.uri.partition(b"?")[2], True)
        return found

    @cached_property
    def host(self) -> IAddress:
        found: IAddress = self.transport.getHost()  # type: ignore[union-attr]
        return found

    @cached_property
    def received_cookies(self) -> dict[bytes, bytes]:  # type: ignore[override]
        self.__dict__["received_cookies"] = {}
        self.parseCookies()
        return self.__dict__["received_cookies"]  # type: ignore[no-any-return]

    @cached_property
    def cookies(self) -> list[bytes]:  # type: ignore[override]
        return []

    @cached_property
    def _adapterCache(self) -> dict[str, Any]:  # type: ignore[override]  # what Klein asks Componentized for
        return {}

    def getHeader(self, key: str | bytes) -> Any:
        if isinstance(key, bytes):
            return self.requestHeaders.last.get(key.lower())  # type: ignore[attr-defined]
        return super().getHeader(key)

    def isSecure(self) -> bool:
        return bool(ISSLTransport.providedBy(self.transport))

    def getRequestHostname(self) -> bytes:
        """A constant: routes never depend on Host, and werkzeug fails on an odd one outside our handlers."""
        return b"gateway"

    # --- who answers

    def start(self, handle: Handle | None) -> None:
        """Have the request answered: by ``handle``, or by the site's resource."""
        try:
            if handle is None:
                self.process()
                return
            running = handle(self)
            if not running.called:
                self._running = running
        except Exception:
            self.processingFailed(Failure())

    def process(self) -> None:
        """As in twisted.web, without its Server header, its special case for ``*`` and its content encoders."""
        self.prepath = []
        self.postpath = [unquote_to_bytes(segment) for segment in self.path.lstrip(b"/").split(b"/")]
        self.render(self.site.getResourceFor(self))  # type: ignore[union-attr]

    # --- the answer

    @cached_property
    def responseHeaders(self) -> Headers:  # type: ignore[override]
        """What `setHeader` has set so far, and from now on sets."""
        fields, self._fields = self._fields or {}, None
        return Headers({name: [value] for name, value in fields.items()})

    def setHeader(self, name: str | bytes, value: str | bytes) -> None:
        if self._fields is None or type(name) is not bytes or type(value) is not bytes:
            self.responseHeaders.setRawHeaders(name, [value])
        else:
            self._fields[name.lower()] = value  # its line's end is looked at once, with all the others'

    def setResponseCode(self, code: int, message: bytes | None = None) -> None:
        """The reason phrase is the status' own: nobody reads it, and twisted would send whatever it is given."""
        self.code = code

    def write(self, data: bytes) -> None:
        if self.finished:
            raise RuntimeError("Request.write called on a request after Request.finish was called.")
        if self._disconnected:
            return
        if self.startedWriting:
            if data and not self._bodiless:
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)  # type: ignore[union-attr]
            return
        self.startedWriting = 1
        head = self._head()
        if self._bodiless or not data:
            self.transport.write(head)  # type: ignore[union-attr]
        elif self.chunked:
            self.transport.write(b"%b%x\r\n%b\r\n" % (head, len(data), data))  # type: ignore[union-attr]
        else:
            self.transport.write(head + data)  # type: ignore[union-attr]

    def _head(self) -> bytes:
        """The status line and the headers, and what they say of the body's end."""
        fields: Any = self._fields
        if fields is None:
            fields = dict(pairs := pairs_of(self.responseHeaders))
        else:
            pairs = fields.items()
        code = self.code
        lines = [_STATUS_LINES.get(code) or b"HTTP/1.1 %d \r\n" % code, self.site.date_line]  # type: ignore[union-attr]
        lines += [b"%b: %b\r\n" % pair for pair in pairs]
        lines += self.lines
        self._bodiless = code in _NO_BODY or self.method == b"HEAD"
        if b"content-length" not in fields and not self._bodiless:
            if self.clientproto == b"HTTP/1.1":
                self.chunked = 1
                lines.append(b"Transfer-Encoding: chunked\r\n")
            else:
                self.persistent = False  # the end of the connection is the end of the body
        if not self.persistent:
            lines.append(b"Connection: close\r\n")
        if "cookies" in self.__dict__:
            lines += [b"set-cookie: %b\r\n" % cookie for cookie in self.cookies]
        lines.append(b"\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise ValueError("a header's value is one line")
        return head

    def finish(self) -> None:
        if self._disconnected:
            raise RuntimeError("Request.finish called on a request after its connection was lost.")
        if self.finished:
            return
        if not self.startedWriting:
            self.write(b"")
        if self.chunked:
            self.transport.write(b"0\r\n\r\n")  # type: ignore[union-attr]
        self.finished = 1
        channel = self.channel
        self._leave()
        channel.request_done(self)
        for waiting in self.notifications:
            waiting.callback(None)

    def connectionLost(self, reason: Failure) -> None:
        """The client went away before its answer was whole."""
        self._disconnected = True
        self.left = self.channel.site.clock.seconds()
        running = self._running
        self._leave()
        notifications, self.notifications = self.notifications, []
        for waiting in notifications:
            waiting.errback(reason)
        if running is not None:
            running.cancel()

    def _leave(self) -> None:
        """Let go of what would keep this request in memory."""
        self._running = None
        self.channel = None  # type: ignore[assignment]  # as in twisted, whose handlers look at it to see who is there

    # --- the pace

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.producer is not None:
            raise ValueError("registering a producer before the previous one was unregistered")
        pushing: Any = producer if streaming else _PullToPush(producer, self)
        self.producer = pushing
        if self._disconnected:
            producer.stopProducing()
        elif not streaming:
            pushing.startStreaming()

    def unregisterProducer(self) -> None:
        if isinstance(self.producer, _PullToPush):
            self.producer.stopStreaming()
        self.producer = None


class Lines:
    """Headers of an answer that are the same for many, made once: ``fields`` by lower-case name."""

    def __init__(self, fields: dict[bytes, bytes]) -> None:
        self.fields = fields
        self.lines = [b"%b: %b\r\n" % pair for pair in fields.items()]

    def add_to(self, request: server.Request) -> None:
        """Set them, of a request that may be one of ours or any of twisted's."""
        if isinstance(request, Request):
            request.lines = self.lines
        else:
            for name, value in self.fields.items():
                request.setHeader(name, value)


def body_of(request: server.Request) -> bytes:
    """The whole body of a request that may be one of ours or any of twisted's."""
    if isinstance(request, Request):
        return request.body
    content: bytes = request.content.read()  # type: ignore[union-attr]  # there once the request is in
    return content


def forget_body(request: server.Request) -> None:
    """Nobody reads it any more."""
    if isinstance(request, Request):
        request.body = b""
