"""How the gateway calls a backend.

treq is the way to call; what it stands on here is made for model servers and many tenants: no cookie
jar, no redirects, no content decoding, kept-alive connections that are looked at before they are used
again, literal addresses without a name look-up, and headers of bounded size.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Final

from hyperlink import DecodedURL, EncodedURL
from treq.client import HTTPClient
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.internet.protocol import Factory
from twisted.web.client import URI, BrowserLikePolicyForHTTPS
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from .connection import Connection
from .headers import last_of, pairs_of
from .response import Origin, Pending

MAX_IDLE_CONNECTIONS: Final = 256
"""Kept-alive connections to one backend that wait for use."""

IDLE_SECONDS: Final = 4.0
"""How long one waits: llama-server and uvicorn close theirs after 5 s, and we must be first."""

STALE_SECONDS: Final = 1.0
"""A connection that the server had closed before our request shows it within a round trip."""

MAX_TARGETS: Final = 1024
"""URLs that are remembered in parsed form."""


@implementer(IBodyProducer)
class BytesBody:
    """A request body that is all there: written at once, and as often as need be."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.length = len(body)

    def startProducing(self, consumer: Any) -> Deferred[None]:
        consumer.write(self.body)
        return succeed(None)

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        pass


class BackendClient(HTTPClient):
    """treq's client for one origin: what is asked goes to the agent as it is, and comes back so.

    treq's own ``request`` keeps one cookie jar for all callers, follows redirects, asks for gzip and
    holds every body in memory. None of this may happen between tenants and their model server.
    """

    def request(  # type: ignore[override]  # what a backend call needs of it, and no more
        self,
        method: str,
        url: str | bytes | DecodedURL | EncodedURL,
        *,
        headers: Headers | None = None,
        data: bytes | None = None,
        _stacklevel: int = 2,
    ) -> Deferred[IResponse]:
        """One request; the Deferred fires when the response's headers are in. Cancelling closes the connection."""
        target = url if isinstance(url, bytes) else str(url).encode("ascii")
        body = None if data is None else BytesBody(data)
        return self._agent.request(method.encode("ascii"), target, headers, body)


class _Target:
    """A URL, once parsed."""

    def __init__(self, uri: URI, origin: Origin) -> None:
        self.origin = origin
        host = uri.netloc.rpartition(b"@")[2]
        self.host = b"host: %b\r\n" % host
        self.line = b" %b HTTP/1.1\r\n" % uri.originForm


@implementer(IAgent)
class Agent:
    """An agent with a pool of connections for each origin.

    A kept-alive connection is used newest first, and not without a look at its socket. If it proves dead
    before a byte of a response has come, a fresh one is tried, once: a server may close an idle connection
    just as a request is on its way (RFC 9112 section 9.3.1). A connection that breaks later was not stale:
    the server had the request, and may have died of it.

    With an ``address``, that is what it connects to, whatever host a URL names; certificates are still those of the host.
    """

    def __init__(self, reactor: Any, connect_timeout: float, address: str = "") -> None:
        self._reactor = reactor
        self._now = reactor.seconds
        self._timeout = connect_timeout
        self._address = address
        self._closed = False
        self._policy = BrowserLikePolicyForHTTPS()
        self._origins: dict[tuple[bytes, bytes, int], Origin] = {}
        self._targets: dict[bytes, _Target] = {}
        self._reaping: IDelayedCall | None = None

    def request(
        self, method: bytes, uri: bytes, headers: Headers | None = None, bodyProducer: IBodyProducer | None = None
    ) -> Deferred[IResponse]:
        target = self._targets.get(uri) or self._target(uri)
        body = bodyProducer.body if type(bodyProducer) is BytesBody else None
        head = _head(method, target, headers, bodyProducer)
        pending = Pending(method, uri, headers, head, body, bodyProducer if body is None else None)
        pending.origin = origin = target.origin
        idle = origin.idle
        while idle:
            connection = idle.pop()
            now = self._now()
            if now - connection.free_since >= IDLE_SECONDS or not _is_quiet(connection.transport):
                connection.abort()
                continue
            if pending.producer is None:
                pending.again = self._again
                pending.again_until = now + STALE_SECONDS
            connection.send(pending)
            break
        else:
            self._connect(pending)
        return pending.response  # type: ignore[return-value]  # Deferred is not covariant

    def _again(self, pending: Pending) -> bool:
        """The connection had been closed by its backend before the request was on it."""
        pending.again = pending.connection = None
        if self._now() > pending.again_until:
            return False
        self._connect(pending)
        return True

    # --- connections

    def _connect(self, pending: Pending) -> None:
        origin = pending.origin
        factory = Factory.forProtocol(lambda: Connection(origin, self._keep, self._forget))
        factory.noisy = False  # a line for each connection tells nobody anything
        pending.connecting = connecting = origin.endpoint.connect(factory)

        def connected(connection: Connection) -> None:
            pending.connecting = None
            transport = connection.transport
            if getattr(transport, "protocol", connection) is not connection:
                transport.protocol = connection  # the endpoint's wrapper has done its work
            connection.send(pending)

        connecting.addCallbacks(connected, pending.failed)

    def _keep(self, connection: Connection) -> None:
        idle = connection.origin.idle
        if len(idle) < MAX_IDLE_CONNECTIONS and not self._closed:
            connection.free_since = self._now()
            idle.append(connection)
            if self._reaping is None:
                self._reaping = self._reactor.callLater(IDLE_SECONDS, self._reap)
        else:
            connection.transport.loseConnection()

    def _forget(self, connection: Connection) -> None:
        if connection in connection.origin.idle:
            connection.origin.idle.remove(connection)

    def _reap(self) -> None:
        """Close what has waited for too long; the longest waits in front."""
        self._reaping = None
        now = self._now()
        oldest = now
        for origin in self._origins.values():
            while origin.idle and now - origin.idle[0].free_since >= IDLE_SECONDS:
                origin.idle.pop(0).transport.loseConnection()
            if origin.idle:
                oldest = min(oldest, origin.idle[0].free_since)
        if any(origin.idle for origin in self._origins.values()):
            self._reaping = self._reactor.callLater(oldest + IDLE_SECONDS - now, self._reap)

    def close(self) -> None:
        """Close the connections that wait for use; those in use are closed when their responses have ended."""
        self._closed = True
        if self._reaping is not None:
            self._reaping.cancel()
            self._reaping = None
        for origin in self._origins.values():
            for connection in origin.idle:
                connection.transport.loseConnection()
            origin.idle.clear()

    # --- where to

    def _target(self, url: bytes) -> _Target:
        uri = URI.fromBytes(url)
        key = (uri.scheme, uri.host, uri.port)
        origin = self._origins.get(key)
        if origin is None:
            origin = self._origins[key] = Origin(self._endpoint(uri))
        if len(self._targets) >= MAX_TARGETS:
            self._targets.clear()
        self._targets[url] = target = _Target(uri, origin)
        return target

    def _endpoint(self, uri: URI) -> IStreamClientEndpoint:
        """A literal address needs no name look-up and no happy eyeballs (0.3 s when refused)."""
        host = self._address or uri.host.decode("ascii")
        endpoint: IStreamClientEndpoint
        try:
            literal = TCP4ClientEndpoint if ipaddress.ip_address(host).version == 4 else TCP6ClientEndpoint
            endpoint = literal(self._reactor, host, uri.port, timeout=self._timeout)
        except ValueError:
            endpoint = HostnameEndpoint(self._reactor, uri.host, uri.port, timeout=self._timeout)
        if uri.scheme == b"https":
            endpoint = wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint)
        return endpoint


def _head(method: bytes, target: _Target, headers: Headers | None, producer: IBodyProducer | None) -> bytes:
    pairs = pairs_of(headers) if headers is not None else []
    lines = [method, target.line, *[b"%b: %b\r\n" % pair for pair in pairs]]
    if headers is None or b"host" not in last_of(headers):
        lines.append(target.host)
    if producer is not None:
        unknown = producer.length is UNKNOWN_LENGTH
        lines.append(b"transfer-encoding: chunked\r\n" if unknown else b"content-length: %d\r\n" % producer.length)
    lines.append(b"\r\n")
    return b"".join(lines)


def _is_quiet(transport: Any) -> bool:
    """Nothing waits to be read on an idle connection: neither the backend's FIN nor bytes out of step."""
    handle = getattr(transport, "getHandle", lambda: None)()
    if not isinstance(handle, socket.socket):
        return True
    try:
        handle.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
