"""The last minutes of requests, folded from records into small buckets of time; `core.view` makes a picture of it.

A request is added to the bucket that is being filled, and all else is done when that is full: series go on by one number, sums
of the window lose what is too old. All of it is bounded: a ring of buckets, a histogram for each backend in each of them,
a few requests, a few tenants.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from msgspec.structs import replace

from .endpoints import ENDPOINTS
from .record import Record

SECONDS: Final = 5.0
BUCKETS: Final = 60
"""So many buckets of so many seconds are shown; the one that is being filled comes on top."""

MINUTE: Final = round(60 / SECONDS)
LATEST: Final = 15
SLOWEST: Final = 10
TENANTS: Final = 64
"""Tenants that a bucket tells apart; further ones are `OTHERS`."""

OTHERS: Final = "others"
LONGEST: Final = 96
"""Characters of a name; a model's can be as long as a request's body."""

BOUNDS: Final = tuple(0.001 * 2 ** (step / 3) for step in range(61))
"""Upper bounds of the times to the first token that are counted together, in seconds: from 1 ms to 17 minutes, each 26 % above
the one before."""

Times = list[int]
"""How many there were within each of the `BOUNDS`, and above them all; empty: none."""


class Lane:
    """What ended at one backend, or at all of them: requests, errors, tokens, times to the first token."""

    __slots__ = ("cached", "completion", "errors", "predicted", "prompt", "requests", "times")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.prompt = 0
        self.completion = 0
        self.cached = 0
        self.predicted = 0
        self.times: Times = []

    def add(self, other: Lane, sign: int = 1) -> None:
        """Count what another lane counted, but for its times; with ``sign`` -1, count it no more."""
        self.requests += sign * other.requests
        self.errors += sign * other.errors
        self.prompt += sign * other.prompt
        self.completion += sign * other.completion
        self.cached += sign * other.cached
        self.predicted += sign * other.predicted


_BARE: Final = Lane()


def both(one: Times, other: Times) -> Times:
    """All that were counted."""
    return list(map(operator.add, one, other)) if one and other else one or other


def quantile(times: Times, part: float) -> float | None:
    """The seconds that this part of the times did not exceed, as far as `BOUNDS` tell; None: there are none."""
    wanted = part * sum(times)
    below = 0
    for place, count in enumerate(times):
        if count and below + count >= wanted:
            low = BOUNDS[place - 1] if place else 0.0
            high = BOUNDS[min(place, len(BOUNDS) - 1)]
            return low + (high - low) * (wanted - below) / count
        below += count
    return None


def rounded(seconds: float | None) -> float | None:
    """To a tenth of a millisecond."""
    return None if seconds is None else round(seconds, 4)


class Track:
    """The window of one backend, or of all of them together. ``closed`` are the lanes of its full buckets, ``sums`` is all of
    them as one, ``minute`` the times of the last of them; ``p50`` and ``p95`` are quantiles of each bucket's times."""

    def __init__(self) -> None:
        self.closed: deque[Lane] = deque([_BARE] * BUCKETS, BUCKETS)
        self.sums = Lane()
        self.minute: Times = []
        self.p50: deque[float | None] = deque([None] * BUCKETS, BUCKETS)
        self.p95: deque[float | None] = deque([None] * BUCKETS, BUCKETS)

    def close(self, lane: Lane) -> None:
        """A bucket is full: this is its lane."""
        self.sums.add(self.closed[0], -1)
        self.sums.add(lane)
        old = self.closed[-MINUTE].times
        if old:
            self.minute = list(map(operator.sub, self.minute, old))
        self.minute = both(self.minute, lane.times)
        self.closed.append(lane)
        self.p50.append(rounded(quantile(lane.times, 0.5)))
        self.p95.append(rounded(quantile(lane.times, 0.95)))


class Bucket:
    """What ended within `SECONDS`, but for what is counted by backend. ``slowest``: minus its seconds, a number so that no
    records are compared, the record."""

    def __init__(self) -> None:
        self.codes: dict[tuple[str, str], int] = {}  # by fault and code, of which there is a table
        self.tenants: dict[str, list[int]] = {}  # requests, tokens
        self.retries = 0
        self.slowest: list[tuple[float, int, Record]] = []
        self.floor = -1.0
        self._kept = 0

    def account(self, tenant: str) -> list[int]:
        """Of a tenant that has had nothing in this bucket."""
        return self.tenants.setdefault(tenant if len(self.tenants) < TENANTS else OTHERS, [0, 0])

    def keep(self, record: Record) -> None:
        """It is among the slowest here."""
        self._kept += 1
        insort(self.slowest, (record.started - record.ended, self._kept, record))
        if len(self.slowest) > SLOWEST:
            self.slowest.pop()
            self.floor = -self.slowest[-1][0]

    def failed(self, record: Record, lane: Lane) -> None:
        """It, or an attempt of it, failed."""
        self.retries += len(record.retries)
        if record.code:
            kind = (record.fault or "", record.code)
            self.codes[kind] = self.codes.get(kind, 0) + 1
            lane.errors += record.code != "client_cancelled"


class Live:
    """An observer of records: of those of inference, which are what the gateway is for."""

    def __init__(self, now: float) -> None:
        self.started = now
        self.latest: deque[Record] = deque(maxlen=LATEST)
        self.total = Track()
        self._tracks: dict[str, Track] = {}
        self._lanes: dict[str, Lane] = {}  # of the bucket that is being filled
        self._bucket = Bucket()
        self._buckets: deque[Bucket] = deque(maxlen=BUCKETS)
        self._before = 0  # requests in full buckets, since the start
        self._number = int(now // SECONDS)
        self._ends = (self._number + 1) * SECONDS

    def __call__(self, record: Record) -> None:
        if record.route not in ENDPOINTS:
            return
        ended, started = record.ended, record.started
        if ended >= self._ends:
            self.advance(ended)
        lane, bucket = self._lanes.get(record.backend), self._bucket
        if lane is None:
            lane = self._lanes[record.backend] = Lane()
        lane.requests += 1
        account = bucket.tenants.get(record.principal.tenant)
        if account is None:
            account = bucket.account(record.principal.tenant)
        account[0] += 1
        used = record.usage
        prompt, completion = used.prompt_tokens, used.completion_tokens
        if prompt or completion:
            account[1] += prompt + completion
            lane.prompt += prompt
            lane.completion += completion
            lane.cached += used.cached_tokens
            lane.predicted += record.predicted_cached_tokens
        first = record.first_token
        if first is not None:
            times = lane.times
            if not times:
                times = lane.times = [0] * (len(BOUNDS) + 1)
            times[bisect_left(BOUNDS, first - started)] += 1
        if record.code or record.retries:
            bucket.failed(record, lane)
        if len(record.model) > LONGEST:  # it is kept for minutes
            record = replace(record, model=record.model[: LONGEST + 1])
        self.latest.append(record)
        if ended - started > bucket.floor:
            bucket.keep(record)

    def advance(self, now: float) -> None:
        """Buckets that are over by now are full."""
        number = int(now // SECONDS)
        passed = number - self._number
        if passed <= 0:
            return
        if passed <= BUCKETS:
            for _ in range(passed):
                self._close()
        else:
            self._forget()
        self._number, self._ends = number, (number + 1) * SECONDS

    def _forget(self) -> None:
        """Nothing that is known is of the window any more."""
        self._before = self.requests
        self.total = Track()
        self._tracks.clear()
        self._lanes.clear()
        self._buckets.clear()
        self._bucket = Bucket()

    def _close(self) -> None:
        lanes, self._lanes = self._lanes, {}
        whole = _together(lanes.values())
        self._before += whole.requests
        self.total.close(whole)
        for name in lanes.keys() - self._tracks.keys():
            self._tracks[name] = Track()
        for name, track in list(self._tracks.items()):
            track.close(lanes.get(name, _BARE))
            if not track.sums.requests:
                del self._tracks[name]
        self._buckets.append(self._bucket)
        self._bucket = Bucket()

    # --- what is known

    @property
    def requests(self) -> int:
        """Since the start."""
        return self._before + sum(lane.requests for lane in self._lanes.values())

    def buckets(self) -> Iterator[Bucket]:
        """All of the window, the newest last."""
        yield from self._buckets
        yield self._bucket

    def filling(self) -> Lane:
        """What the current bucket has of all backends."""
        return _together(self._lanes.values())

    def of(self, backend: str) -> tuple[Track, Lane]:
        """A backend's window, and what the current bucket has of it."""
        return self._tracks.get(backend) or _NOTHING, self._lanes.get(backend, _BARE)


_NOTHING: Final = Track()


def _together(lanes: Iterable[Lane]) -> Lane:
    whole = Lane()
    for lane in lanes:
        whole.add(lane)
        whole.times = both(whole.times, lane.times)
    return whole
