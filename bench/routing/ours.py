"""The gateway's scheduler as a rule of the simulation. It is told what a gateway sees, and nothing else."""

from __future__ import annotations

import random

from gateway.core.policy import POLICIES
from gateway.core.scheduler import Scheduler
from gateway.core.tickets import Bounds, Ticket
from gateway.core.usage import Usage

from .engine import Profile, Request
from .simulation import View


class Ours:
    """``known``: the backends say how many slots and KV tokens they have. ``streams``: first tokens are seen."""

    def __init__(self, policy: str = "expected-completion", *, known: bool = True, streams: bool = True) -> None:
        self.name = f"ours: {policy}"
        self._known = known
        self._streams = streams
        self.scheduler = Scheduler(POLICIES[policy](), Bounds(requests=1_000_000))
        self._tickets: dict[int, Ticket] = {}
        self._held: dict[Ticket, Request] = {}

    def setup(self, views: list[View], rng: random.Random, profile: Profile) -> None:
        for view in views:
            kv, slots = (view.kv, profile.seats) if self._known else (None, None)
            self.scheduler.set_backend(str(view.place), 0.0, slots=slots, kv_tokens=kv)

    def choose(self, request: Request, now: float) -> int | None:
        ticket = Ticket("model", request.arrival, prompt_tokens=request.tokens, prompt=request.prompt, streams=self._streams)
        self._tickets[request.rid] = ticket
        if self.scheduler.submit(ticket, now):
            return ticket.lane
        self._held[ticket] = request
        return None

    def release(self, now: float) -> list[tuple[Request, int]]:
        return [(self._held.pop(ticket), ticket.lane) for ticket in self.scheduler.schedule(now)]

    def wake(self, now: float) -> float | None:
        return self.scheduler.next_wake(now)

    def first_token(self, request: Request, place: int, now: float) -> None:
        if self._streams:
            self.scheduler.first_token(self._tickets[request.rid], now)

    def complete(self, request: Request, place: int, now: float, cached: int) -> None:
        usage = Usage(request.tokens, request.output, cached)
        self.scheduler.release(self._tickets.pop(request.rid), now, usage)
