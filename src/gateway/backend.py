"""A model server: what the gateway asks of one, and the one behind HTTP.

`Backend.send` returns when there is something to tell the client: a whole `Answer`, or a `Stream`
whose first bytes are in. Until then nothing has reached the client, so every failure still has an
honest status. Whatever goes wrong on the way comes out as `BackendFailed`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from .core import assembly, message_usage, messages, sse, usage, wire
from .core.backend_settings import Kind
from .core.errors import UNDECODABLE, BackendFailed
from .core.reports import Report
from .core.usage import Usage
from .exchange import Exchange, Receive, Timeouts, Timers
from .net.headers import Pairs, RawHeaders
from .probe import TIMEOUTS as PROBE_TIMEOUTS
from .probe import Prober, retry_after


class Answer(NamedTuple):
    """A reply that is all there. ``native``: it is in the words of the client's own API."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    usage: Usage = Usage()
    finish_reason: str | None = None
    native: bool = False


class Stream(Protocol):
    """A reply whose body is on its way. It is a push producer: pausing it pauses the backend.

    ``framed``: the body says itself where it ends, so a connection that closes early shows.
    ``usage_added``: the gateway asked for the usage chunk, the client did not. ``native``: as of `Answer`.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    framed: bool
    usage_added: bool
    native: bool

    def deliver(self, receive: Receive) -> Deferred[None]:
        """Push the body to ``receive``; fires when it has ended, fails with `BackendFailed`."""

    def expect_end(self) -> None:
        """The answer is whole: nothing but the end of the body may still come, and soon."""

    def pauseProducing(self) -> None: ...
    def resumeProducing(self) -> None: ...
    def stopProducing(self) -> None:
        """Nobody wants the rest: the backend's connection closes at once."""


class Backend(Protocol):
    """One server."""

    name: str

    async def send(self, call: wire.Call) -> Answer | Stream:
        """Raises `BackendFailed`."""

    async def models(self, headers: list[tuple[bytes, bytes]]) -> Answer:
        """Its list of models, or the 4xx with which it refuses to tell. Raises `BackendFailed`."""

    async def probe(self) -> Report:
        """Raises `BackendFailed`. Costs no generation."""


class HTTPBackend:
    """An OpenAI-compatible server, called with treq."""

    def __init__(
        self,
        name: str,
        url: str,
        client: HTTPClient,
        clock: IReactorTime,
        timeouts: Timeouts,
        *,
        kind: Kind | None = None,
        api_key: str | None = None,
        own_key: bool = True,
        stream_usage: bool = True,
        messages: Literal["auto", "native", "translate"] = "auto",
        max_answer: int = 64 * 1024 * 1024,
    ) -> None:
        self.name = name
        self._url = url.encode("ascii")
        self._client = client
        self._timers = Timers(clock, timeouts)
        self._probe_timers = Timers(clock, PROBE_TIMEOUTS)
        self._api_key = (api_key or "").encode("ascii")
        self._authorization = b"Bearer " + self._api_key if api_key else None
        self._stream_usage = stream_usage
        self._messages = messages
        self._max_answer = max_answer
        given = [(b"authorization", self._authorization)] if self._authorization else []
        self._prober = Prober(self._url, client, clock, kind=kind, headers=given, own_key=own_key)

    async def send(self, call: wire.Call) -> Answer | Stream:
        kind = self._prober.kind or await self._prober.ask_kind()
        if not call.generates:
            return await self._count_tokens(call, exact=kind == "llamacpp" or self._messages == "native")
        endpoint, asked = call.endpoint, call.asked
        stream = bool(asked.stream)
        # llama-server tells its own messages as well as we can, but only of a stream does it see that the client has left.
        if call.native and (self._messages == "native" or (self._messages == "auto" and kind == "llamacpp" and stream)):
            reply = await self._send_native(call, call.native)
            if reply.status != 404 or self._messages == "native":
                return reply
            self._messages = "translate"  # a version that does not know them
        assemble = None if stream or kind != "llamacpp" else endpoint.assembler
        ask_usage = stream and kind != "llamacpp" and self._stream_usage and endpoint.usage_option and not asked.include_usage
        body = call.body
        if assemble is not None:
            body = wire.as_stream(body, usage=endpoint.usage_option)
        elif ask_usage:
            body = wire.with_usage(body)
        exchange = await self._post(call, endpoint.path, body)
        exchange.usage_added = ask_usage
        if not exchange.is_event_stream or not 200 <= exchange.status < 300:
            answer = Answer(exchange.status, exchange.headers, await exchange.content())
            return _judged(answer if exchange.status < 400 else self._without_key(answer))
        if assemble is not None:
            return await _assembled(exchange, assemble(self._max_answer))
        return exchange

    async def _send_native(self, call: wire.Call, body: bytes) -> Answer | Stream:
        """A message to a server that knows Anthropic's API."""
        exchange = await self._post(call, messages.MESSAGES, body)
        exchange.native = True
        if exchange.is_event_stream and 200 <= exchange.status < 300:
            return exchange
        return _judged(Answer(exchange.status, exchange.headers, await exchange.content(), native=True))

    async def _post(self, call: wire.Call, path: str, body: bytes) -> Exchange:
        exchange = Exchange(self._client, self._timers, self._max_answer)
        headers = self._headers(call.headers)
        headers += [(b"content-type", b"application/json"), (b"x-request-id", call.request_id.encode("ascii"))]
        await exchange.open("POST", self._url + path.encode("ascii"), RawHeaders(headers), body)
        return exchange

    async def _count_tokens(self, call: wire.Call, *, exact: bool) -> Answer:
        """By the server's own tokenizer if it has that page, else an estimate."""
        if exact:
            exchange = await self._post(call, messages.COUNT_TOKENS, call.body)
            answer = Answer(exchange.status, exchange.headers, await exchange.content())
            if answer.status not in (404, 501):
                return _judged(answer)
        return Answer(200, [(b"content-type", b"application/json")], messages.token_count(messages.estimate(call.body)))

    async def models(self, headers: list[tuple[bytes, bytes]]) -> Answer:
        exchange = Exchange(self._client, self._probe_timers, self._max_answer)
        await exchange.open("GET", self._url + b"/v1/models", RawHeaders(self._headers(headers)), None)
        return _judged(self._without_key(Answer(exchange.status, exchange.headers, await exchange.content())))

    @property
    def kind(self) -> Kind | None:
        """What it is; None: not known yet."""
        return self._prober.kind

    async def ask(self, path: str, body: bytes) -> dict[str, Any]:
        """The JSON object that a page of its own gives, within the time of a probe. Raises `BackendFailed` or `UNDECODABLE`."""
        exchange = Exchange(self._client, self._probe_timers, self._max_answer)
        headers = [*self._headers([]), (b"content-type", b"application/json")]
        await exchange.open("POST", self._url + path.encode("ascii"), RawHeaders(headers), body)
        answer = _judged(Answer(exchange.status, exchange.headers, await exchange.content()))
        return msgspec.json.decode(answer.body, type=dict[str, Any])

    async def probe(self) -> Report:
        return await self._prober.look()

    def _without_key(self, answer: Answer) -> Answer:
        """A server that complains of our key may quote it: that does not go on."""
        return answer._replace(body=answer.body.replace(self._api_key, b"***")) if self._api_key else answer

    def _headers(self, given: Pairs) -> Pairs:
        if self._authorization:
            kept = [pair for pair in given if pair[0] not in (b"authorization", b"x-api-key")]
            return [*kept, (b"accept-encoding", b"identity"), (b"authorization", self._authorization)]
        return [*given, (b"accept-encoding", b"identity")]


def _judged(answer: Answer) -> Answer:
    """A success or the caller's own fault (4xx) passes; anything else is the backend's failure."""
    status = answer.status
    if 200 <= status < 300:
        return _with_usage(answer) if _is_json(answer.headers) else answer
    if 400 <= status < 500:
        return answer
    detail = f"a body of {len(answer.body)} bytes"
    if status >= 500:
        message, wait = f"The backend failed with status {status}.", retry_after(answer.headers)
        raise BackendFailed("backend_error", message, detail=detail, said=_said(answer.body), retry_after=wait)
    raise BackendFailed("backend_protocol_error", f"The backend answered with status {status}.", detail=detail)


def _is_json(headers: list[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name.lower() == b"content-type":
            media_type = value.partition(b";")[0].strip().lower()
            return media_type == b"application/json" or media_type.endswith(b"+json")
    return False


def _with_usage(answer: Answer) -> Answer:
    try:
        used, finish_reason = message_usage.of_message(answer.body) if answer.native else usage.of_answer(answer.body)
    except UNDECODABLE as problem:
        message = "The backend's answer is not the JSON that it says it is."
        raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
    return answer._replace(usage=used, finish_reason=finish_reason)


def _said(body: bytes) -> str:
    """The message of an error body in OpenAI's form, which is meant for the caller; of anything else nothing."""
    try:
        found = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except UNDECODABLE:
        return ""
    message = found.get("message") if isinstance(found, dict) else None
    return message[:300] if isinstance(message, str) else ""


async def _assembled(exchange: Exchange, assembler: assembly.Assembler | assembly.ResponseAssembler) -> Answer:
    try:
        await exchange.deliver(assembler.feed)
        body = assembler.answer()
    except assembly.StreamError as problem:
        return _judged(Answer(problem.status, [(b"Content-Type", b"application/json")], problem.body))
    except (assembly.Broken, sse.TooLong) as problem:
        message = "The backend's answer is broken or was cut short."
        raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
    kept = [(name, value) for name, value in exchange.headers if name.lower() != b"content-type"]
    return _with_usage(Answer(exchange.status, [*kept, (b"Content-Type", b"application/json; charset=utf-8")], body))
