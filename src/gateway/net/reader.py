"""Requests out of a client's bytes, by llhttp, and strictly.

Where RFC 9112 lets a server choose between mending a request and refusing it, it is refused: what we
understand and what a backend gets cannot differ. No socket and no clock: bytes in, messages out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

import httptools
import msgspec

from ..core.errors import GatewayError
from . import pieces
from .headers import Pairs, RawHeaders

_TARGET: Final = re.compile(rb"[!-\"$-~]+")  # RFC 9112 section 3.2: visible ASCII, no fragment
_ABSOLUTE: Final = re.compile(rb"https?://[^/?]+", re.IGNORECASE)
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?")
_NOT_HTTP: Final = frozenset(
    b"CONNECT PRI SOURCE DESCRIBE ANNOUNCE SETUP PLAY PAUSE TEARDOWN GET_PARAMETER SET_PARAMETER REDIRECT RECORD FLUSH".split()
)
"""What llhttp knows of proxies (CONNECT), HTTP/2, Icecast and RTSP."""

CHUNK_FRAMING: Final = 64
"""Bytes that a chunk may need beside its data."""

_VERSIONS: Final = {"1.1": b"HTTP/1.1", "1.0": b"HTTP/1.0"}
_SINGLE: Final = (b"host", b"content-length", b"transfer-encoding", b"expect")


class Limits(NamedTuple):
    """Bounds on what clients may do. Bytes, seconds."""

    max_body: int
    max_connections: int
    client_timeout: float
    idle_timeout: float
    max_headers: int = 100
    max_header_bytes: int = 32 * 1024


class Message(msgspec.Struct):
    """A whole request: ``uri`` as it was sent, ``path`` as routes are found by, ``version`` HTTP/1.1 or HTTP/1.0."""

    method: bytes
    uri: bytes
    path: bytes
    version: bytes
    headers: RawHeaders
    persistent: bool
    body: bytes = b""


class Bad(NamedTuple):
    """Not a request: after it nothing more is read."""

    error: GatewayError
    method: bytes
    headers: RawHeaders


class _Stop(Exception):
    """Makes llhttp stop."""


Known = Mapping[tuple[bytes, bytes], Callable[..., Any]]
"""(method, target) pairs that are plainly well-formed: they need no second look."""


class Reader:
    """Feed it bytes; ``ready`` holds what is complete, in order, and at its end perhaps one `Bad`.

    llhttp reads all the requests of a piece of data in one go, so ``ready`` may grow by as many as fit into it.
    ``expects`` is True while a client waits to be told that it may send its body (RFC 9110 section 10.1.1);
    who tells it so sets it to False.
    """

    def __init__(self, limits: Limits, known: Known) -> None:
        self.ready: list[Message | Bad] = []  # a deque has room for 64 from the beginning
        self.in_body = False
        self.body_bytes = 0
        self.expects = False
        self._limits = limits
        self._known = known
        self._parser = httptools.HttpRequestParser(self)
        self._ended = False  # the last request was the last, or it was bad
        self._begun = False
        self._unread = 0  # bytes of the head or, in a body, of all
        self._trailers = self._trailer_bytes = 0
        self._message: Message | None = None
        self._error: GatewayError | None = None
        self._pairs: Pairs = []
        self._host: bytes | None = b""  # the last one that was good
        self._target = b""
        self._method = b""
        self._body: list[bytes] = []
        self._joined = 0  # of these, the first are of many pieces each

    @property
    def partial(self) -> bool:
        """A request has begun, and is not all there."""
        return not self._ended and (self._begun or self._unread > 0)

    def feed(self, data: bytes) -> None:
        if self._ended:
            return
        self._unread += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as left_off:
            self._ignore_upgrade(data[left_off.args[0] :])
        except httptools.HttpParserError:
            if not self._ended:  # else llhttp complains of bytes after a request that was the last
                self.refuse(self._error or self._unparsable())
        else:
            if self._unread > self._limits.max_header_bytes and self._is_mostly_framing() and not self._ended:
                self.refuse(headers_too_large(self._limits))

    def _is_mostly_framing(self) -> bool:
        """A head without end, or a chunked body of more chunk sizes, extensions and trailers than it can need."""
        most = self._limits.max_header_bytes
        if not self.in_body:
            return self._unread > most
        return self._unread - self.body_bytes > 2 * most + CHUNK_FRAMING * self._pieces

    @property
    def _pieces(self) -> int:
        """That the body has come in so far."""
        return len(self._body) + self._joined * (pieces.MANY - 1)

    def _unparsable(self) -> GatewayError:
        if self._unread > self._limits.max_header_bytes and not self.in_body:
            return headers_too_large(self._limits)
        return GatewayError("bad_http", "The request is not valid HTTP/1.1.")

    def refuse(self, error: GatewayError) -> None:
        """Read no further: what there is of a request is turned away, with this error."""
        self._ended = True
        self.in_body = self._begun = self.expects = False
        self.ready.append(Bad(error, self._method, RawHeaders(self._pairs)))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """llhttp leaves off after a head with Upgrade. A server may ignore it (RFC 9110 section 7.8): read the body."""
        self._parser = httptools.HttpRequestParser(self)
        message = self._message
        if message is not None and not self._ended:
            last = message.headers.last
            framing = next(name for name in (b"content-length", b"transfer-encoding") if name in last)
            kept = (self._pairs, self._target, self.expects)
            self.in_body = False
            self._parser.feed_data(b"POST / HTTP/1.1\r\nHost: g\r\n%b: %b\r\n\r\n" % (framing, last[framing]))
            self._pairs, self._target, self.expects = kept
            self._message, self._method = message, message.method
        if rest:
            self.feed(rest)

    # --- llhttp calls these

    def on_message_begin(self) -> None:
        self._begun = True
        self._pairs = []
        self._target = self._method = b""

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_body:
            self._pairs.append((name.lower(), value.rstrip(b" \t")))
            return
        self._trailers += 1  # they are dropped (RFC 9110 section 6.5.1)
        if name.lower() == b"connection" and self._message is not None:
            self._message.persistent = False  # has no business here, but llhttp obeys it
        self._trailer_bytes += len(name) + len(value)
        if self._trailers > self._limits.max_headers or self._trailer_bytes > self._limits.max_header_bytes:
            self._stop(headers_too_large(self._limits))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self._method = method = parser.get_method()
        version = parser.get_http_version()
        headers = RawHeaders(self._pairs)
        path = self._target
        if (method, path) not in self._known:
            path = self._path()
        self._check(headers, version)
        persistent = version == "1.1" and (b"connection" not in headers.last or parser.should_keep_alive())
        self._message = Message(method, self._target, path, _VERSIONS[version], headers, persistent)
        self.in_body = True
        self.body_bytes = self._trailers = self._trailer_bytes = 0
        self._body = []
        self._joined = 0
        self.expects = b"expect" in headers.last and version == "1.1"

    def _stop(self, error: GatewayError) -> None:
        self._error = error
        raise _Stop

    def _bad(self, message: str) -> None:
        self._stop(GatewayError("bad_http", message))

    def _path(self) -> bytes:
        """What routes are found by."""
        target = self._target
        if self._method in _NOT_HTTP:
            self._bad("The method belongs to another protocol.")
        absolute = _ABSOLUTE.match(target)  # RFC 9112 section 3.2.2
        path = (target[absolute.end() :] if absolute else target).partition(b"?")[0]
        if absolute and not path:
            path = b"/"
        if not _TARGET.fullmatch(target) or not _is_utf8(unquote_to_bytes(path)):
            self._bad("The request target must be percent-encoded UTF-8 (RFC 3986).")
        if not path.startswith(b"/") and not (path == b"*" and self._method == b"OPTIONS"):
            self._bad("The request target must be a path (RFC 9112 section 3.2).")
        return path

    def _check(self, headers: RawHeaders, version: str) -> None:
        limits, last, pairs = self._limits, headers.last, headers.pairs
        if len(pairs) > limits.max_headers or (
            self._unread > limits.max_header_bytes
            and sum(len(name) + len(value) + 4 for name, value in pairs) + len(self._target) > limits.max_header_bytes
        ):
            self._stop(headers_too_large(limits))
        if version not in _VERSIONS:
            self._bad("The request is not HTTP/1.1.")
        if len(last) != len(pairs):
            names = [name for name, _ in pairs]
            if any(names.count(name) > 1 for name in _SINGLE):
                self._bad("Host, Content-Length, Transfer-Encoding and Expect may stand once each.")
        host = last.get(b"host")
        if host is None or host != self._host:  # a client names the same one each time
            if not _HOST.fullmatch(host) if host is not None else version == "1.1":
                self._bad("The request needs exactly one valid Host header (RFC 9112 section 3.2).")
            self._host = host
        if b"transfer-encoding" in last and (last[b"transfer-encoding"].lower() != b"chunked" or version != "1.1"):
            self._bad("Transfer-Encoding must be 'chunked', and needs HTTP/1.1 (RFC 9112 section 6.1).")
        if int(last.get(b"content-length", b"0")) > limits.max_body:
            self._stop(too_large(limits))
        if b"expect" in last and last[b"expect"].lower() != b"100-continue":
            self._bad("The only expectation that can be met is 100-continue (RFC 9110 section 10.1.1).")

    def on_body(self, data: bytes) -> None:
        self.body_bytes += len(data)
        if self.body_bytes > self._limits.max_body:
            self._stop(too_large(self._limits))
        self._body.append(data)
        if len(self._body) - self._joined == pieces.MANY:
            self._joined = pieces.join_last(self._body, self._joined)

    def on_message_complete(self) -> None:
        message = self._message
        if message is None or (b"upgrade" in message.headers.last and self._is_body_to_come(message.headers.last)):
            return
        if self._unread > self._limits.max_header_bytes and self._is_mostly_framing():
            self._stop(headers_too_large(self._limits))
        pieces = self._body
        message.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._ended = not message.persistent
        self._message = None
        self._body = []
        self.in_body = self._begun = self.expects = False
        self._unread = 0
        self.ready.append(message)

    def _is_body_to_come(self, last: dict[bytes, bytes]) -> bool:
        """llhttp says that a message with Upgrade is complete, and has yet to read its body."""
        if self._body or not self._parser.should_upgrade():
            return False
        return bool(last.get(b"content-length", b"0").strip(b"0")) or b"transfer-encoding" in last


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def too_large(limits: Limits) -> GatewayError:
    """A body over the cap."""
    message = f"The request body is larger than {limits.max_body} bytes, the limit of this gateway."
    return GatewayError("request_too_large", message)


def headers_too_large(limits: Limits) -> GatewayError:
    """A head over the cap."""
    most = f"{limits.max_header_bytes} bytes and {limits.max_headers} headers"
    return GatewayError("headers_too_large", f"The request line and headers may be {most} at most.")
