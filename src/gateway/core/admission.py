"""The admission queue: bounded, in order of priority, then of fairness between tenants, then of arrival and work.

Tickets of one model, priority and tenant form a line, ordered by ``key`` (arrival + b * work, set by the scheduler). Lines are
served by priority first; but a line whose head has waited as long as `Bounds.aging` says counts as the highest priority
that waits, so that a priority delays another by a bounded time. Among equals the tenant with the lowest account is next.
When the queue is full, a ticket takes the place of one of a lower priority: else what may wait longest would keep out what
may not wait at all.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Final

from .fair import Accounts
from .tickets import PRIORITIES, Bounds, Ticket

MEMORY: Final = 30.0
"""Seconds over which the rate is measured at which the queue drains."""

_Line = list[tuple[float, int, Ticket]]


class AdmissionQueue:
    """Tickets that wait. Every operation is O(log n), but for a scan, which is O(lines + tickets seen)."""

    def __init__(self, bounds: Bounds, accounts: Accounts) -> None:
        self.bounds = bounds
        self.bytes = 0
        self.depth = [0] * len(PRIORITIES)
        self.work = [0.0] * len(PRIORITIES)
        """Seconds of prompt work that wait, each ticket's on its best backend."""
        self._bytes = [0] * len(PRIORITIES)
        self._accounts = accounts
        self.lines: dict[tuple[str, int, str], _Line] = {}
        """Tickets that wait, by model, priority and tenant; no line is empty."""
        self._waiting: dict[str, int] = {}  # by tenant
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._serial = 0
        self._at = 0.0
        self._elapsed = 0.0  # seconds in which somebody waited, faded by age
        self._served = 0.0  # tickets served in them

    def __len__(self) -> int:
        return sum(self.depth)

    def fits(self, ticket: Ticket) -> bool:
        """There is room for it."""
        return sum(self.depth) < self.bounds.requests and self.bytes + ticket.size <= self.bounds.bytes

    def has_place(self, ticket: Ticket) -> bool:
        """There is room for it, or would be without those of a lower priority."""
        upto = ticket.priority + 1
        return sum(self.depth[:upto]) < self.bounds.requests and sum(self._bytes[:upto]) + ticket.size <= self.bounds.bytes

    def make_room(self, ticket: Ticket) -> list[Ticket]:
        """Those that wait no longer, so that the ticket, which has a place, fits: the last ones of the lowest priority, of the
        tenant that has got most."""
        displaced = []
        while not self.fits(ticket):
            _, line = max(self.lines.items(), key=lambda item: (item[0][1], self._accounts.of(item[0][2]), item[1][-1][:2]))
            displaced.append(line[-1][2])
            self.remove(displaced[-1])
        return displaced

    def put(self, ticket: Ticket, now: float) -> None:
        """The ticket waits from now on; its ``key`` and ``seconds`` are set."""
        self._clock(now)
        self._serial += 1
        ticket.serial = self._serial
        ticket.waiting = True
        insort(self.lines.setdefault((ticket.model, ticket.priority, ticket.tenant), []), (ticket.key, self._serial, ticket))
        waiting = self._waiting.get(ticket.tenant, 0)
        if not waiting:
            self._accounts.arrive(ticket.tenant)
        self._waiting[ticket.tenant] = waiting + 1
        self.depth[ticket.priority] += 1
        self.bytes += ticket.size
        self._bytes[ticket.priority] += ticket.size
        self.work[ticket.priority] += ticket.seconds
        due = min(ticket.deadline - ticket.spare, ticket.expires)
        if due != math.inf:
            heapq.heappush(self._deadlines, (due, self._serial, ticket))

    def serve(self, ticket: Ticket, now: float) -> None:
        """The ticket has a backend, and waits no longer."""
        self._clock(now)
        self._served += 1.0
        self.remove(ticket)

    def seconds_for(self, tickets: int) -> float | None:
        """How long it takes to serve so many, at the rate of the last half minute of waiting; None: not known."""
        return tickets * self._elapsed / self._served if self._served >= 2.0 else None

    def _clock(self, now: float) -> None:
        """Time passed; it counts if somebody waited."""
        passed, self._at = now - self._at, now
        if passed > 0.0 and self.lines:
            fade = math.exp(-passed / MEMORY)
            self._elapsed = self._elapsed * fade + (1.0 - fade) * MEMORY
            self._served *= fade

    def remove(self, ticket: Ticket) -> None:
        """The ticket, which waits, waits no longer."""
        name = (ticket.model, ticket.priority, ticket.tenant)
        line = self.lines[name]
        del line[bisect_left(line, (ticket.key, ticket.serial))]
        if not line:
            del self.lines[name]
        ticket.waiting = False
        self._waiting[ticket.tenant] -= 1
        if not self._waiting[ticket.tenant]:
            del self._waiting[ticket.tenant]
        self.depth[ticket.priority] -= 1
        self.bytes -= ticket.size
        self._bytes[ticket.priority] -= ticket.size
        left = self.depth[ticket.priority]
        self.work[ticket.priority] = self.work[ticket.priority] - ticket.seconds if left else 0.0
        if len(self._deadlines) > 64 + 2 * len(self):  # those that left long before their deadline
            self._deadlines = [entry for entry in self._deadlines if entry[2].waiting]
            heapq.heapify(self._deadlines)

    def models(self) -> set[str]:
        """Those that tickets wait for."""
        return {model for model, _, _ in self.lines}

    def tenants(self) -> dict[str, int]:
        """How many tickets wait, by tenant."""
        return dict(self._waiting)

    def scan(self, models: set[str], now: float, most: int) -> Iterator[Ticket]:
        """Tickets for these models in the order in which they should be served, so many at most; the queue must not change
        meanwhile."""
        lines = [(name, line) for name, line in self.lines.items() if name[0] in models]
        if not lines:
            return
        top = min(name[1] for name, _ in lines)
        of = self._accounts.of
        heap = [(self._level(line[0][2], top, now), of(name[2]), line[0][:2], 0, line) for name, line in lines]
        if len(heap) == 1:
            yield from [ticket for _, _, ticket in lines[0][1][:most]]
            return
        self._accounts.advance(min(entry[1] for entry in heap))
        heapq.heapify(heap)
        while heap and most:
            most -= 1
            _, account, _, place, line = heap[0]
            ticket = line[place][2]
            yield ticket
            place += 1
            if place < len(line):
                following = line[place]
                raised = account + ticket.tokens / ticket.weight
                heapq.heapreplace(heap, (self._level(following[2], top, now), raised, following[:2], place, line))
            else:
                heapq.heappop(heap)

    def _level(self, ticket: Ticket, top: int, now: float) -> int:
        """The priority that it has by now."""
        waited_enough = now >= ticket.arrived + self.bounds.aging * ticket.priority
        return top if waited_enough else ticket.priority

    def ahead(self, ticket: Ticket) -> int:
        """Tickets for its model that are before it, tenants' accounts left aside."""
        place = (ticket.key, ticket.serial)
        return sum(
            len(line) if priority < ticket.priority else bisect_left(line, place)
            for (model, priority, _), line in self.lines.items()
            if model == ticket.model and priority <= ticket.priority
        )

    def expire(self, now: float) -> list[Ticket]:
        """Tickets that expired, or would be late from now on; they wait no longer."""
        expired = []
        while self.due() <= now:
            ticket = heapq.heappop(self._deadlines)[2]
            self.remove(ticket)
            expired.append(ticket)
        return expired

    def due(self) -> float:
        """When the next waiting ticket expires, or would be late; or infinity."""
        while self._deadlines and not self._deadlines[0][2].waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf
