"""The life of one inference request, top to bottom."""

from __future__ import annotations

from collections.abc import Callable

from twisted.web.server import Request

from .core import wire
from .core.errors import GatewayError
from .core.record import Record
from .dispatch import Dispatcher
from .net.headers import pairs_of
from .net.request import body_of
from .relay import relay


class Inference:
    """Takes a request to a backend and its reply back.

    ``now`` gives seconds on the monotonic clock; ``forward_authorization`` lets the caller's own
    credentials through to the backend.
    """

    def __init__(self, dispatcher: Dispatcher, now: Callable[[], float], *, forward_authorization: bool) -> None:
        self._dispatcher = dispatcher
        self._now = now
        self._forward_authorization = forward_authorization

    async def infer(self, request: Request, record: Record) -> None:
        """Raises `GatewayError` for what fails before the first byte of the answer."""
        call = self._read(request, record)
        with self._dispatcher.lease() as backend:
            record.sent_to(backend.name)
            request.setHeader(b"x-gateway-backend", backend.name.encode("ascii"))
            reply = await backend.send(call)
            await relay(reply, request, record, self._now)

    def _read(self, request: Request, record: Record) -> wire.Call:
        if request.getHeader(b"content-encoding") is not None:
            raise GatewayError("unsupported_media_type", "Send the body without Content-Encoding.")
        body = body_of(request)
        chat = wire.parse_chat(body)
        record.model, record.stream = chat.model or "", bool(chat.stream)
        return wire.Call(wire.CHAT_COMPLETIONS, body, chat, record.request_id, self.forwardable(request))

    def forwardable(self, request: Request) -> list[tuple[bytes, bytes]]:
        """The headers of the client that go on to the backend."""
        return wire.forwardable(pairs_of(request.requestHeaders), authorization=self._forward_authorization)
