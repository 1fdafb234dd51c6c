"""The scheduler: events in, grants out. It holds the tickets that wait, and binds each to a backend as late as is good.

Nothing here waits, calls back or reads a clock: ``now`` is an argument (seconds, monotonic), and every method returns at
once. Call `schedule` after every event but a `submit` that said True, and when `next_wake` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from .admission import AdmissionQueue
from .backends import Backends
from .fair import Accounts
from .feedback import Feedback
from .load import Load
from .look import Candidate, Snapshot
from .policy import Policy, cached_tokens
from .tickets import BOUNDS, PRIORITIES, Bounds, Hopeless, QueueFull, Ticket
from .usage import Usage

TAU: Final = 0.1
"""Seconds of prompts that a backend may have before it and still get more: about half a step of an engine."""

SCAN: Final = 64
"""Tickets looked at in one pass."""

LONGEST: Final = 120.0
"""Seconds: clients do not obey a longer Retry-After."""

LEAST_B: Final = 4.0
"""A waiting ticket whose prompt takes s seconds is passed by tickets that come up to b * s seconds later; the least b."""

GROWTH: Final = 0.5
"""Of b, for each prompt of usual size that waits before a new one on its backend."""

DOUBT: Final = 2.0
"""A ticket is hopeless if it would be late even if things went this many times faster than predicted."""

CARE: Final = 1.5
"""A ticket waits no longer once it would be late if it took this many times what is predicted: in an overload those before
the others have waited longest, and all of them would be answered a moment too late."""


class Scheduler:
    """One pool of backends, one queue in front of it, one policy. ``shared``: other schedulers send prompts to the same pool,
    and are to choose the same backend for one that neither knows."""

    def __init__(self, policy: Policy, bounds: Bounds = BOUNDS, *, shared: bool = False) -> None:
        self.policy = policy
        self.backends = Backends(shared=shared)
        self.accounts = Accounts()
        self.queue = AdmissionQueue(bounds, self.accounts)
        self.feedback = Feedback(self.backends)
        self._turn = 0
        self._displaced: list[Ticket] = []
        self._usual = 0.5  # seconds of prompt work of those that waited, on average

    # The pool

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
        """A backend is there, or something about it is new. ``models`` None: it takes any; ``slots`` and ``kv_tokens`` None:
        not known; ``cost``: of its class of device."""
        backends = self.backends
        i = backends.place.get(name, -1)
        if i < 0:
            i = backends.add(name, weight)
            self.feedback.forget(i)
        if backends.weight[i] != weight:
            backends.rates.expect(i, weight)
        backends.weight[i], backends.cost[i] = weight, cost
        backends.serve(i, models, accepting)
        backends.seat(i, slots)
        backends.report(i, load)
        self.feedback.tell_size(i, kv_tokens or 0)

    def remove_backend(self, name: str, now: float) -> None:
        """The backend gets no more tickets; those it has are still released."""
        i = self.backends.place.pop(name, -1)
        if i >= 0:
            self.backends.free(i)

    def forget_cache(self, name: str) -> None:
        """The backend restarted: its cache is empty, and it may be as fast as it likes."""
        i = self.backends.place[name]
        self.backends.index.clear(i)
        self.backends.rates.forget(i, self.backends.weight[i])

    # Events

    def submit(self, ticket: Ticket, now: float) -> bool:
        """True: the ticket is bound. False: it waits. Raises `QueueFull`, or `Hopeless` if it would miss its deadline."""
        backends, queue = self.backends, self.queue
        if backends.reported:
            backends.doubt(now)
        self.feedback.estimate(ticket)
        if ticket.prompt.keys:
            self._match(ticket)
        waits = backends.waits(now)
        if len(waits) > 1:
            backends.arrival()
        if not queue.lines:
            i = self._place(ticket, waits)
            if i >= 0 and self._open(i, waits):
                if ticket.deadline < math.inf:
                    self._refuse_if_hopeless(ticket, self._seconds(ticket, i), waits[i], now)
                self._bind(ticket, i, now)
                return True
        self._admit(ticket, waits, now)
        return False

    def displaced(self) -> list[Ticket]:
        """Tickets that wait no longer, as those submitted since the last call have taken their places. Ask after a `submit`."""
        displaced, self._displaced = self._displaced, []
        return displaced

    def withdraw(self, ticket: Ticket, now: float) -> None:
        """The ticket's client has left; nothing happens if it does not wait."""
        if ticket.waiting:
            self.queue.remove(ticket)

    def first_token(self, ticket: Ticket, now: float) -> None:
        """The backend has read the ticket's prompt."""
        self.backends.first_token(ticket.lane, ticket, now)

    def release(self, ticket: Ticket, now: float, usage: Usage | None) -> None:
        """The backend is done with the ticket. ``usage`` is None if it failed or was cancelled."""
        self.backends.release(ticket.lane, ticket, now)
        used = self.feedback.learn(ticket, now, usage)
        self.accounts.charge(ticket.tenant, ticket.weight, used - ticket.charged)

    def schedule(self, now: float) -> list[Ticket]:
        """The tickets that get a backend now, in order."""
        queue, backends = self.queue, self.backends
        if not queue.lines:
            return []
        if backends.reported:
            backends.doubt(now)
        waits = backends.waits(now)
        ready = {i for i in range(len(waits)) if self._open(i, waits)}
        models = {model for model in queue.models() if not ready.isdisjoint(backends.eligible(model))} if ready else set()
        granted: list[Ticket] = []
        if not models:
            return granted
        planned = waits[:]  # as if every ticket before had gone to its best backend
        for ticket in queue.scan(models, now, SCAN):
            self._match(ticket)
            i = self._place(ticket, planned)
            if i < 0:
                continue
            if i in ready:
                self._bind(ticket, i, now)
                granted.append(ticket)
                waits[i] += ticket.seconds
                if not self._open(i, waits):
                    ready.discard(i)
                    if not ready:
                        break
            planned[i] += self._seconds(ticket, i)
        for ticket in granted:
            queue.serve(ticket, now)
        return granted

    def expire(self, now: float) -> list[Ticket]:
        """Tickets that waited until they expired, or would be late from now on; they wait no longer."""
        return self.queue.expire(now)

    def next_wake(self, now: float) -> float | None:
        """When `expire` or `schedule` has something to do, if no event comes before; None: never."""
        if not self.queue.lines:
            return None
        due = min(self.queue.due(), self.backends.opening(now, TAU))
        return None if due == math.inf else due

    # Questions

    @property
    def hashes(self) -> bool:
        """`Ticket.prompt` is of use: the policy looks at it, and there is more than one backend."""
        return self.policy.hashes and len(self.backends.place) > 1

    def knows_model(self, model: str) -> bool:
        """Some backend has the model, whether it is accepting or not."""
        models = self.backends.models
        return not model or any(models[i] is None or model in (models[i] or ()) for i in self.backends.place.values())

    def has_backend(self, ticket: Ticket) -> bool:
        """Some accepting backend has the ticket's model, and has not been tried."""
        return any(self.backends.names[i] not in ticket.tried for i in self.backends.eligible(ticket.model))

    def position(self, ticket: Ticket, now: float) -> tuple[int, float | None]:
        """How many tickets are before a waiting one, and the seconds until its turn; None: too few have been served yet."""
        ahead = self.queue.ahead(ticket)
        return ahead, self.queue.seconds_for(ahead + 1)

    def explain(self, ticket: Ticket, now: float) -> list[Candidate]:
        """What each backend would cost the ticket, the best first; nothing is changed but the ticket's estimates."""
        backends = self.backends
        self.feedback.estimate(ticket)
        ticket.matches = backends.index.match(ticket.prompt)
        waits = backends.waits(now)
        depths = dict(ticket.matches)
        backends.weigh()
        costs = self.policy.costs(ticket, backends, waits)
        candidates = [
            Candidate(name, costs[i], cached_tokens(ticket, depths.get(i, 0)), waits[i], self._why_not(ticket, i, waits))
            for name, i in backends.place.items()
        ]
        return sorted(candidates, key=lambda candidate: (bool(candidate.why_not), candidate.cost))

    def snapshot(self) -> Snapshot:
        """The numbers as they are now. A backend that is gone holds requests until they end."""
        backends, feedback = self.backends, self.feedback
        inflight = dict.fromkeys(backends.place, 0)
        for name, held in zip(backends.names, backends.inflight, strict=True):
            if held:
                inflight[name] = inflight.get(name, 0) + held
        return Snapshot(
            dict(zip(PRIORITIES, self.queue.depth, strict=True)),
            self.queue.bytes,
            inflight,
            {name: int(backends.index.size[i] / feedback.units_per_token) for name, i in backends.place.items()},
            feedback.predicted,
            feedback.actual,
            dict(self.accounts.served),
            self.queue.tenants(),
        )

    # How

    def _match(self, ticket: Ticket) -> None:
        index = self.backends.index
        if ticket.version != index.version:
            ticket.matches, ticket.version = index.match(ticket.prompt), index.version

    def _admit(self, ticket: Ticket, waits: Sequence[float], now: float) -> None:
        """Let the ticket wait: in the order of arrival + b * work, so that short work passes long work by a bounded time, which
        is the longer the more waits."""
        backends, queue = self.backends, self.queue
        if not queue.has_place(ticket):
            raise QueueFull(self._retry_after(queue.seconds_for(len(queue))))
        may = [i for i in backends.eligible(ticket.model) if backends.names[i] not in ticket.tried]
        best = min([self._seconds(ticket, i) for i in may], default=0.0)
        upto = ticket.priority + 1  # it passes those of a lower priority
        ahead = (sum(queue.work[:upto]) + sum([waits[i] for i in may])) / len(may) if may else 0.0
        self._refuse_if_hopeless(ticket, best, min(ahead, queue.seconds_for(sum(queue.depth[:upto]) + 1) or 0.0), now)
        self._usual += 0.02 * (best - self._usual)
        ticket.seconds = best
        ticket.key = ticket.arrived + max(LEAST_B, GROWTH * ahead / max(1e-3, self._usual)) * best
        if ticket.deadline < math.inf:
            ticket.spare = min(CARE * self.feedback.takes(ticket), 0.5 * (ticket.deadline - now))
        if not queue.fits(ticket):
            self._displaced += queue.make_room(ticket)
        queue.put(ticket, now)

    def _refuse_if_hopeless(self, ticket: Ticket, prompt: float, wait: float, now: float) -> None:
        begun = now + wait / DOUBT
        late = max(begun + prompt / DOUBT - ticket.deadline, begun - ticket.expires)
        if late > 0.0 and self.backends.rates.known:
            raise Hopeless(self._retry_after(late))

    @staticmethod
    def _retry_after(seconds: float | None) -> float:
        return min(max(seconds or 1.0, 1.0), LONGEST)

    def _seconds(self, ticket: Ticket, i: int) -> float:
        """Of prompt work that the ticket would be to backend ``i``."""
        cached = cached_tokens(ticket, _depth(ticket, i)) or self.feedback.usual(ticket, i)
        return self.backends.seconds(i, ticket.prompt_tokens, cached)

    def _why_not(self, ticket: Ticket, i: int, waits: Sequence[float]) -> str:
        backends = self.backends
        if backends.names[i] in ticket.tried:
            return "tried"
        if i not in backends.eligible(ticket.model):
            return "not accepting" if not backends.accepting[i] else "model"
        if backends.busy[i] >= backends.slots[i]:
            return "slots"
        return "" if self._open(i, waits) else "prompts wait there"

    def _open(self, i: int, waits: Sequence[float]) -> bool:
        """Backend ``i`` can have one more ticket now."""
        backends = self.backends
        if not backends.accepting[i] or backends.busy[i] >= backends.slots[i]:
            return False
        if not self.policy.holds or not backends.inflight[i]:
            return True
        if backends.crowded[i] or 0 < backends.kv_tokens[i] < backends.tokens[i]:
            return False
        return waits[i] <= TAU or not backends.rates.serial[i]

    def _place(self, ticket: Ticket, waits: Sequence[float]) -> int:
        """The best backend for the ticket; one that is not open yet, if the policy holds tickets. -1: there is none."""
        backends, holds = self.backends, self.policy.holds
        may: Sequence[int] = backends.eligible(ticket.model)
        if ticket.tried:
            may = [i for i in may if backends.names[i] not in ticket.tried]
        if not holds:
            may = [i for i in may if backends.busy[i] < backends.slots[i]]
        if len(may) < 2:
            return may[0] if may else -1
        backends.weigh()
        costs = self.policy.costs(ticket, backends, waits)
        low = min(costs) if len(may) == len(costs) else min([costs[i] for i in may])
        if costs.count(low) == 1:
            return costs.index(low)
        ties = [i for i in may if costs[i] == low]
        self._turn += 1
        return ties[self._turn % len(ties)]

    def _bind(self, ticket: Ticket, i: int, now: float) -> None:
        backends = self.backends
        ticket.known = depth = _depth(ticket, i) if ticket.matches else 0
        ticket.lane, ticket.backend, ticket.granted_at = i, backends.names[i], now
        ticket.cached_tokens = cached = cached_tokens(ticket, depth) if depth else 0
        ticket.seconds = backends.seconds(i, ticket.prompt_tokens, cached or self.feedback.usual(ticket, i))
        ticket.charged = ticket.tokens - cached
        ticket.decision = self.policy.bound(ticket, i, backends)
        backends.bind(i, ticket, now)
        if ticket.prompt.keys:
            backends.index.insert(i, ticket.prompt, depth)
        self.accounts.charge(ticket.tenant, ticket.weight, ticket.charged)


def _depth(ticket: Ticket, i: int) -> int:
    """Blocks of the ticket's prompt that backend ``i`` holds."""
    for place, depth in ticket.matches:
        if place == i:
            return depth
    return 0
