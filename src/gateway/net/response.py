"""What is asked of a backend, and the response to it, as twisted's interfaces have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IProtocol, IPushProducer, IStreamClientEndpoint
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone, ResponseNeverReceived
from twisted.web.http import RESPONSES
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer, IClientRequest, IResponse
from zope.interface import implementer

from .headers import RawHeaders

if TYPE_CHECKING:
    from .connection import Connection

DONE: Final = Failure(ResponseDone())


@implementer(IClientRequest)
class Asked(NamedTuple):
    """What a response is the response to."""

    method: bytes
    absoluteURI: bytes
    headers: Headers | None


@implementer(IResponse, IPushProducer)
class Response:
    """A response whose head is in. It is also the transport that the protocol of its body sees.

    Stopping it closes the backend's connection at once, unless the body has ended.
    """

    version = (b"HTTP", 1, 1)
    previousResponse: IResponse | None = None
    _body_protocol: IProtocol | None = None

    def __init__(self, connection: Connection, pending: Pending, code: int, headers: RawHeaders, length: Any) -> None:
        self._pending = pending
        self.code = code
        self.headers = headers
        self.length = length
        self.early: list[bytes] = []
        self._connection: Connection | None = connection
        self._end: Failure | None = None

    @property
    def request(self) -> Asked:
        pending = self._pending
        return Asked(pending.method, pending.uri, pending.headers)

    @property
    def whole(self) -> bytes | None:
        """The body, if all of it is in and nobody has taken it."""
        if self._end is not DONE or self._body_protocol is not None:
            return None
        return self.early[0] if len(self.early) == 1 else b"".join(self.early)

    @property
    def phrase(self) -> bytes:
        phrase: bytes = RESPONSES.get(self.code, b"")
        return phrase

    def setPreviousResponse(self, response: IResponse) -> None:
        self.previousResponse = response

    def deliverBody(self, protocol: IProtocol) -> None:
        self._body_protocol = protocol
        protocol.makeConnection(self)  # type: ignore[arg-type]  # twisted's own gives no more of a transport either
        early, self.early = self.early, []
        for data in early:
            protocol.dataReceived(data)
        if self._end is not None:
            protocol.connectionLost(self._end)
        elif self._connection is not None:
            self._connection.body_taken(protocol.dataReceived)

    def ended(self, reason: Failure) -> None:
        """The body is over, and with it the hold on the connection."""
        self._end = reason
        self._connection = None
        protocol, self._body_protocol = self._body_protocol, None
        if protocol is not None:
            protocol.connectionLost(reason)

    def pauseProducing(self) -> None:
        if self._connection is not None:
            self._connection.transport.pauseProducing()

    def resumeProducing(self) -> None:
        if self._connection is not None:
            self._connection.transport.resumeProducing()

    def stopProducing(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    abortConnection = loseConnection = stopProducing


class Origin:
    """A scheme, host and port: how to connect to it, and the connections to it that wait for use, newest last."""

    def __init__(self, endpoint: IStreamClientEndpoint) -> None:
        self.endpoint = endpoint
        self.idle: list[Connection] = []


class Pending:
    """A request on its way to its response, on one connection or, if that proves stale, another."""

    origin: Origin
    connecting: Deferred[Any] | None = None
    connection: Connection | None = None
    again: Callable[[Pending], bool] | None = None
    """Sends it once more, on a fresh connection; False: it is too late for that."""
    again_until = 0.0

    def __init__(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None,
        head: bytes,
        body: bytes | None,
        producer: IBodyProducer | None,
    ) -> None:
        self.method = method
        self.uri = uri
        self.headers = headers
        self.head = head
        self.body = body
        self.producer = producer
        self.response: Deferred[Response] = Deferred(self._cancel)

    def _cancel(self, _: object) -> None:
        if self.connection is not None:
            connection = self.connection
            self.failed(Failure(ResponseNeverReceived([Failure(CancelledError())])))
            connection.abort()
        elif self.connecting is not None:
            self.connecting.cancel()

    def failed(self, failure: Failure) -> None:
        self.connection = self.connecting = self.again = None  # nobody waits for it: it is not sent once more
        if not self.response.called:
            self.response.errback(failure)
