"""Limits that several gateways share, counted by Redis or Valkey; by this process alone while that is away.

A request is let in by one round trip (lua/reserve.lua), and settled by a second that nobody waits for. Each has an id, by which
Redis knows it: told twice, it counts once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import count
from typing import Any, Final
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred, ensureDeferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.python.failure import Failure

from .core.errors import GatewayError
from .core.principal import Limits
from .core.ratelimit import MOST, PARTS, Counts, Limiter, Reservation, amount_of, cost_of, period_end, refusal
from .core.readers import RedisServer
from .core.status import LimitsState
from .redis_link import RENEW, RESERVE, SETTLE, Away, Link, Refused

LEASE: Final = 60.0
"""Seconds for which Redis counts a request as running that it hears no more of: then what a crashed gateway held is free."""

RENEWAL: Final = 20.0
"""Seconds after which the leases of the requests that still run are renewed."""

KEEP: Final = 600.0
"""Seconds for which Redis remembers that a request was let in, or settled, beyond its lease."""

MAX_UNSENT: Final = 10_000
"""Settlements that wait for Redis to come back; further ones are lost, and counted."""

AT_ONCE: Final = 64
"""Settlements on their way at a time, and ids in one renewal."""

LIKE_BEFORE: Final = 60.0
"""Seconds after Redis has come back for which it is told what this gateway knows: a bucket is full again by then."""

_PREFIX: Final = "gateway:limits:"


class SharedReservation:
    """What a request was let in with, by Redis or, ``late``, without it."""

    __slots__ = (
        "_limiter",
        "_tokens",
        "_used",
        "counts",
        "ended",
        "id",
        "key",
        "late",
        "limits",
        "local",
        "renewed",
        "reserved",
    )

    def __init__(self, limiter: RedisLimiter, id: str, key: str, limits: Limits, tokens: int, cost: int) -> None:
        self._limiter = limiter
        self.id = id
        self.key = key
        self.limits = limits
        self._tokens, self._used = min(tokens, MOST), cost
        self.reserved = (self._tokens, cost)
        self.late = self.ended = self.renewed = False
        self.local: Reservation | None = None
        self.counts = Counts()

    def settle(self, tokens: int, money: int, now: float) -> None:
        self._tokens = min(tokens, MOST)
        self._used = cost_of(self.limits, self._tokens, money)
        if self.local is not None:
            self.local.settle(tokens, money, now)

    def end(self) -> None:
        if self.ended or self.local is None:
            return
        self.ended = True
        self.local.end()
        self._limiter.ended(self)

    def undone(self) -> list[object]:
        """The settlement of a request that Redis may or may not have let in, and that has not been served by its leave."""
        requests = 0 if self.limits.requests is None else -PARTS
        return self._settlement(requests, -self.reserved[0], -self.reserved[1], 0)

    def settlement(self) -> list[object]:
        """What `SETTLE` is told of it. What was used without Redis only counts for the budget: buckets refill by themselves."""
        if self.late:
            return self._settlement(0, 0, self._used, self.counts.ends)
        return self._settlement(0, self._tokens - self.reserved[0], self._used - self.reserved[1], self.counts.ends)

    def _settlement(self, requests: int, tokens: int, cost: int, ends: int) -> list[object]:
        limits = self.limits
        if limits.tokens is None:
            tokens = 0
        if limits.budget is None:
            cost = 0
        late = "1" if self.late else "0"
        change = (requests, tokens * PARTS, cost, ends)
        return [*_keys(self.key), self.id, late, _limit(limits.requests), _limit(limits.tokens), *change, _ms(KEEP)]


class RedisLimiter:
    """``fail_open``: while Redis is away this process counts, from what it last knew; else nobody is let in."""

    def __init__(self, server: RedisServer, clock: Any, unix: Callable[[], float], timeout: float, *, fail_open: bool) -> None:
        self._now: Callable[[], float] = clock.seconds
        self._unix = unix
        self._clock = clock
        self._fail_open = fail_open
        self._local = Limiter()
        self._link = Link(server, clock, timeout, self._came)
        self._name = uuid4().hex[:16]
        self._numbers = count()
        self._held: dict[str, SharedReservation] = {}
        self._unsent: deque[list[object]] = deque()
        self._sent = 0
        self._lost = 0
        self._without_redis = {"local": 0, "refused": 0}
        self._like_before = 0.0
        self._timer: IDelayedCall | None = None
        self._finished: Deferred[None] | None = None

    def start(self) -> None:
        self._link.start()
        self._timer = self._clock.callLater(RENEWAL, self._renew_in_turn)

    def settled(self) -> Deferred[None]:
        if self._is_settled():
            return succeed(None)
        self._finished = Deferred()
        return self._finished

    def _is_settled(self) -> bool:
        return not self._link.up or (not self._unsent and not self._sent)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._link.stop()

    def standing(self, key: str, limits: Limits) -> Counts:
        """As Redis last told it."""
        return self._local.standing(key, limits, self._now(), self._unix())

    def state(self, limited: Mapping[str, int]) -> LimitsState:
        unsettled = len(self._unsent) + self._sent
        return LimitsState(len(self._local), limited, self._link.up, self._without_redis, unsettled, self._lost)

    # --- letting in

    def reserve(self, key: str, limits: Limits, tokens: int, money: int) -> SharedReservation | Deferred[SharedReservation]:
        reservation = SharedReservation(self, self._next_id(), key, limits, tokens, cost_of(limits, tokens, money))
        if not self._link.up:
            return self._without(reservation, tokens, money)
        return ensureDeferred(self._ask(reservation, tokens, money))

    def _next_id(self) -> str:
        return f"{self._name}-{next(self._numbers)}"

    async def _ask(self, reservation: SharedReservation, tokens: int, money: int) -> SharedReservation:
        key, limits, unix = reservation.key, reservation.limits, self._unix()
        try:
            let_in, _, *told = await self._link.call(RESERVE, *self._question(reservation, unix))
        except Away:
            self._settle(reservation.undone())
            return self._without(reservation, tokens, money)
        except CancelledError:
            self._settle(reservation.undone())
            raise
        counts = reservation.counts = Counts(*told)
        if not let_in:
            raise refusal(limits, counts, *reservation.reserved, unix)
        reservation.local = self._local.adopt(key, limits, tokens, money, counts, self._now(), unix)
        self._held[reservation.id] = reservation
        return reservation

    def _question(self, reservation: SharedReservation, unix: float) -> list[object]:
        key, limits, now = reservation.key, reservation.limits, self._now()
        ends = (0, 0, 0) if limits.budget is None else _ends(limits.budget.period, int(unix) // 86_400)
        amount = -1 if limits.budget is None else amount_of(limits)
        known = self._local.standing(key, limits, now, unix) if now < self._like_before else Counts()
        return [
            *_keys(key),
            reservation.id,
            _limit(limits.requests),
            _limit(limits.tokens),
            _limit(limits.concurrency),
            amount,
            *reservation.reserved,
            *ends,
            _ms(LEASE),
            _ms(KEEP),
            known.requests,
            known.tokens,
        ]

    def _without(self, reservation: SharedReservation, tokens: int, money: int) -> SharedReservation:
        """Redis is away."""
        if not self._fail_open:
            self._without_redis["refused"] += 1
            message = "What your key may use cannot be counted now, so nothing is let in. Try again."
            raise GatewayError("limits_unavailable", message, retry_after=1.0)
        self._without_redis["local"] += 1
        late = SharedReservation(self, self._next_id(), reservation.key, reservation.limits, *reservation.reserved)
        late.late = True
        late.local = self._local.reserve(reservation.key, reservation.limits, tokens, money, self._now(), self._unix())
        late.counts = late.local.counts
        self._held[late.id] = late
        return late

    # --- settling

    def ended(self, reservation: SharedReservation) -> None:
        """A request runs no longer."""
        del self._held[reservation.id]
        if not reservation.late or reservation.renewed or reservation.limits.budget is not None:
            self._settle(reservation.settlement())

    def _settle(self, settlement: list[object]) -> None:
        if len(self._unsent) >= MAX_UNSENT:
            self._lost += 1
            return
        self._unsent.append(settlement)
        self._pump()

    def _pump(self) -> None:
        """Send what waits, some at a time."""
        while self._unsent and self._sent < AT_ONCE and self._link.up:
            settlement = self._unsent.popleft()
            self._sent += 1
            sent = self._link.call(SETTLE, *settlement, hurry=False)
            sent.addCallbacks(self._settled, self._unsettled, errbackArgs=(settlement,))

    def _settled(self, _: object) -> None:
        self._sent -= 1
        self._pump()
        if self._finished is not None and self._is_settled():
            finished, self._finished = self._finished, None
            finished.callback(None)

    def _unsettled(self, failure: Failure, settlement: list[object]) -> None:
        """It is told again when Redis is back, unless Redis itself will not have it."""
        self._sent -= 1
        if failure.check(Refused):
            self._lost += 1
        elif failure.check(Away):
            self._unsent.appendleft(settlement)

    # --- time

    def _came(self) -> None:
        """Redis is there, or back, and may have forgotten everything that this process knows. One that knows nothing yet keeps
        silent: what it hears in its first minute and told again would undo what others settle."""
        if len(self._local):
            self._like_before = self._now() + LIKE_BEFORE
        self._renew()
        self._pump()

    def _renew_in_turn(self) -> None:
        self._timer = self._clock.callLater(RENEWAL, self._renew_in_turn)
        self._renew()

    def _renew(self) -> None:
        """Tell Redis of the requests that run; what is lost of that is told again the next time."""
        running: dict[str, list[str]] = {}
        for reservation in self._held.values():
            running.setdefault(reservation.key, []).append(reservation.id)
            reservation.renewed = True
        for key, ids in running.items():
            for begin in range(0, len(ids), AT_ONCE):
                told = self._link.call(RENEW, *_keys(key), _ms(LEASE), _ms(KEEP), *ids[begin : begin + AT_ONCE])
                told.addErrback(lambda failure: failure.trap(Away))


def _keys(key: str) -> tuple[str, str]:
    """Both in one slot of a cluster: by their hash tag."""
    return f"{_PREFIX}{{{key}}}", f"{_PREFIX}{{{key}}}:leases"


def _limit(limit: int | None) -> int:
    return -1 if limit is None else min(limit, 10 * MOST)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


@lru_cache(maxsize=8)
def _ends(period: str, day: int) -> tuple[int, int, int]:
    """The ends of the last, this and the next period, for the day with this number. Redis' clock chooses."""
    this = period_end(period, day * 86_400.0)
    begin = (
        day if period == "day" else next(one for one in range(day, -1, -1) if period_end(period, (one - 1) * 86_400.0) < this)
    )
    return begin * 86_400, this, period_end(period, float(this))
