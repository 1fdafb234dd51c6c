"""The life of one inference request, top to bottom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from msgspec import structs
from twisted.web.server import Request

from .backend import Answer
from .calls import Calls, told
from .core import wire
from .core.errors import BACKENDS_DOING, BackendFailed, GatewayError
from .core.model_settings import ModelSettings
from .core.principal import NO_LIMITS, Limits
from .core.record import Record, Try
from .core.retry_budget import RetryBudget
from .core.tickets import Ticket
from .core.trace_context import Trace
from .dispatch import Dispatcher, Lease
from .hedge import Begun, Hedge
from .limiter import Limiting
from .net.request import Lines
from .probe import retry_after
from .relay import Heartbeat, MakeHeartbeat, no_heartbeat, relay
from .windows import Windows

Read = Callable[[Request, Record], wire.Call]

UNAVAILABLE: Final = BACKENDS_DOING | {"no_backend", "queue_full", "queue_timeout"}
"""Failures after which another model may be asked, if the settings name one."""

UNFIT: Final = frozenset(["model_not_found", "context_length_exceeded"])
"""Failures of a model that was fallen back to which say nothing of the request."""

MAX_LINES: Final = 1024
"""Sets of headers that are kept made: backend, decision, attempts, milliseconds in the queue."""

BACKEND_PATIENCE: Final = 10.0
"""Seconds that a backend is left alone whose 429 does not say for how long."""


class Inference:
    """Takes a request to a backend and its reply back.

    ``now`` gives seconds on the monotonic clock; ``limiting`` lets a key's requests in; ``calls`` reads them;
    ``max_attempts`` and ``budget`` bound retries; ``heartbeat`` makes the comments of streams that wait; ``windows`` refuses
    what has no room in a model's window.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        now: Callable[[], float],
        budget: RetryBudget,
        limiting: Limiting,
        calls: Calls,
        *,
        max_attempts: int = 3,
        heartbeat: MakeHeartbeat = no_heartbeat,
        hedge: Hedge | None = None,
        windows: Windows | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._now = now
        self._budget = budget
        self._limiting = limiting
        self.calls = calls
        self._max_attempts = max_attempts
        self._heartbeat = heartbeat
        self._hedge = hedge
        self._windows = windows
        self._lines: dict[tuple[str, str, int, int, str], Lines] = {}

    def infer(self, request: Request, record: Record) -> Awaitable[None]:
        """What the record's route is for. Raises `GatewayError` for what fails before the first byte of the answer."""
        return self._begin(request, record, self.calls.read)

    def infer_message(self, request: Request, record: Record) -> Awaitable[None]:
        """A message of Anthropic's API, by way of a chat completion. Raises as `infer` does."""
        return self._begin(request, record, self.calls.read_message)

    def count_tokens(self, request: Request, record: Record) -> Awaitable[None]:
        """How long such a message's prompt is, asked of a backend that serves its model. Raises as `infer` does."""
        return self._begin(request, record, self.calls.read_prompt)

    def planned(self, request: Request, record: Record) -> Ticket:
        """The ticket that a request would get."""
        _, call, _ = self._asked(request, record, self.calls.read)
        return self.calls.ticket(request, call, record)

    def _asked(self, request: Request, record: Record, read: Read) -> tuple[wire.Call, wire.Call, ModelSettings | None]:
        """What was asked, the same as the backends of its model are to see it, and what the settings say of that."""
        asked = read(request, record)
        settings = self.calls.settings_of(record.model)
        return asked, asked if settings is None else self.calls.of_model(asked, settings, record), settings

    def _begin(self, request: Request, record: Record, read: Read) -> Awaitable[None]:
        try:
            asked, call, settings = self._asked(request, record, read)
        except GatewayError:
            self._limiting.tell(request, record)
            raise
        ticket = self.calls.ticket(request, call, record)
        record.session = ticket.session or ""
        fallbacks = settings.fallbacks if settings is not None else ()
        limits = self._limiting.limits_of(record.principal)
        if limits is NO_LIMITS:
            return self._let_in(request, record, asked, call, ticket, fallbacks)
        let_in = partial(self._let_in, request, record, asked, call, ticket, fallbacks)
        return self._limited(limits, request, record, call.asked.choices, ticket, let_in)

    async def _limited(
        self,
        limits: Limits,
        request: Request,
        record: Record,
        choices: int,
        ticket: Ticket,
        let_in: Callable[[], Awaitable[None]],
    ) -> None:
        """A request of a key that may not use all there is."""
        allowance = await self._limiting.allow(limits, request, record, ticket, choices)
        try:
            serving = let_in()
            del let_in  # it has the prompt
            await serving
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
        fallbacks: Sequence[str],
    ) -> Awaitable[None]:
        self._budget.requested(record.started)
        heartbeat = self._heartbeat(request, record, self._dispatcher.scheduler) if record.stream else None
        serving: Awaitable[None] = self._serve(request, record, call, ticket, heartbeat)
        if fallbacks:
            serving = self._fall_back(serving, request, record, asked, heartbeat, fallbacks)
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
        """As long as no backend can be had, one model after the other; each waits as long as a request may. One that the
        request is not for is passed over."""
        failure = await _failure_of(serving, UNAVAILABLE)
        for name in fallbacks:
            if failure is None:
                return
            try:
                call = self.calls.of_model(asked, self.calls.settings_of(name) or ModelSettings(name, name), record)
            except GatewayError:
                continue
            record.retried(failure, self._now())
            record.fell_back = True
            ticket = self.calls.ticket(request, call, record)
            ticket.expires = self._now() + self.calls.queue_timeout
            found = await _failure_of(self._serve(request, record, call, ticket, heartbeat), UNAVAILABLE | UNFIT)
            failure = failure if found is not None and found.code in UNFIT else found
        if failure is not None:
            raise failure

    async def _serve(
        self, request: Request, record: Record, call: wire.Call, ticket: Ticket, heartbeat: Heartbeat | None
    ) -> None:
        """One attempt after the other, until a backend answers or nothing more may be tried."""
        if self._windows is not None and call.generates:
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
                        await relay(reply, request, record, self._now, call)
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
        attempt: Try | None = None
        try:
            if heartbeat is not None:
                heartbeat.ticket = ticket
            backend = lease.backend or await lease.granted()
            record.chosen(ticket)
            record.attempts += 1
            attempt = Try(backend.name, lease.asked_at, lease.sent_at)
            record.tries.append(attempt)
            reply = await backend.send(call if record.trace is None else _traced(call, record.trace, len(record.tries) - 1))
            if call.translation is not None and isinstance(reply, Answer):
                reply = told(reply, call)
        except BaseException as problem:
            lease.end(problem)
            if attempt is not None:
                attempt.fail(problem, self._now())
            raise
        lease.first_byte()
        attempt.replied = lease.sent_at + lease.first_byte_seconds
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
            failure.code not in BACKENDS_DOING  # a completion changes nothing, so asking twice costs only work
            or record.attempts >= self._max_attempts
            or self._now() >= min(again.deadline, again.expires)
            or not self._dispatcher.scheduler.has_backend(again)
            or not self._budget.take(self._now())
        ):
            raise failure
        record.retried(failure, self._now())
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


async def _failure_of(serving: Awaitable[None], codes: frozenset[str]) -> GatewayError | None:
    """Why it could not be served, if that is one of these codes. Raises what else goes wrong."""
    try:
        await serving
    except GatewayError as failure:
        if failure.code not in codes:
            raise
        return failure
    return None


def _traced(call: wire.Call, trace: Trace, attempt: int) -> wire.Call:
    """The call as this attempt's backend gets it: part of our trace if we record one, else of its caller's."""
    return structs.replace(call, headers=trace.onward(call.headers, attempt)) if trace.sampled else call


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
