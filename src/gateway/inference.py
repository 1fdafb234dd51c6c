"""The life of one inference request, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Final

from twisted.web.server import Request

from .backend import Answer
from .core import wire
from .core.errors import BackendFailed, GatewayError
from .core.prefix import NO_BLOCKS, blocks_of
from .core.record import Record
from .core.retry_budget import RetryBudget
from .core.tickets import PRIORITIES, Ticket
from .dispatch import Dispatcher, Lease
from .hedge import Begun, Hedge
from .net.headers import last_of, pairs_of
from .net.request import Lines, body_of
from .probe import retry_after
from .relay import Heartbeat, MakeHeartbeat, no_heartbeat, relay

REPEATABLE: Final = frozenset(
    ["backend_unreachable", "backend_error", "backend_protocol_error", "connect_timeout", "first_byte_timeout", "idle_timeout"]
)
"""Failures after which another backend may be asked: a completion changes nothing, so asking twice costs only work."""

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
    retries; ``heartbeat`` makes the comments of streams that wait.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        now: Callable[[], float],
        budget: RetryBudget,
        *,
        forward_authorization: bool = False,
        queue_timeout: float = 30.0,
        max_attempts: int = 3,
        heartbeat: MakeHeartbeat = no_heartbeat,
        hedge: Hedge | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._now = now
        self._budget = budget
        self._forward_authorization = forward_authorization
        self._queue_timeout = queue_timeout
        self._max_attempts = max_attempts
        self._heartbeat = heartbeat
        self._hedge = hedge
        self._lines: dict[tuple[str, str, int, int], Lines] = {}

    def infer(self, request: Request, record: Record) -> Awaitable[None]:
        """Raises `GatewayError` for what fails before the first byte of the answer."""
        call = self._read(request, record)
        ticket = self.ticket(request, call, record.started)
        self._budget.requested(record.started)
        heartbeat = self._heartbeat(request, record, self._dispatcher.scheduler) if record.stream else None
        serving = self._serve(request, record, call, ticket, heartbeat)
        return serving if heartbeat is None else _beating(heartbeat, serving)

    async def _serve(
        self, request: Request, record: Record, call: wire.Call, ticket: Ticket, heartbeat: Heartbeat | None
    ) -> None:
        """One attempt after the other, until a backend answers or nothing more may be tried."""
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
                        lease.usage = reply.usage if reply.status < 400 else None  # what was refused was not worked on
                    else:
                        await relay(reply, request, record, self._now)
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
        except BaseException as problem:
            lease.end(problem)
            raise
        lease.first_byte()
        if isinstance(reply, Answer) and reply.status == 429:
            lease.rate_limited(retry_after(reply.headers) or BACKEND_PATIENCE)
        return lease, reply

    def _tell(self, request: Request, record: Record) -> None:
        """Where it went, why, and how long it waited: for whoever looks at the answer."""
        key = (record.backend, record.decision, record.attempts, int(record.queued * 1000))
        lines = self._lines.get(key) or self._make_lines(*key)
        lines.add_to(request)

    def _make_lines(self, backend: str, decision: str, attempts: int, waited: int) -> Lines:
        if len(self._lines) >= MAX_LINES:
            self._lines.clear()
        fields = {
            b"x-gateway-backend": backend.encode("ascii"),
            b"x-gateway-policy": self._dispatcher.scheduler.policy.name.encode("ascii"),
            b"x-gateway-decision": decision.encode("ascii"),
            b"x-gateway-queue-ms": b"%d" % waited,
            b"x-gateway-attempts": b"%d" % attempts,
        }
        made = self._lines[backend, decision, attempts, waited] = Lines(fields)
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
        if request.getHeader(b"content-encoding") is not None:
            raise GatewayError("unsupported_media_type", "Send the body without Content-Encoding.")
        body = body_of(request)
        chat = wire.parse_chat(body)
        record.model, record.stream = chat.model or "", bool(chat.stream)
        return wire.Call(wire.CHAT_COMPLETIONS, body, chat, record.request_id, self.forwardable(request))

    def read(self, request: Request, record: Record) -> Ticket:
        """The ticket that a request would get."""
        return self.ticket(request, self._read(request, record), record.started)

    def ticket(self, request: Request, call: wire.Call, now: float) -> Ticket:
        """What the scheduler is told of a request."""
        chat, model = call.chat, call.chat.model or ""
        hashes = self._dispatcher.scheduler.hashes
        header = last_of(request.requestHeaders).get
        patience = header(b"x-stainless-read-timeout")
        return Ticket(
            model,
            now,
            priority=_PRIORITIES.get(header(b"x-gateway-priority", b""), 1),
            deadline=math.inf if patience is None else now + _seconds(patience),
            expires=now + self._queue_timeout,
            size=len(call.body),
            prompt_tokens=0 if hashes else len(call.body) // CHARACTERS + 1,
            max_tokens=chat.most_tokens,
            prompt=blocks_of(model, chat.prompt()) if hashes else NO_BLOCKS,
            session=_session(header(b"x-session-id"), chat),
            streams=bool(chat.stream),
        )

    def forwardable(self, request: Request) -> list[tuple[bytes, bytes]]:
        """The headers of the client that go on to the backend."""
        return wire.forwardable(pairs_of(request.requestHeaders), authorization=self._forward_authorization)


_PRIORITIES: Final = {name.encode("ascii"): place for place, name in enumerate(PRIORITIES)}


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


def _session(header: bytes | None, chat: wire.ChatRequest) -> str | None:
    """Whose conversation it is: as the header says, else the body. Longer names are no names."""
    session = header.decode("latin-1") if header is not None else chat.prompt_cache_key or chat.user
    return session if session and len(session) <= 256 else None


def _seconds(header: bytes) -> float:
    """The client's own patience; infinity if that is no sensible number."""
    try:
        seconds = float(header)
    except ValueError:
        return math.inf
    return seconds if 0.0 < seconds < MAX_DEADLINE else math.inf
