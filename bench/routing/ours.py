"""The gateway's scheduler as a rule of the simulation. It is told what a gateway sees, and nothing else."""

from __future__ import annotations

import random
from collections import deque

from gateway.core.policy import POLICIES
from gateway.core.scheduler import LONGEST, Scheduler
from gateway.core.tickets import Bounds, Ticket
from gateway.core.usage import Usage

from .engine import Profile, Request
from .simulation import View


class Ours:
    """``known``: the backends say how many slots and KV tokens they have. ``streams``: first tokens are seen.
    ``shared``: other gateways send prompts to them too."""

    def __init__(
        self, policy: str = "expected-completion", *, known: bool = True, streams: bool = True, shared: bool = False
    ) -> None:
        self.name = f"ours: {policy}"
        self._known = known
        self._streams = streams
        self.scheduler = Scheduler(POLICIES[policy](), Bounds(requests=1_000_000), shared=shared)
        self._tickets: dict[int, Ticket] = {}
        self._held: dict[Ticket, Request] = {}
        self._granted = 0
        self._estimates: deque[tuple[int, float, float]] = deque()
        self.retry_after: list[tuple[float, float]] = []
        """Seconds after which a client would have been told to come back, had the queue been full, and after which as many
        tickets as waited then had left it."""

    def setup(self, views: list[View], rng: random.Random, profile: Profile) -> None:
        for view in views:
            kv, slots = (view.kv, profile.seats) if self._known else (None, None)
            self.scheduler.set_backend(str(view.place), 0.0, slots=slots, kv_tokens=kv)

    def choose(self, request: Request, now: float) -> int | None:
        ticket = Ticket("model", request.arrival, prompt_tokens=request.tokens, prompt=request.prompt, streams=self._streams)
        self._tickets[request.rid] = ticket
        if self.scheduler.submit(ticket, now):
            return ticket.lane
        self._estimate(now)
        self._held[ticket] = request
        return None

    def _estimate(self, now: float) -> None:
        waiting = len(self.scheduler.queue) - 1
        seconds = self.scheduler.queue.seconds_for(waiting)
        if waiting > 0 and seconds is not None:
            self._estimates.append((self._granted + waiting, now, min(max(seconds, 1.0), LONGEST)))

    def release(self, now: float) -> list[tuple[Request, int]]:
        granted = self.scheduler.schedule(now)
        self._granted += len(granted)
        late = [estimate for estimate in self._estimates if estimate[0] <= self._granted] if granted else []
        for estimate in late:
            self._estimates.remove(estimate)
            self.retry_after.append((estimate[2], now - estimate[1]))
        return [(self._held.pop(ticket), ticket.lane) for ticket in granted]

    def wake(self, now: float) -> float | None:
        return self.scheduler.next_wake(now)

    def first_token(self, request: Request, place: int, now: float) -> None:
        if self._streams:
            self.scheduler.first_token(self._tickets[request.rid], now)

    def complete(self, request: Request, place: int, now: float, cached: int) -> None:
        usage = Usage(request.tokens, request.output, cached)
        self.scheduler.release(self._tickets.pop(request.rid), now, usage)
