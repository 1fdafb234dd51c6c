"""Several gateways that share no memory as one rule of the simulation: a balancer gives each request to one of them by lot."""

from __future__ import annotations

import random

from gateway.core.load import Load
from gateway.core.rendezvous import mark

from .engine import Profile, Request
from .ours import Ours
from .simulation import View

PROBE = 2.0
"""Seconds between two looks of a gateway at a backend (`GATEWAY_PROBE_INTERVAL`)."""


class Replicas:
    """``count`` gateways, each of which sees its own requests, and of the others' what the backends report. ``agree``: prompts
    have homes. ``sessions``: the balancer gives all requests of a session to one gateway."""

    def __init__(self, count: int, *, agree: bool = True, sessions: bool = False) -> None:
        gateways = "1 gateway" if count == 1 else f"{count} gateways"
        self.name = gateways + ("" if agree else ", no homes") + (", sessions kept" if sessions else "")
        self.gateways = [Ours(shared=count > 1) for _ in range(count)]
        self._agree = agree
        self._sessions = sessions
        self._of: dict[int, Ours] = {}

    def setup(self, views: list[View], rng: random.Random, profile: Profile) -> None:
        self._rng, self._views, self._profile = rng, views, profile
        for gateway in self.gateways:
            gateway.setup(views, rng, profile)
        self._looks = [PROBE * (1 + k / len(self.gateways)) for k in range(len(self.gateways))]

    def _probe(self, now: float) -> None:
        for k, gateway in enumerate(self.gateways):
            if now >= self._looks[k]:
                self._looks[k] = max(self._looks[k] + PROBE, now)
                for view in self._views:
                    waiting, running, kv = view.engine.load()
                    load = Load(running, waiting, kv, now)
                    gateway.scheduler.set_backend(str(view.place), now, slots=self._profile.seats, kv_tokens=view.kv, load=load)

    def _gateway(self, request: Request) -> Ours:
        number = mark(request.session) if self._sessions else self._rng.randrange(len(self.gateways))
        gateway = self._of[request.rid] = self.gateways[number % len(self.gateways)]
        return gateway

    def choose(self, request: Request, now: float) -> int | None:
        self._probe(now)
        if not self._agree:
            request.prompt = request.prompt._replace(tails=())
        return self._gateway(request).choose(request, now)

    def release(self, now: float) -> list[tuple[Request, int]]:
        return [one for gateway in self.gateways for one in gateway.release(now)]

    def wake(self, now: float) -> float | None:
        return min((at for gateway in self.gateways if (at := gateway.wake(now)) is not None), default=None)

    def first_token(self, request: Request, place: int, now: float) -> None:
        self._of[request.rid].first_token(request, place, now)

    def complete(self, request: Request, place: int, now: float, cached: int) -> None:
        self._of.pop(request.rid).complete(request, place, now, cached)
