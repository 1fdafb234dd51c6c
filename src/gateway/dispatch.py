"""The awaitable face of the scheduler: a request asks for a backend, waits for it if it must, and gives it back.

`core.scheduler` decides; this has its clock and its timers, and tells the pool how each attempt ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from .backend import Answer, Backend
from .core.errors import BackendFailed, GatewayError
from .core.look import Candidate
from .core.scheduler import Scheduler
from .core.status import Offer
from .core.tickets import Hopeless, QueueFull, Ticket
from .core.usage import Usage
from .pool import Pool, Sent

LIKE_TOKENS: Final = 256.0
"""A request costs a backend something before its first token even without a prompt: as much as so many tokens do."""

OUTPUT: Final = 30.0
"""Tokens of a prompt that are read in the time that one token of an answer takes, about."""

SOONEST: Final = 0.001
"""Seconds until the scheduler is asked again, if it wants to be asked at once."""


class Lease:
    """One attempt's hold on a backend, or its place in the queue, until `end`, which a ``with`` block calls too.

    ``usage`` is what the attempt used, once that is known.
    """

    backend: Backend | None = None
    usage: Usage | None = None
    first_byte_seconds = 0.0
    sent: Sent
    """As the pool knows it, once there is a backend."""
    asked_at = 0.0
    sent_at = 0.0
    _patience: float | None = None
    _failure: BackendFailed | None = None
    _refusal: GatewayError | None = None
    _waiting: Deferred[Backend] | None = None

    def __init__(self, dispatcher: Dispatcher, ticket: Ticket) -> None:
        self._dispatcher = dispatcher
        self.ticket = ticket

    # --- before there is a backend

    def granted(self) -> Deferred[Backend]:
        """Fires with the backend when there is one for it. Fails with `GatewayError` queue_timeout."""
        self._waiting = Deferred()
        if self._refusal is not None:
            self._waiting.errback(self._refusal)
        return self._waiting

    def refuse(self, refusal: GatewayError) -> None:
        """There will be no backend for it."""
        self._refusal = refusal
        if self._waiting is not None:
            self._waiting.errback(refusal)

    def bind(self, backend: Backend, now: float) -> None:
        """The scheduler has given it a backend."""
        self.backend = backend
        self.sent_at = now
        self.sent = self._dispatcher.pool.sent(backend.name)

    def wake(self) -> None:
        """Tell who waits for the backend."""
        if self._waiting is not None and self.backend is not None:
            self._waiting.callback(self.backend)

    # --- while it works

    def first_byte(self) -> None:
        """The backend has begun to answer; a stream's first byte is its first token."""
        now = self._dispatcher.now()
        self.first_byte_seconds = now - self.sent_at
        if self.ticket.streams:
            self._dispatcher.first_token(self, now)

    def failed(self, failure: BackendFailed) -> None:
        """The backend failed after its answer had begun."""
        self._failure = failure

    def rate_limited(self, seconds: float) -> None:
        """The backend answered 429: it wants no more for so long."""
        self._patience = seconds

    # --- the end

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        self.end(problem)

    def end(self, problem: BaseException | None = None) -> None:
        """Give it back. A ``problem`` is the backend's (`BackendFailed`), or nobody's: a client that left, say."""
        if isinstance(problem, BackendFailed):
            self._failure = problem
        whole = problem is None and self._failure is None and self._patience is None
        self._dispatcher.end(self, self.usage if whole else None, cancelled=problem is not None)

    def tell(self, pool: Pool, *, cancelled: bool) -> None:
        """How it ended, to the pool."""
        if self._failure is not None:
            pool.failed(self.sent, self._failure)
        elif cancelled:
            pool.cancelled(self.sent)
        elif self._patience is not None:
            pool.rate_limited(self.sent, self._patience)
        else:
            pool.succeeded(self.sent, self.first_byte_seconds)


class Dispatcher:
    """Leases backends. ``scheduler`` decides which and when; ``pool`` says what there is, and is told how things went.
    ``backends`` are those of the pool by name, at any time."""

    def __init__(self, scheduler: Scheduler, pool: Pool, backends: Mapping[str, Backend], clock: IReactorTime) -> None:
        self.pool = pool
        self.scheduler = scheduler
        self.now = clock.seconds
        self._backends = backends
        self._clock = clock
        self._waiting: dict[Ticket, Lease] = {}
        self._restarts: dict[str, int] = {}
        self._wake: IDelayedCall | None = None
        pool.watch(self._offered, self._left, self._settled)

    def _offered(self, offer: Offer) -> None:
        """Something about a backend has changed."""
        now = self.now()
        if offer.restarts > self._restarts.get(offer.name, 0):
            self.scheduler.forget_cache(offer.name)
        self._restarts[offer.name] = offer.restarts
        self.scheduler.set_backend(
            offer.name,
            now,
            models=offer.models,
            accepting=offer.accepting,
            slots=offer.slots,
            kv_tokens=offer.kv_tokens,
            weight=offer.weight,
            cost=offer.cost_factor,
            load=offer.load,
        )

    def _left(self, name: str) -> None:
        """A backend gets no more requests; those that it has are still released."""
        self.scheduler.remove_backend(name, self.now())
        self._restarts.pop(name, None)

    def _settled(self) -> None:
        """All that has changed at once is known."""
        if self._waiting:
            self._give_up()
            self._pass(self.now())

    def _give_up(self) -> None:
        """Of those that wait, some may have nothing to wait for any more."""
        for ticket, lease in list(self._waiting.items()):
            if self._is_hopeless(ticket):
                self._drop(ticket, self.now())
                lease.refuse(self._nobody(ticket))

    def _is_hopeless(self, ticket: Ticket) -> bool:
        """No backend is there for it, and none will be soon."""
        return not self.scheduler.has_backend(ticket) and not self.pool.is_warming(ticket.model)

    # --- one attempt

    def lease(self, ticket: Ticket) -> Lease:
        """A backend at once, or a place in the queue. Raises `GatewayError`: queue_full, queue_timeout (it would be late),
        no_backend, model_not_found."""
        lease, now = Lease(self, ticket), self.now()
        lease.asked_at = now
        try:
            if self.scheduler.submit(ticket, now):
                lease.bind(self._backends[ticket.backend or ""], now)
                return lease
        except QueueFull as full:
            raise GatewayError("queue_full", "The gateway's queue is full.", retry_after=full.retry_after) from None
        except Hopeless as late:
            message = "The request would not be served before its deadline."
            raise GatewayError("queue_timeout", message, retry_after=late.retry_after) from None
        self._waiting[ticket] = lease
        self._refuse_displaced(now)
        if self._is_hopeless(ticket):
            self._drop(ticket, now)
            raise self._nobody(ticket)
        self._pass(now)
        return lease

    def _refuse_displaced(self, now: float) -> None:
        """Of those that waited, some have lost their places."""
        for ticket in self.scheduler.displaced():
            waiting = self._waiting.pop(ticket, None)  # None: its request ended when another attempt of it lost its place
            if waiting is not None:
                message = "The gateway's queue is full, and requests of a higher priority have come."
                waiting.refuse(GatewayError("queue_full", message, retry_after=self.retry_after(ticket, now)))

    def _nobody(self, ticket: Ticket) -> GatewayError:
        if not self.scheduler.knows_model(ticket.model) and not self.pool.may_come(ticket.model):
            what = f"The model '{ticket.model[:200]}' does not exist: GET /v1/models lists those that do."
            return GatewayError("model_not_found", what, param="model")
        return GatewayError("no_backend", "No backend is there for this model now.", retry_after=self.pool.soonest())

    def first_token(self, lease: Lease, now: float) -> None:
        """A stream's first token has come."""
        ticket = lease.ticket
        self.scheduler.first_token(ticket, now)
        if self.pool.adaptive:
            self.pool.first_token(lease.sent, lease.first_byte_seconds, _to_read(ticket))
        if self._waiting:
            self._pass(now)

    def end(self, lease: Lease, usage: Usage | None, *, cancelled: bool) -> None:
        """The attempt is over, or waits no longer."""
        ticket, now = lease.ticket, self.now()
        if lease.backend is None:
            self._drop(ticket, now)
            return
        self.scheduler.release(ticket, now, usage)
        if self.pool.adaptive and usage is not None and not ticket.streams:  # how long all of it took, at least, was seen
            expected = _to_read(ticket) + OUTPUT * usage.completion_tokens
            self.pool.first_token(lease.sent, now - lease.sent_at, expected)
        lease.tell(self.pool, cancelled=cancelled)
        if self._waiting:
            self._pass(now)

    # --- those that wait

    def _drop(self, ticket: Ticket, now: float) -> None:
        self._waiting.pop(ticket, None)
        self.scheduler.withdraw(ticket, now)

    def _pass(self, now: float) -> None:
        """Bind what can be bound; who waits is told in the same turn, one after the other."""
        for ticket in self.scheduler.expire(now):
            lease = self._waiting.pop(ticket)
            message = "No backend was free before the request's time in the queue was over."
            lease.refuse(GatewayError("queue_timeout", message, retry_after=self.retry_after(ticket, now)))
        granted = [(ticket, self._waiting.pop(ticket)) for ticket in self.scheduler.schedule(now)]
        for ticket, lease in granted:
            lease.bind(self._backends[ticket.backend or ""], now)
        for _, lease in granted:
            lease.wake()
        self._await_time()

    def _await_time(self) -> None:
        """Come back when time alone changes something."""
        now = self.now()
        when = self.scheduler.next_wake(now) if self._waiting else None
        self.close()
        if when is not None:
            self._wake = self._clock.callLater(max(when - now, SOONEST), self._woken)

    def _woken(self) -> None:
        self._wake = None
        self._pass(self.now())

    def close(self) -> None:
        """No timer is left."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None

    # --- questions

    def retry_after(self, ticket: Ticket, now: float) -> float:
        """Seconds after which the queue may have come to such a ticket, by the rate at which it drains."""
        return self.scheduler.position(ticket, now)[1] or 1.0

    async def ask_models(self, headers: list[tuple[bytes, bytes]]) -> Answer:
        """The models that the first backend lists for a client with these headers. Raises `BackendFailed`."""
        return await next(iter(self._backends.values())).models(headers)

    def explain(self, ticket: Ticket) -> list[Candidate]:
        """What speaks for and against each backend, the best first. Nothing is changed."""
        return self.scheduler.explain(ticket, self.now())


def _to_read(ticket: Ticket) -> float:
    """What the ticket's first token takes, in tokens of its prompt."""
    return ticket.prompt_tokens - ticket.cached_tokens + LIKE_TOKENS
