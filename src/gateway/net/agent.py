"""The client's side of a connection: how the gateway calls a backend.

treq is the way to call; what it stands on is made for one origin and many tenants: no cookie jar,
no redirects, no content decoding, kept-alive connections that are looked at before they are used
again, and headers of bounded size.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Hashable
from typing import Any, Final

from hyperlink import DecodedURL, EncodedURL
from treq.client import HTTPClient
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.python.failure import Failure
from twisted.web._newclient import (
    BODY,
    HTTP11ClientProtocol,
    ParseError,
    RequestNotSent,
    RequestTransmissionFailed,
    ResponseNeverReceived,
)
from twisted.web.client import URI, Agent, BrowserLikePolicyForHTTPS, HTTPConnectionPool, _HTTP11ClientFactory
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IBodyProducer, IResponse
from zope.interface import implementer

MAX_IDLE_CONNECTIONS: Final = 256
"""Kept-alive connections to one backend that wait for use."""

IDLE_SECONDS: Final = 4.0
"""How long one waits: llama-server and uvicorn close theirs after 5 s, and we must be first."""

STALE_SECONDS: Final = 1.0
"""A connection that the server had closed before our request shows it within a round trip."""

MAX_RESPONSE_HEADER_BYTES: Final = 64 * 1024


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


class _Connection(HTTP11ClientProtocol):
    """A connection whose response headers are bounded; twisted.web takes any number of them."""

    transport: Any
    _header_bytes = 0

    def request(self, request: Any) -> Deferred[IResponse]:
        self._header_bytes = 0
        return super().request(request)

    def dataReceived(self, data: bytes) -> None:
        if self._parser is None:  # bytes that nobody asked for: what follows would be out of step
            self.transport.abortConnection()
            return
        if self._parser.state != BODY:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_RESPONSE_HEADER_BYTES and b"\r\n\r\n" not in data:
                self._giveUp(Failure(ParseError("response headers too large", b"")))
                return
        super().dataReceived(data)


class _Factory(_HTTP11ClientFactory):
    noisy = False

    def buildProtocol(self, addr: object) -> _Connection:
        return _Connection(self._quiescentCallback)


class _Reused:
    """A kept-alive connection in use again: if it proves dead before a byte of an answer came, a fresh one is tried, once.

    A server may close an idle connection just as a request is on its way (RFC 9112 section 9.3.1); our
    bodies are whole in memory, so the request can be sent again. A connection that breaks later was not
    stale: the server had the request, and may have died of it.
    """

    def __init__(
        self,
        connection: HTTP11ClientProtocol,
        connect: Callable[[], Deferred[HTTP11ClientProtocol]],
        now: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._connect = connect
        self._now = now

    def request(self, request: Any) -> Deferred[IResponse]:
        started = self._now()

        def failed(failure: Failure) -> Any:
            if self._now() - started > STALE_SECONDS or not _was_stale(failure):
                return failure
            return self._connect().addCallback(lambda fresh: fresh.request(request))

        requested: Deferred[IResponse] = self._connection.request(request)
        return requested.addErrback(failed)


def _was_stale(failure: Failure) -> bool:
    if failure.check(RequestNotSent):
        return True
    lost = failure.value
    if not isinstance(lost, RequestTransmissionFailed | ResponseNeverReceived):
        return False
    return not any(reason.check(CancelledError, ParseError) for reason in lost.reasons)


class Pool(HTTPConnectionPool):
    """Kept-alive connections, the freshest first, none of them used before a look at its socket."""

    maxPersistentPerHost = MAX_IDLE_CONNECTIONS
    cachedConnectionTimeout: float = IDLE_SECONDS  # type: ignore[assignment]  # any number of seconds will do
    _factory = _Factory

    def getConnection(self, key: Hashable, endpoint: IStreamClientEndpoint) -> Deferred[Any]:
        idle = self._connections.get(key)
        while idle:
            connection = idle.pop()
            self._timeouts.pop(connection).cancel()
            if connection.state == "QUIESCENT":
                if _is_quiet(connection.transport):
                    return succeed(_Reused(connection, lambda: self._newConnection(key, endpoint), self._reactor.seconds))
                connection.transport.abortConnection()
        return self._newConnection(key, endpoint)


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


@implementer(IAgentEndpointFactory)
class _Endpoints:
    """One endpoint an origin. A literal address needs no name look-up and no happy eyeballs (0.3 s when refused)."""

    def __init__(self, reactor: Any, connect_timeout: float) -> None:
        self._reactor = reactor
        self._timeout = connect_timeout
        self._policy = BrowserLikePolicyForHTTPS()
        self._made: dict[tuple[bytes, bytes, int], IStreamClientEndpoint] = {}

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        key = (uri.scheme, uri.host, uri.port)
        if key not in self._made:
            endpoint = self._connecting(uri.host.decode("ascii"), uri.port)
            if uri.scheme == b"https":
                endpoint = wrapClientTLS(self._policy.creatorForNetloc(uri.host, uri.port), endpoint)
            self._made[key] = endpoint
        return self._made[key]

    def _connecting(self, host: str, port: int) -> IStreamClientEndpoint:
        try:
            version = ipaddress.ip_address(host).version
        except ValueError:
            return HostnameEndpoint(self._reactor, host.encode("ascii"), port, timeout=self._timeout)
        kind = TCP4ClientEndpoint if version == 4 else TCP6ClientEndpoint
        return kind(self._reactor, host, port, timeout=self._timeout)


def make_agent(reactor: Any, connect_timeout: float) -> tuple[IAgent, Pool]:
    """An agent for backends, and its pool, whose connections the caller closes at the end."""
    pool = Pool(reactor)
    return Agent.usingEndpointFactory(reactor, _Endpoints(reactor, connect_timeout), pool), pool
