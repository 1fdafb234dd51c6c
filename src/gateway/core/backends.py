"""What the scheduler knows of each backend, as parallel lists: backend ``i`` is everyone's ``[i]``.

A decision looks at every backend, so what it needs is kept ready, and changed when something happens to one of them.
"""

from __future__ import annotations

import math
from typing import Final

from .prefix import PrefixIndex
from .service_rate import ServiceRates, work
from .tickets import Load, Ticket

STALE: Final = 15.0
"""Seconds after which a reported load is not believed any more."""

UNKNOWN_CACHE: Final = 1_500_000
"""Tokens that a cache of unknown size is thought to hold, until usage shows how many it does."""


class Backends:
    """Backends by place. A place that is free again is given to the next backend."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.place: dict[str, int] = {}
        self.models: list[frozenset[str] | None] = []
        self.accepting: list[bool] = []
        self.slots: list[float] = []
        self.kv_tokens: list[float] = []
        self.sized: list[bool] = []  # the size of the cache was told, not learned
        self.weight: list[float] = []
        self.cost: list[float] = []
        self.inflight: list[int] = []
        self.others: list[int] = []  # requests there that are not ours, as reported
        self.others_at: list[float] = []
        self.busy: list[int] = []  # inflight + others
        self.decoding: list[int] = []
        self.pending: list[dict[Ticket, None]] = []  # no first token yet, in the order they were sent
        self.queued: list[float] = []  # seconds of work of those
        self.since: list[float] = []  # when the backend began with the first of those
        self.tokens: list[float] = []  # outstanding work: prompts and expected outputs of requests in flight
        self.rates = ServiceRates()
        self.index = PrefixIndex()
        self.units_per_token = 1.0
        self._eligible: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, weight: float) -> int:
        """A place for a backend that has none yet."""
        if "" in self.names:
            i = self.names.index("")
            self.rates.forget(i, weight)
        else:
            i = len(self.names)
            self.rates.add(weight)
            self.index.add(0.0)
            for row in (
                self.slots,
                self.kv_tokens,
                self.weight,
                self.cost,
                self.others_at,
                self.queued,
                self.since,
                self.tokens,
            ):
                row.append(0.0)
            for counts in (self.inflight, self.others, self.busy, self.decoding):
                counts.append(0)
            self.names.append("")
            self.models.append(None)
            self.accepting.append(False)
            self.sized.append(False)
            self.pending.append({})
        self.names[i] = name
        self.place[name] = i
        return i

    def set(
        self,
        i: int,
        models: frozenset[str] | None,
        accepting: bool,
        slots: int | None,
        kv_tokens: int | None,
        weight: float,
        cost: float,
    ) -> None:
        """What is told of backend ``i``."""
        if (self.models[i], self.accepting[i]) != (models, accepting):
            self.models[i], self.accepting[i] = models, accepting
            self._eligible.clear()
        self.slots[i] = math.inf if slots is None else slots
        self.weight[i], self.cost[i] = weight, cost
        told = kv_tokens is not None
        if told != self.sized[i] or (told and kv_tokens != self.kv_tokens[i]) or not self.kv_tokens[i]:
            self.sized[i] = told
            self.resize(i, kv_tokens or UNKNOWN_CACHE)

    def resize(self, i: int, kv_tokens: float) -> None:
        """Backend ``i``'s cache holds so many tokens."""
        self.kv_tokens[i] = kv_tokens
        self.index.resize(i, kv_tokens * self.units_per_token)

    def report(self, i: int, load: Load | None) -> None:
        """What backend ``i`` says of its load: what is more than ours are others' requests."""
        self.others[i] = max(0, load.running + load.waiting - self.inflight[i]) if load else 0
        self.others_at[i] = load.at if load else 0.0
        self.busy[i] = self.inflight[i] + self.others[i]

    def doubt(self, now: float) -> None:
        """Reported loads of long ago count no more."""
        for i, others in enumerate(self.others):
            if others and now - self.others_at[i] > STALE:
                self.report(i, None)

    def free(self, i: int) -> None:
        """Backend ``i`` is gone; its place is free once nothing of it is in flight."""
        self.accepting[i] = False
        self._eligible.clear()
        self.report(i, None)
        self.index.clear(i)
        self.vacate(i)

    def vacate(self, i: int) -> None:
        """Let a removed backend's place be used again if nothing is in flight there."""
        if self.place.get(self.names[i]) != i and not self.inflight[i]:
            self.names[i] = ""
            self.kv_tokens[i] = 0.0

    def eligible(self, model: str) -> tuple[int, ...]:
        """The accepting backends that have the model."""
        found = self._eligible.get(model)
        if found is None:
            found = tuple(
                i for i, models in enumerate(self.models) if self.accepting[i] and (models is None or model in models)
            )
            if len(self._eligible) >= 1024:
                self._eligible.clear()
            self._eligible[model] = found
        return found

    def waits(self, now: float) -> list[float]:
        """Seconds until each backend's prompt queue is predicted to be empty."""
        return [0.0 if not queued else self.wait(i, now) for i, queued in enumerate(self.queued)]

    def wait(self, i: int, now: float) -> float:
        """The same for one backend. A prompt that should be done, and is not, takes no more time from now on."""
        pending = self.pending[i]
        if not pending:
            return 0.0
        head = next(iter(pending))
        passed = now - self.since[i]
        while passed >= head.seconds and not head.streams:  # nobody tells: take it as done
            self._done(i, head)
            self.since[i] += head.seconds
            head.first_token_at = self.since[i]
            self.decoding[i] += 1
            if not pending:
                return 0.0
            head = next(iter(pending))
            passed = now - self.since[i]
        return self.queued[i] - min(passed, head.seconds)

    def bind(self, i: int, ticket: Ticket, now: float) -> None:
        """The ticket goes to backend ``i``; its ``seconds``, ``cached_tokens`` and ``known`` are set."""
        pending = self.pending[i]
        if not pending:
            self.since[i] = now
        pending[ticket] = None
        self.queued[i] += ticket.seconds
        self.inflight[i] += 1
        self.busy[i] += 1
        self.tokens[i] += ticket.tokens

    def first_token(self, i: int, ticket: Ticket, now: float) -> None:
        """The ticket's prompt is read."""
        if ticket.first_token_at is not None:
            return
        if ticket in self.pending[i]:
            ticket.started = max(self.since[i], ticket.granted_at)
            ticket.overlapped = max(self.since[i] - ticket.granted_at, 0.0)
            self._done(i, ticket)
            self.since[i] = now
        ticket.first_token_at = now
        self.decoding[i] += 1

    def release(self, i: int, ticket: Ticket, now: float) -> None:
        """The ticket is done there."""
        if ticket in self.pending[i]:
            if next(iter(self.pending[i])) is ticket:
                self.since[i] = now
            self._done(i, ticket)
        if ticket.first_token_at is not None:
            self.decoding[i] -= 1
        self.inflight[i] -= 1
        self.busy[i] -= 1
        self.tokens[i] -= ticket.tokens
        if not self.inflight[i]:
            self.tokens[i] = 0.0
            self.vacate(i)

    def _done(self, i: int, ticket: Ticket) -> None:
        del self.pending[i][ticket]
        self.queued[i] = self.queued[i] - ticket.seconds if self.pending[i] else 0.0

    def seconds(self, i: int, prompt: int, cached: int) -> float:
        """Backend ``i``'s time to read a prompt of which it has so much cached."""
        return work(prompt - cached, cached) * self.rates.seconds[i]
