"""What the scheduler knows of each backend, as parallel lists: backend ``i`` is everyone's ``[i]``.

A decision looks at every backend, so what it needs is kept ready, and changed when something happens to one of them. The
times that matter most are ``drained[i]``, when the prompts there are predicted to be read, and ``floor[i]``, the seconds that
it takes at least from any time on, because the first of them is late.
"""

from __future__ import annotations

import math
from typing import Final

from .load import Load
from .prefix import PrefixIndex
from .rendezvous import Rendezvous
from .service_rate import ServiceRates, work
from .tickets import Ticket

STALE: Final = 15.0
"""Seconds after which a reported load is not believed any more."""

FULL: Final = 0.95
"""The part of a KV memory in use at which nothing more fits."""


_EVERY: Final = 8  # arrivals


class Backends:
    """Backends by place. A place that is free again is given to the next backend."""

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        """Other gateways or workers place prompts on them too."""
        self.names: list[str] = []
        self.place: dict[str, int] = {}
        self.models: list[frozenset[str] | None] = []
        self.accepting: list[bool] = []
        self.slots: list[float] = []
        self.kv_tokens: list[float] = []  # 0: not told
        self.weight: list[float] = []
        self.cost: list[float] = []
        self.inflight: list[int] = []
        self.others: list[int] = []  # requests there that are not ours, as reported
        self.reported_at: list[float] = []
        self.theirs: list[float] = []  # when prompts that are not ours, and waited there as reported, are predicted to be read
        self.crowded: list[bool] = []  # its KV memory is full, as reported
        self.busy: list[int] = []  # inflight + others
        self.decoding: list[int] = []
        self.pending: list[dict[Ticket, None]] = []  # no first token yet, in the order they were sent
        self.queued: list[float] = []  # seconds of work of those
        self.since: list[float] = []  # when the backend began with the first of those
        self.drained: list[float] = []
        self.floor: list[float] = []
        self.slope: list[float] = []  # what a token of prompt work costs there and delays others, in seconds; see `arrival`
        self.stay: list[float] = []  # what a sequence costs that stays there to decode, relative to others
        self.tokens: list[float] = []  # prompts and expected outputs of requests in flight
        self.rates = ServiceRates()
        self.index = PrefixIndex()
        self.rendezvous = Rendezvous()
        self.residence = 5.0  # seconds from a first token to the end of an answer, on average
        self.pressure = 0.0  # the part of the backends with prompts queued, as arrivals find them
        self.theta = 0.0  # what a second of prompt work costs those that come later, in seconds
        self.gamma = 0.02  # what it costs each sequence that is being decoded there
        self.packed: set[int] = set()  # those with no slot left
        self._unweighed: set[int] = set()  # those that have changed since `slope`, `stay` and `packed` were made
        self._looks = 0  # of `rates`, when they were made
        self.decode = 0.0  # what a second of `stay` costs
        self._arrivals = 0
        self.foreign = 0.0
        """The part of the requests on the backends that are not ours, as reported."""
        self._usual = 0.0  # seconds of a prompt of ours
        self.reported = False
        """Some backend told of a load that counts."""
        self._eligible: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, weight: float) -> int:
        """A place for a backend that has none yet."""
        if "" in self.names:
            i = self.names.index("")
            self.rates.forget(i, weight)
        else:
            i = self._grow(weight)
        self.names[i] = name
        self.place[name] = i
        self.rendezvous.put(i, name)
        return i

    def _grow(self, weight: float) -> int:
        self.rates.add(weight)
        self.index.add(0.0)
        self.reported_at.append(-math.inf)
        for numbers in (self.kv_tokens, self.weight, self.cost, self.theirs, self.queued, self.since, self.drained):
            numbers.append(0.0)
        for numbers in (self.floor, self.tokens, self.slope, self.stay):
            numbers.append(0.0)
        for counts in (self.inflight, self.others, self.busy, self.decoding):
            counts.append(0)
        for flags in (self.accepting, self.crowded):
            flags.append(False)
        self.slots.append(math.inf)
        self.names.append("")
        self.models.append(None)
        self.pending.append({})
        return len(self.names) - 1

    def serve(self, i: int, models: frozenset[str] | None, accepting: bool) -> None:
        """What backend ``i`` serves, and whether it does now."""
        if (self.models[i], self.accepting[i]) != (models, accepting):
            self.models[i], self.accepting[i] = models, accepting
            self._eligible.clear()

    def seat(self, i: int, slots: int | None) -> None:
        """Backend ``i`` works on so many requests at once (None: nobody knows)."""
        self.slots[i] = math.inf if slots is None else slots
        self._unweighed.add(i)

    def report(self, i: int, load: Load | None) -> None:
        """What backend ``i`` says of its load: what is more than ours are others' requests. What it said before counts as it
        did then: ours have come and gone since."""
        if load is not None and load.at == self.reported_at[i]:
            return
        self.others[i] = max(0, load.running + load.waiting - self.inflight[i]) if load else 0
        self.reported_at[i] = load.at if load else -math.inf
        self.crowded[i] = load is not None and (load.kv_usage or 0.0) >= FULL
        self.busy[i] = self.inflight[i] + self.others[i]
        self._unweighed.add(i)
        self.reported = any(self.others) or any(self.crowded)
        self.theirs[i] = 0.0
        if load is not None:
            waiting = min(load.waiting - max(len(self.pending[i]) - 1, 0), self.others[i])  # the first of ours is being read
            self.theirs[i] = load.at + max(waiting, 0) * self._usual
            if busy := sum(self.busy):
                self.foreign += 0.05 * (sum(self.others) / busy - self.foreign)

    def doubt(self, now: float) -> None:
        """Reported loads of long ago count no more."""
        if self.reported:
            for i, at in enumerate(self.reported_at):
                if now - at > STALE and (self.others[i] or self.crowded[i]):
                    self.report(i, None)

    def free(self, i: int) -> None:
        """Backend ``i`` is gone; its place is free once nothing of it is in flight."""
        self.serve(i, frozenset(), accepting=False)
        self.seat(i, None)
        self.report(i, None)
        self.index.clear(i)
        self._vacate(i)

    def _vacate(self, i: int) -> None:
        if self.place.get(self.names[i]) != i and not self.inflight[i]:
            self.names[i] = ""

    def eligible(self, model: str) -> tuple[int, ...]:
        """The accepting backends that have the model; a request that names none is for any."""
        found = self._eligible.get(model)
        if found is None:
            rows = enumerate(zip(self.accepting, self.models, strict=True))
            found = tuple(
                i for i, (accepting, models) in rows if accepting and (not model or models is None or model in models)
            )
            if len(self._eligible) >= 1024:
                self._eligible.clear()
            self._eligible[model] = found
        return found

    def waits(self, now: float) -> list[float]:
        """Seconds until each backend's prompts are predicted to be read."""
        if any(self.drained):
            rows = zip(self.drained, self.floor, strict=True)
            waits = [drained - now if drained - now > floor else floor for drained, floor in rows]
        else:
            waits = [0.0] * len(self.drained)
        if self.reported:
            return [wait + max(read - now, 0.0) for wait, read in zip(waits, self.theirs, strict=True)]
        return waits

    def opening(self, now: float, most: float) -> float:
        """When a backend that has more than ``most`` seconds of prompts before it will have less; inf: none will by itself."""
        rows = zip(self.drained, self.floor, self.theirs, strict=True)
        ends = [max(drained, read) if read > now else drained - most for drained, floor, read in rows if floor <= most]
        return min([end for end in ends if end > now], default=math.inf)

    def arrival(self) -> None:
        """A ticket has come. Every so many, look at how busy the backends are, and what that makes their work cost others."""
        self._arrivals += 1
        n = len(self.names)
        if self._arrivals % _EVERY or not n:
            return
        u = self.pressure = self.pressure + 0.02 * _EVERY * (1.0 - self.queued.count(0.0) / n - self.pressure)
        self.theta = min(2.0, 0.25 * u / max(1e-3, 1.0 - u))
        self.gamma = max(0.02, 0.06 * u)
        self.decode = 0.06 * self.residence * n * n / ((n + sum(self.busy)) * sum(self.rates.seconds))
        self._unweighed.update(range(n))

    def weigh(self) -> None:
        """Bring `slope`, `stay` and `packed` up to date: only a choice among several looks at them."""
        if self._looks != self.rates.looks:
            self._looks = self.rates.looks
            self._unweighed.update(range(len(self.names)))
        for i in self._unweighed:
            seconds = self.rates.seconds[i]
            self.slope[i] = seconds * (1.0 + self.theta + self.gamma * self.decoding[i])
            self.stay[i] = seconds * (self.busy[i] + 1)
            if self.busy[i] >= self.slots[i]:
                self.packed.add(i)
            elif self.packed:
                self.packed.discard(i)
        self._unweighed.clear()

    def bind(self, i: int, ticket: Ticket, now: float) -> None:
        """The ticket goes to backend ``i``; its ``seconds`` and ``tokens`` are set."""
        pending = self.pending[i]
        self.inflight[i] += 1
        self.busy[i] += 1
        self.tokens[i] += ticket.tokens
        self._usual += 0.02 * (ticket.seconds - self._usual)
        self._unweighed.add(i)
        if pending:
            self._settle(i, now)
        pending[ticket] = None
        if len(pending) == 1:
            self.since[i] = now
            self.queued[i] = ticket.seconds
            self.drained[i] = now + ticket.seconds
            self.floor[i] = 0.0
        else:
            self.queued[i] += ticket.seconds
            self._predict(i)

    def first_token(self, i: int, ticket: Ticket, now: float) -> None:
        """Backend ``i`` has read the ticket's prompt."""
        self._settle(i, now)
        if ticket in self.pending[i]:
            ticket.started = max(self.since[i], ticket.granted_at)
            ticket.overlapped = max(self.since[i] - ticket.granted_at, 0.0)
            ticket.told = True
            self._read(i, ticket, now)
            self._predict(i)
            self._unweighed.add(i)

    def release(self, i: int, ticket: Ticket, now: float) -> None:
        """Backend ``i`` is done with the ticket."""
        pending = self.pending[i]
        if pending:
            self._settle(i, now)
            if ticket in pending:
                first = next(iter(pending)) is ticket
                self._read(i, ticket, now if first else self.since[i])
                ticket.first_token_at = None
            self._predict(i)
        self.decoding[i] -= 1
        self.busy[i] -= 1
        self.inflight[i] = left = self.inflight[i] - 1
        self.tokens[i] = self.tokens[i] - ticket.tokens if left else 0.0
        self._unweighed.add(i)
        if self.place.get(self.names[i]) != i:
            self._vacate(i)

    def _settle(self, i: int, now: float) -> None:
        """Nobody tells when a prompt is read whose answer is not streamed: it is taken to be when that was predicted."""
        pending = self.pending[i]
        while pending:
            head = next(iter(pending))
            if head.streams or now - self.since[i] < head.seconds:
                return
            self._read(i, head, self.since[i] + head.seconds)

    def _read(self, i: int, ticket: Ticket, now: float) -> None:
        del self.pending[i][ticket]
        self.queued[i] = self.queued[i] - ticket.seconds if self.pending[i] else 0.0
        self.since[i] = now
        self.decoding[i] += 1
        ticket.first_token_at = now

    def _predict(self, i: int) -> None:
        pending = self.pending[i]
        if pending:
            head = next(iter(pending))
            self.drained[i] = self.since[i] + self.queued[i]
            self.floor[i] = max(self.queued[i] - head.seconds, 0.0) if head.streams else 0.0
        else:
            self.drained[i] = self.floor[i] = 0.0

    def seconds(self, i: int, prompt: int, cached: int) -> float:
        """Backend ``i``'s time to read a prompt of which it has so much cached."""
        return work(prompt - cached, cached) * self.rates.seconds[i]
