"""The scheduler: events in, grants out. It holds the tickets that wait, and binds each to a backend as late as is good.

Nothing here waits, calls back or reads a clock: ``now`` is an argument (seconds, monotonic), and every method returns at
once. Call `schedule` after every event but a `submit` that said True, and when `next_wake` says.
"""

from __future__ import annotations

import math
from typing import Final

from .admission import AdmissionQueue
from .backends import Backends
from .fair import Accounts
from .policy import Policy, cached_tokens
from .prefix import PrefixIndex
from .service_rate import work
from .tickets import Bounds, Hopeless, Load, QueueFull, Ticket
from .usage import Usage

TAU: Final = 0.3
"""Seconds of prompt work that a backend may have before it; about one step of an engine."""

SCAN: Final = 64
"""Tickets looked at in one pass."""

LONGEST: Final = 120.0
"""Seconds: clients do not obey a longer Retry-After."""


class Scheduler:
    """One pool of backends, one queue in front of it, one policy."""

    def __init__(self, policy: Policy, bounds: Bounds = Bounds()) -> None:
        self.policy = policy
        self.backends = Backends()
        self.accounts = Accounts()
        self.queue = AdmissionQueue(bounds, self.accounts)

    def set_backend(
        self,
        name: str,
        now: float,
        *,
        models: frozenset[str] | None = None,
        accepting: bool = True,
        slots: int | None = None,
        kv_tokens: int | None = None,
        weight: float = 1.0,
        cost: float = 1.0,
        load: Load | None = None,
    ) -> None:
        """A backend is there, or something about it is new."""
        b = self.backends
        i = b.place.get(name, -1)
        if i < 0:
            i = b.add(name, weight)
        b.set(i, models, accepting, slots, kv_tokens, weight, cost)
        b.report(i, load)

    def remove_backend(self, name: str, now: float) -> None:
        """The backend gets no more tickets; those it has may still be released."""
        i = self.backends.place.pop(name, -1)
        if i >= 0:
            self.backends.free(i)

    def forget_cache(self, name: str) -> None:
        """The backend restarted: its cache is empty."""
        self.backends.index.clear(self.backends.place[name])

    def submit(self, ticket: Ticket, now: float) -> bool:
        """True: the ticket is bound (``ticket.backend``). False: it waits. Raises `QueueFull` or `Hopeless`."""
        self._estimate(ticket)
        if not self.queue:
            i = self._choose(ticket, self.backends.waits(now))
            if i >= 0:
                self._bind(ticket, i, now)
                return True
        if not self.queue.fits(ticket):
            raise QueueFull(1.0)
        ticket.key = ticket.arrived
        self.queue.put(ticket)
        return False

    def withdraw(self, ticket: Ticket, now: float) -> None:
        """The ticket's client left while it waited."""
        if ticket.waiting:
            self.queue.remove(ticket)

    def first_token(self, ticket: Ticket, now: float) -> None:
        """The backend has read the ticket's prompt."""
        self.backends.first_token(ticket.lane, ticket, now)

    def release(self, ticket: Ticket, now: float, usage: Usage | None) -> None:
        """The ticket's backend is done with it; ``usage`` is None if it failed or was cancelled."""
        self.backends.release(ticket.lane, ticket, now)

    def schedule(self, now: float) -> list[Ticket]:
        """The tickets that are bound now."""
        granted: list[Ticket] = []
        if not self.queue:
            return granted
        models = {model for model in self.queue.models() if self.backends.eligible(model)}
        for ticket in list(self.queue.scan(models, now, lambda ticket: ticket.tokens / ticket.weight)):
            i = self._choose(ticket, self.backends.waits(now))
            if i >= 0:
                self.queue.remove(ticket)
                self._bind(ticket, i, now)
                granted.append(ticket)
        return granted

    def expire(self, now: float) -> list[Ticket]:
        """Tickets whose deadline has passed while they waited; they are out of the queue."""
        return self.queue.expire(now)

    def next_wake(self, now: float) -> float | None:
        """When `expire` or `schedule` has something to do, if no event comes before."""
        due = self.queue.due()
        return None if due == math.inf else due

    def knows_model(self, model: str) -> bool:
        """Some backend has the model, accepting or not."""
        b = self.backends
        return any(b.models[i] is None or model in (b.models[i] or ()) for i in b.place.values())

    def has_backend(self, ticket: Ticket) -> bool:
        """Some accepting backend has the model and has not been tried."""
        return any(self.backends.names[i] not in ticket.tried for i in self.backends.eligible(ticket.model))

    def position(self, ticket: Ticket, now: float) -> tuple[int, float | None]:
        """How many waiting tickets are before it, and the seconds until its turn (None: nobody knows yet)."""
        return self.queue.ahead(ticket), None

    def _estimate(self, ticket: Ticket) -> None:
        ticket.matches = self.backends.index.match(ticket.prompt)
        ticket.tokens = ticket.prompt_tokens + min(ticket.max_tokens or 256, 256)

    def _choose(self, ticket: Ticket, waits: list[float]) -> int:
        b = self.backends
        may = [i for i in b.eligible(ticket.model) if b.names[i] not in ticket.tried and b.busy[i] < b.slots[i]]
        if not may:
            return -1
        costs = self.policy.costs(ticket, b, waits)
        return min(may, key=costs.__getitem__)

    def _bind(self, ticket: Ticket, i: int, now: float) -> None:
        b = self.backends
        ticket.lane, ticket.backend, ticket.granted_at = i, b.names[i], now
        depth = dict(ticket.matches).get(i, 0)
        ticket.known = depth
        ticket.cached_tokens = cached_tokens(ticket, depth)
        ticket.seconds = b.seconds(i, ticket.prompt_tokens, ticket.cached_tokens)
        ticket.decision = self.policy.why(ticket, i, b)
        b.bind(i, ticket, now)
        b.index.insert(i, ticket.prompt, depth)
