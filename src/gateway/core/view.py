"""What the dashboard and `inference-gateway top` show: how things stand, and the last minutes, as one JSON object.

Names are cut, and what cannot be printed in them is replaced: neither a terminal nor a page is moved by them. Durations are
seconds, rates are per second, and counts without another word are of the last `window` seconds.
"""

from __future__ import annotations

import heapq
from typing import Final

import msgspec

from .live import BUCKETS, LONGEST, OTHERS, SECONDS, SLOWEST, Lane, Live, Track, both, quantile, rounded
from .look import Snapshot
from .record import Record
from .status import BackendState, Status

SHOWN_TENANTS: Final = 10
RATE_BUCKETS: Final = 2
"""Rates are of so many buckets, and what there is of the current one."""

REASON: Final = 300
"""Characters of the words that say why a backend is in a state."""


class Moment(msgspec.Struct, kw_only=True):
    """Rates and times of now. ``ttft_p50`` and ``ttft_p95`` are of streams of the last minute; ``prompt`` and ``completion``
    are tokens, which count when their request ends."""

    requests: float = 0.0
    prompt: float = 0.0
    completion: float = 0.0
    ttft_p50: float | None = None
    ttft_p95: float | None = None


class Counts(msgspec.Struct, kw_only=True):
    """``prompt_tokens`` of which ``cached`` came from a cache, as the backends said; ``predicted``: as we thought."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached: int = 0
    predicted: int = 0


class Series(msgspec.Struct, kw_only=True):
    """A number for each whole bucket of the window, the oldest first. None: no stream had its first token in it."""

    requests: list[float]
    errors: list[float]
    prompt: list[float]
    completion: list[float]
    ttft_p50: list[float | None]
    ttft_p95: list[float | None]


class BackendView(msgspec.Struct, kw_only=True):
    """One backend. ``held``: requests of ours that it works on; ``running``, ``waiting`` and ``kv_usage`` are what it says
    itself, None if it does not; ``since``: seconds that it has been in this state."""

    name: str
    kind: str
    state: str
    reason: str
    since: float
    breaker: str
    opened: int
    restarts: int
    held: int
    slots: int | None
    running: int | None
    waiting: int | None
    kv_usage: float | None
    cached_tokens: int
    """That its cache is thought to hold."""
    now: Moment
    window: Counts
    ttft_p50: list[float | None]
    ttft_p95: list[float | None]


class TenantView(msgspec.Struct):
    """A tenant; the empty name is everybody, where nobody is asked for a key."""

    name: str
    waiting: int
    requests: int
    tokens: int


class ErrorView(msgspec.Struct):
    """How often requests ended so."""

    fault: str
    code: str
    count: int


class RequestView(msgspec.Struct, kw_only=True):
    """One request that has ended, ``ago`` seconds before now. ``decision``: why it got this backend."""

    id: str
    route: str
    tenant: str
    model: str
    stream: bool
    backend: str
    decision: str
    attempts: int
    status: int
    code: str
    fault: str
    ago: float
    queued: float
    first_token: float | None
    total: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class View(msgspec.Struct, kw_only=True):
    """The whole picture; see the module."""

    version: str
    policy: str
    uptime: float
    draining: bool
    echo: bool
    connections: int
    window: float
    inflight: int
    queued: int
    queue_bytes: int
    requests: int
    """Since the start."""
    retries: int
    now: Moment
    counts: Counts
    series: Series
    backends: list[BackendView]
    priorities: dict[str, int]
    tenants: list[TenantView]
    errors: list[ErrorView]
    slowest: list[RequestView]
    latest: list[RequestView]


def shown(name: str, most: int = LONGEST) -> str:
    """A name as it can be put anywhere: of so many characters at most, all of them printable."""
    if len(name) > most:
        name = f"{name[:most]}\u2026"
    return name if name.isprintable() else "".join([one if one.isprintable() else "\ufffd" for one in name])


def view(live: Live, status: Status, now: float, *, version: str, policy: str) -> View:
    """How things look at ``now``."""
    live.advance(now)
    scheduling, uptime, filling = status.scheduling, round(now - live.started, 1), live.filling()
    seconds = max(min(RATE_BUCKETS * SECONDS + now % SECONDS, uptime), 1.0)
    return View(
        version=version,
        policy=policy,
        uptime=uptime,
        draining=status.draining,
        echo=any(backend.kind == "echo" for backend in status.backends),
        connections=status.connections,
        window=BUCKETS * SECONDS,
        inflight=sum(scheduling.inflight.values()),
        queued=sum(scheduling.depth.values()),
        queue_bytes=scheduling.bytes,
        requests=live.requests,
        retries=sum(bucket.retries for bucket in live.buckets()),
        now=_moment(live.total, filling, seconds),
        counts=_counts(live.total, filling),
        series=_series(live.total),
        backends=[_backend(live, backend, status.scheduling, now, seconds) for backend in status.backends],
        priorities=scheduling.depth,
        tenants=_tenants(live, scheduling.waiting),
        errors=_errors(live),
        slowest=_slowest(live, now),
        latest=[_request(record, now) for record in reversed(live.latest)],
    )


def _moment(track: Track, filling: Lane, seconds: float) -> Moment:
    """``seconds``: how long the last `RATE_BUCKETS` and what there is of the current one took."""
    requests, prompt, completion = filling.requests, filling.prompt, filling.completion
    for back in range(-RATE_BUCKETS, 0):
        lane = track.closed[back]
        requests += lane.requests
        prompt += lane.prompt
        completion += lane.completion
    times = both(track.minute, filling.times)
    return Moment(
        requests=_rate(requests, seconds),
        prompt=_rate(prompt, seconds),
        completion=_rate(completion, seconds),
        ttft_p50=rounded(quantile(times, 0.5)),
        ttft_p95=rounded(quantile(times, 0.95)),
    )


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2)


def _counts(track: Track, filling: Lane) -> Counts:
    sums = track.sums
    return Counts(
        requests=sums.requests + filling.requests,
        errors=sums.errors + filling.errors,
        prompt_tokens=sums.prompt + filling.prompt,
        cached=sums.cached + filling.cached,
        predicted=sums.predicted + filling.predicted,
    )


def _series(track: Track) -> Series:
    return Series(
        requests=[_rate(lane.requests, SECONDS) for lane in track.closed],
        errors=[_rate(lane.errors, SECONDS) for lane in track.closed],
        prompt=[_rate(lane.prompt, SECONDS) for lane in track.closed],
        completion=[_rate(lane.completion, SECONDS) for lane in track.closed],
        ttft_p50=list(track.p50),
        ttft_p95=list(track.p95),
    )


def _backend(live: Live, seen: BackendState, scheduling: Snapshot, now: float, seconds: float) -> BackendView:
    track, filling = live.of(seen.name)
    load = seen.load
    return BackendView(
        name=shown(seen.name),
        kind=seen.kind,
        state=seen.state,
        reason=shown(seen.reason, REASON),
        since=round(now - seen.since, 1),
        breaker=seen.breaker,
        opened=seen.opened,
        restarts=seen.restarts,
        held=scheduling.inflight.get(seen.name, 0),
        slots=seen.slots,
        running=load.running if load else None,
        waiting=load.waiting if load else None,
        kv_usage=load.kv_usage if load else None,
        cached_tokens=scheduling.index_tokens.get(seen.name, 0),
        now=_moment(track, filling, seconds),
        window=_counts(track, filling),
        ttft_p50=list(track.p50),
        ttft_p95=list(track.p95),
    )


def _tenants(live: Live, waiting: dict[str, int]) -> list[TenantView]:
    """Those that wait most, then those that used most; all the others as one."""
    used: dict[str, list[int]] = {tenant: [number, 0, 0] for tenant, number in waiting.items()}
    for bucket in live.buckets():
        for tenant, (requests, tokens) in bucket.tenants.items():
            row = used.setdefault(tenant, [0, 0, 0])
            row[1] += requests
            row[2] += tokens
    others = used.pop(OTHERS, [0, 0, 0])
    top = heapq.nlargest(SHOWN_TENANTS, used.items(), key=lambda item: (item[1][0], item[1][2], item[1][1]))
    named = {tenant for tenant, _ in top}
    for tenant, row in used.items():
        if tenant not in named:
            others = [mine + theirs for mine, theirs in zip(others, row, strict=True)]
    found = [TenantView(shown(tenant), *row) for tenant, row in top]
    return [*found, TenantView(OTHERS, *others)] if any(others) else found


def _errors(live: Live) -> list[ErrorView]:
    """The most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for bucket in live.buckets():
        for kind, count in bucket.codes.items():
            counts[kind] = counts.get(kind, 0) + count
    return [ErrorView(*kind, count) for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _slowest(live: Live, now: float) -> list[RequestView]:
    entries = (entry for bucket in live.buckets() for entry in bucket.slowest)
    found = heapq.nsmallest(SLOWEST, entries, key=lambda entry: entry[0])
    return [_request(record, now) for _, _, record in found]


def _request(record: Record, now: float) -> RequestView:
    first, used = record.first_token, record.usage
    return RequestView(
        id=shown(record.request_id),
        route=record.route,
        tenant=shown(record.tenant),
        model=shown(record.model),
        stream=record.stream,
        backend=shown(record.backend),
        decision=shown(record.decision),
        attempts=record.attempts,
        status=record.status,
        code=record.code,
        fault=record.fault or "",
        ago=round(max(now - record.ended, 0.0), 1),
        queued=round(record.queued, 4),
        first_token=None if first is None else round(first - record.started, 4),
        total=round(record.duration, 4),
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cached_tokens=used.cached_tokens,
    )
