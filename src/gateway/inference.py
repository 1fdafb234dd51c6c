"""The life of one inference request, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from msgspec import structs
from twisted.web.server import Request

from .backend import Answer
from .core import asking, messages, ranges, wire
from .core.endpoints import CHAT, endpoint_of
from .core.errors import BackendFailed, GatewayError
from .core.message_answers import Translation
from .core.message_chat import chat_body
from .core.model_settings import NO_MODELS, Models, ModelSettings
from .core.prefix import NO_BLOCKS, blocks_of
from .core.principal import NO_LIMITS, Limits
from .core.record import Record
from .core.retry_budget import RetryBudget
from .core.tickets import PRIORITIES, Ticket
from .dispatch import Dispatcher, Lease
from .hedge import Begun, Hedge
from .limiter import Limiting
from .net.headers import last_of, pairs_of
from .net.request import Lines, body_of
from .probe import retry_after
from .relay import Heartbeat, MakeHeartbeat, no_heartbeat, relay
from .windows import Windows

REPEATABLE: Final = frozenset(
    ["backend_unreachable", "backend_error", "backend_protocol_error", "connect_timeout", "first_byte_timeout", "idle_timeout"]
)
"""Failures after which another backend may be asked: a completion changes nothing, so asking twice costs only work."""

UNAVAILABLE: Final = REPEATABLE | {"no_backend", "queue_full", "queue_timeout"}
"""Failures after which another model may be asked, if the settings name one."""

CHARACTERS: Final = 4
"""Of a request's body in a token of its prompt, where the prompt itself is not looked at."""

MAX_LINES: Final = 1024
"""Sets of headers that are kept made: backend, decision, attempts, milliseconds in the queue."""

MAX_DEADLINE: Final = 86400.0

BACKEND_PATIENCE: Final = 10.0
"""Seconds that a backend is left alone whose 429 does not say for how long."""


class Inference:
    """Takes a request to a backend and its reply back.

    ``now`` gives seconds on the monotonic clock; ``forward_authorization`` lets the caller's own credentials through to
    the backend; ``queue_timeout`` is how long a request may wait for a backend; ``max_attempts`` and ``budget`` bound
    retries; ``heartbeat`` makes the comments of streams that wait; ``strict`` refuses fields that OpenAI's API does not have;
    ``windows`` refuses what has no room in a model's window; ``models`` is what the settings say of models; ``limiting`` lets
    a key's requests in.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        now: Callable[[], float],
        budget: RetryBudget,
        limiting: Limiting,
        *,
        forward_authorization: bool = False,
        queue_timeout: float = 30.0,
        max_attempts: int = 3,
        heartbeat: MakeHeartbeat = no_heartbeat,
        hedge: Hedge | None = None,
        strict: bool = False,
        windows: Windows | None = None,
        models: Models = NO_MODELS,
    ) -> None:
        self._dispatcher = dispatcher
        self._now = now
        self._budget = budget
        self._limiting = limiting
        self._forward_authorization = forward_authorization
        self._queue_timeout = queue_timeout
        self._max_attempts = max_attempts
        self._heartbeat = heartbeat
        self._hedge = hedge
        self.strict = strict
        self._windows = windows
        self._models = models
        self._lines: dict[tuple[str, str, int, int, str], Lines] = {}

    def infer(self, request: Request, record: Record) -> Awaitable[None]:
        """What the record's route is for. Raises `GatewayError` for what fails before the first byte of the answer."""
        return self._begin(request, record, self._read)

    def infer_message(self, request: Request, record: Record) -> Awaitable[None]:
        """A message of Anthropic's API, by way of a chat completion. Raises as `infer` does."""
        return self._begin(request, record, self._read_message)

    def count_tokens(self, request: Request, record: Record) -> Awaitable[None]:
        """How long such a message's prompt is, asked of a backend that serves its model. Raises as `infer` does."""
        return self._begin(request, record, self._read_prompt)

    def _begin(self, request: Request, record: Record, read: Callable[[Request, Record], wire.Call]) -> Awaitable[None]:
        try:
            asked = read(request, record)
            settings = self._models.get(record.model) if self._models else None
            call = asked if settings is None else _of_model(settings, asked, record)
        except GatewayError:
            self._limiting.tell(request, record)
            raise
        ticket = self.ticket(request, call, record)
        limits = self._limiting.limits_of(record.principal)
        if limits is NO_LIMITS:
            return self._let_in(request, record, asked, call, ticket, settings)
        return self._limited(limits, request, record, asked, call, ticket, settings)

    async def _limited(
        self,
        limits: Limits,
        request: Request,
        record: Record,
        asked: wire.Call,
        call: wire.Call,
        ticket: Ticket,
        settings: ModelSettings | None,
    ) -> None:
        """A request of a key that may not use all there is."""
        allowance = await self._limiting.allow(limits, request, record, ticket, getattr(call.asked, "n", None))
        try:
            await self._let_in(request, record, asked, call, ticket, settings)
        except BaseException as problem:
            allowance.end(record, problem)
            raise
        allowance.end(record)

    def _let_in(
        self,
        request: Request,
        record: Record,
        asked: wire.Call,
        call: wire.Call,
        ticket: Ticket,
        settings: ModelSettings | None,
    ) -> Awaitable[None]:
        self._budget.requested(record.started)
        heartbeat = self._heartbeat(request, record, self._dispatcher.scheduler) if record.stream else None
        serving: Awaitable[None] = self._serve(request, record, call, ticket, heartbeat)
        if settings is not None and settings.fallbacks:
            serving = self._fall_back(serving, request, record, asked, heartbeat, settings.fallbacks)
        return serving if heartbeat is None else _beating(heartbeat, serving)

    async def _fall_back(
        self,
        serving: Awaitable[None],
        request: Request,
        record: Record,
        asked: wire.Call,
        heartbeat: Heartbeat | None,
        fallbacks: Sequence[str],
    ) -> None:
        """As long as no backend can be had, one model after the other; each waits as long as a request may."""
        for name in fallbacks:
            try:
                await serving
                return
            except GatewayError as failure:
                if failure.code not in UNAVAILABLE:
                    raise
                record.retried(failure)
            call = _of_model(self._models.get(name) or ModelSettings(name, name), asked, record)
            ticket = self.ticket(request, call, record)
            ticket.expires = self._now() + self._queue_timeout
            serving = self._serve(request, record, call, ticket, heartbeat)
        await serving

    async def _serve(
        self, request: Request, record: Record, call: wire.Call, ticket: Ticket, heartbeat: Heartbeat | None
    ) -> None:
        """One attempt after the other, until a backend answers or nothing more may be tried."""
        if self._windows is not None:
            await self._windows.check(call)
        while True:
            try:
                if self._hedge is None or not record.stream:
                    lease, reply = await self._attempt(call, record, ticket, heartbeat)
                else:
                    lease, reply = await self._race(self._hedge, call, record, ticket, heartbeat)
                with lease:
                    if heartbeat is not None:
                        heartbeat.stop()
                    if not request.startedWriting:
                        self._tell(request, record)
                    if isinstance(reply, Answer):
                        # What was refused was not worked on.
                        lease.usage = reply.usage if call.generates and reply.status < 400 else None
                    else:
                        await relay(reply, request, record, self._now, call.translation)
                        self._settle(lease, record)
                if isinstance(reply, Answer):  # it is all here: its backend need not wait for the client
                    await relay(reply, request, record, self._now)
                return
            except BackendFailed as failure:
                ticket = self._next(ticket, failure, record)

    async def _race(self, hedge: Hedge, call: wire.Call, record: Record, ticket: Ticket, heartbeat: Heartbeat | None) -> Begun:
        begun = await hedge.race(lambda one: self._attempt(call, record, one, heartbeat), ticket, self._second)
        record.chosen(begun[0].ticket)  # the one that was quicker
        return begun

    async def _attempt(self, call: wire.Call, record: Record, ticket: Ticket, heartbeat: Heartbeat | None) -> Begun:
        lease = self._dispatcher.lease(ticket)
        try:
            if heartbeat is not None:
                heartbeat.ticket = ticket
            backend = lease.backend or await lease.granted()
            record.chosen(ticket)
            record.attempts += 1
            reply = await backend.send(call)
            if call.translation is not None and isinstance(reply, Answer):
                reply = _told(reply, call)
        except BaseException as problem:
            lease.end(problem)
            raise
        lease.first_byte()
        if isinstance(reply, Answer) and reply.status == 429:
            lease.rate_limited(retry_after(reply.headers) or BACKEND_PATIENCE)
        return lease, reply

    def _tell(self, request: Request, record: Record) -> None:
        """Where it went, why, and how long it waited: for whoever looks at the answer."""
        key = (record.backend, record.decision, record.attempts, int(record.queued * 1000), record.served_model)
        lines = self._lines.get(key) or self._make_lines(*key)
        lines.add_to(request)

    def _make_lines(self, backend: str, decision: str, attempts: int, waited: int, model: str) -> Lines:
        if len(self._lines) >= MAX_LINES:
            self._lines.clear()
        fields = {
            b"x-gateway-backend": backend.encode("ascii"),
            b"x-gateway-policy": self._dispatcher.scheduler.policy.name.encode("ascii"),
            b"x-gateway-decision": decision.encode("ascii"),
            b"x-gateway-queue-ms": b"%d" % waited,
            b"x-gateway-attempts": b"%d" % attempts,
        }
        if model:
            fields[b"x-gateway-model"] = model.encode("ascii")
        made = self._lines[backend, decision, attempts, waited, model] = Lines(fields)
        return made

    @staticmethod
    def _settle(lease: Lease, record: Record) -> None:
        """What came of it."""
        lease.usage = record.usage
        if record.fault == "backend":
            lease.failed(BackendFailed(record.code, record.message))

    # --- another attempt

    def _second(self, ticket: Ticket) -> Ticket | None:
        """The ticket that may race this one."""
        second = self._again(ticket)
        there_is = self._dispatcher.scheduler.has_backend(second)
        return second if there_is and self._budget.take(self._now()) else None

    def _next(self, ticket: Ticket, failure: BackendFailed, record: Record) -> Ticket:
        """The ticket of a further attempt; raises the failure if there is to be none."""
        again = self._again(ticket)
        if (
            failure.code not in REPEATABLE
            or record.attempts >= self._max_attempts
            or self._now() >= min(again.deadline, again.expires)
            or not self._dispatcher.scheduler.has_backend(again)
            or not self._budget.take(self._now())
        ):
            raise failure
        record.retried(failure)
        return again

    @staticmethod
    def _again(ticket: Ticket) -> Ticket:
        """The same request, for another backend than those it has had."""
        return Ticket(
            ticket.model,
            ticket.arrived,
            tenant=ticket.tenant,
            weight=ticket.weight,
            priority=ticket.priority,
            deadline=ticket.deadline,
            expires=ticket.expires,
            size=ticket.size,
            prompt_tokens=ticket.prompt_tokens,
            max_tokens=ticket.max_tokens,
            prompt=ticket.prompt,
            session=ticket.session,
            streams=ticket.streams,
            tried=ticket.tried | {ticket.backend or ""},
        )

    # --- what was asked

    def _read(self, request: Request, record: Record) -> wire.Call:
        body = _body(request)
        endpoint = endpoint_of(record.route)
        asked = (endpoint.schema.strict if self.strict else endpoint.schema).read(body)
        _note(record, asked.model or "", asked)
        return wire.Call(endpoint, body, asked, record.request_id, self.forwardable(request))

    def _read_message(self, request: Request, record: Record) -> wire.Call:
        body = _body(request)
        asked = messages.parse(body)
        call = self._translated(request, record, asked, asked.stop_sequences or ())
        call.native = body
        return call

    def _read_prompt(self, request: Request, record: Record) -> wire.Call:
        body = _body(request)
        call = self._translated(request, record, messages.parse_prompt(body), ())
        call.body, call.generates = body, False
        return call

    def _translated(self, request: Request, record: Record, asked: messages.Prompt, stops: Sequence[str]) -> wire.Call:
        body = chat_body(asked)
        chat = CHAT.schema.read(body)
        _note(record, asked.model, chat)
        translation = Translation(record.request_id, asked.model, tuple(stops))
        headers = [pair for pair in self.forwardable(request) if pair[0] != b"x-api-key"]  # Anthropic's, not a chat backend's
        return wire.Call(CHAT, body, chat, record.request_id, headers, translation)

    def read(self, request: Request, record: Record) -> Ticket:
        """The ticket that a request would get."""
        call = self._read(request, record)
        settings = self._models.get(record.model)
        return self.ticket(request, call if settings is None else _of_model(settings, call, record), record)

    def ticket(self, request: Request, call: wire.Call, record: Record) -> Ticket:
        """What the scheduler is told of a request."""
        asked, model, now, principal = call.asked, call.asked.model or "", record.started, record.principal
        hashes = call.generates and self._dispatcher.scheduler.hashes
        header = last_of(request.requestHeaders).get
        patience = header(b"x-stainless-read-timeout")
        return Ticket(
            model,
            now,
            tenant=principal.tenant,
            weight=principal.weight,
            priority=max(_PRIORITIES.get(header(b"x-gateway-priority", b""), 1), principal.priority),
            deadline=math.inf if patience is None else now + _seconds(patience),
            expires=now + self._queue_timeout,
            size=len(call.body),
            prompt_tokens=0 if hashes or not call.generates else len(call.body) // CHARACTERS + 1,
            max_tokens=asked.most_tokens if call.generates else 0,
            prompt=blocks_of(model, asked.prompt_text()) if hashes else NO_BLOCKS,
            session=_session(header(b"x-session-id"), asked),
            streams=bool(asked.stream),
        )

    def forwardable(self, request: Request) -> list[tuple[bytes, bytes]]:
        """The headers of the client that go on to the backend."""
        return wire.forwardable(pairs_of(request.requestHeaders), authorization=self._forward_authorization)


_PRIORITIES: Final = {name.encode("ascii"): place for place, name in enumerate(PRIORITIES)}


def _body(request: Request) -> bytes:
    if request.getHeader(b"content-encoding") is not None:
        raise GatewayError("unsupported_media_type", "Send the body without Content-Encoding.")
    return body_of(request)


def _note(record: Record, model: str, asked: asking.Request) -> None:
    """What was asked for, into the record. Raises `GatewayError` model_not_allowed."""
    record.model, record.stream = model, bool(asked.stream)
    if record.principal.models is not None and not record.principal.may_use(model):
        what = f"use the model '{model[:200]}'" if model else "leave the choice of a model to the gateway: name one"
        message = f"This key may not {what}. GET /v1/models lists what it may use."
        raise GatewayError("model_not_allowed", message, param="model")


def _of_model(settings: ModelSettings, asked: wire.Call, record: Record) -> wire.Call:
    """The request as it is sent to the backends of this model. Raises `GatewayError` if it asks for what it may not."""
    record.served_model = settings.backend_model
    body = settings.applied(asked.body)
    if body is asked.body:
        call = asked
    else:
        read = (
            asked.endpoint.schema.read(body) if asked.generates else structs.replace(asked.asked, model=settings.backend_model)
        )
        native = asked.native and settings.applied(asked.native)
        call = structs.replace(asked, body=body, asked=read, native=native)
    ranges.check(call.asked, settings.ranges)
    return call


def _told(answer: Answer, call: wire.Call) -> Answer:
    """The answer in the words of its client."""
    translation = call.translation
    if translation is None or (answer.status < 400 and (answer.native or not call.generates)):
        return answer
    if answer.status >= 400:
        body = translation.refusal(answer.status, answer.body)
    else:
        try:
            body = translation.answer(answer.body, answer.usage)
        except ValueError as problem:
            message = "The backend's answer is not a chat completion."
            raise BackendFailed("backend_protocol_error", message, detail=str(problem)) from None
    kept = [pair for pair in answer.headers if pair[0].lower() != b"content-type"]
    return answer._replace(headers=[*kept, (b"content-type", b"application/json")], body=body)


async def _beating(heartbeat: Heartbeat, serving: Awaitable[None]) -> None:
    """Serve a stream that says now and then that it waits; what fails after it has said so is told in the stream."""
    try:
        await serving
    except GatewayError as error:
        if not heartbeat.begun:
            raise
        heartbeat.fail(error)
    finally:
        heartbeat.stop()


def _session(header: bytes | None, asked: asking.Request) -> str | None:
    """Whose conversation it is: as the header says, else the body. Longer names are no names."""
    session = header.decode("latin-1") if header is not None else asked.session
    return session if session and len(session) <= 256 else None


def _seconds(header: bytes) -> float:
    """The client's own patience; infinity if that is no sensible number."""
    try:
        seconds = float(header)
    except ValueError:
        return math.inf
    return seconds if 0.0 < seconds < MAX_DEADLINE else math.inf
