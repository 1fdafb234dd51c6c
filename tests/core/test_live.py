from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import live
from gateway.core.endpoints import CHAT
from gateway.core.live import BOUNDS, BUCKETS, LATEST, SECONDS, SLOWEST, TENANTS, Live, quantile
from gateway.core.load import Load
from gateway.core.look import Snapshot
from gateway.core.principal import Principal
from gateway.core.record import Record
from gateway.core.status import BackendState, Status
from gateway.core.usage import Usage
from gateway.core.view import REASON, SHOWN_TENANTS, View, shown, view

WINDOW = BUCKETS * SECONDS
START = 1000.0
NOTHING = Snapshot({"interactive": 0, "default": 0, "batch": 0}, 0, {}, {}, 0, 0, {}, {})


def record(
    ended: float, total: float = 0.1, *, tenant: str = "", tokens: tuple[int, int, int] = (0, 0, 0), **more: Any
) -> Record:
    """One that has ended at this time, after so many seconds; ``ttft`` with its first token after so many."""
    if "ttft" in more:
        more["first_token"] = ended - total + more.pop("ttft")
    fields = {"backend": "a", "status": 200, "usage": Usage(*tokens), "principal": Principal(tenant=tenant), **more}
    return Record(fields.pop("request_id", "r"), "POST", fields.pop("route", CHAT.path), ended - total, ended=ended, **fields)


def status(*backends: BackendState, scheduling: Snapshot = NOTHING) -> Status:
    return Status(scheduling, 3, 0, False, list(backends) or [state("a")])


def state(name: str, **more: Any) -> BackendState:
    return BackendState(**{"name": name, "kind": "vllm", "state": "healthy", "reason": "", "since": START, **more})


def seen(what: Live, now: float, how: Status | None = None) -> View:
    return view(what, how or status(), now, version="1", policy="least-load")


def folded(*records: Record) -> Live:
    what = Live(START)
    for one in records:
        what(one)
    return what


# --- the window


def test_counts_are_of_the_window_and_what_is_older_is_forgotten() -> None:
    what = folded(
        record(START + 1, tokens=(10, 5, 4), predicted_cached_tokens=6), record(START + 2, code="queue_full", fault="gateway")
    )
    here = seen(what, START + 3)
    assert (here.counts.requests, here.counts.errors) == (2, 1)
    assert (here.counts.prompt_tokens, here.counts.cached, here.counts.predicted) == (10, 4, 6)
    assert here.backends[0].window == here.counts
    assert [(one.fault, one.code, one.count) for one in here.errors] == [("gateway", "queue_full", 1)]
    later = seen(what, START + WINDOW)
    assert later.counts.requests == 2
    gone = seen(what, START + WINDOW + SECONDS)
    assert (gone.counts.requests, gone.backends[0].window.requests) == (0, 0)
    assert (gone.errors, gone.tenants, gone.slowest) == ([], [], [])
    assert gone.requests == 2
    assert len(gone.latest) == 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2000), st.sampled_from("abc"), st.one_of(st.none(), st.floats(0, 3000))), max_size=60))
def test_sums_are_those_of_the_requests_in_the_window(asked: list[tuple[float, str, float | None]]) -> None:
    what, now = Live(START), START
    ended = []
    for wait, backend, ttft in asked:
        now += wait
        more: dict[str, Any] = {} if ttft is None else {"ttft": ttft}
        what(record(now, 1.0, backend=backend, tokens=(3, 2, 1), **more))
        ended.append((int(now // SECONDS), backend, ttft))
    here = seen(what, now, status(state("a"), state("b"), state("c")))
    bucket = int(now // SECONDS)
    inside = [row for row in ended if row[0] >= bucket - BUCKETS]
    assert here.requests == len(ended)
    assert (here.counts.requests, here.counts.prompt_tokens) == (len(inside), 3 * len(inside))
    for one in here.backends:
        mine = [row for row in inside if row[1] == one.name]
        assert one.window.requests == len(mine)
        last = [ttft for number, _, ttft in mine if number >= bucket - live.MINUTE and ttft is not None]
        assert (one.now.ttft_p95 is not None) == bool(last)
    assert sum(map(round, (rate * SECONDS for rate in here.series.requests))) == len([row for row in inside if row[0] < bucket])


def test_a_series_has_one_number_for_each_full_bucket_however_long_nothing_happened() -> None:
    what = folded(record(START + 1, ttft=0.05))
    for now in (START, START + 1, START + 17, START + WINDOW - 1, START + 100_000):
        here = seen(what, now)
        lines = msgspec.to_builtins(here.series)
        assert {len(line) for line in lines.values()} == {BUCKETS}
        assert {len(here.backends[0].ttft_p50), len(here.backends[0].ttft_p95)} == {BUCKETS}


def test_rates_are_of_the_last_seconds() -> None:
    what = folded(*[record(START + 60 + step / 10, tokens=(100, 20, 0)) for step in range(100)])
    now = seen(what, START + 70).now
    assert (now.requests, now.prompt, now.completion) == (10.0, 1000.0, 200.0)
    assert seen(what, START + 90).now.requests == 0.0


def test_the_first_seconds_do_not_count_as_if_there_had_been_more() -> None:
    what = folded(*[record(START + 1.9) for _ in range(10)])
    assert seen(what, START + 2).now.requests == 5.0


def test_other_routes_are_not_the_gateways_work() -> None:
    assert seen(folded(record(START, route="/metrics")), START).requests == 0


def test_a_client_that_leaves_is_told_apart_from_errors() -> None:
    here = seen(folded(record(START, code="client_cancelled", fault="caller", retries=["backend_error"])), START)
    assert (here.counts.errors, here.retries) == (0, 1)
    assert [one.code for one in here.errors] == ["client_cancelled"]


# --- times to the first token


@settings(deadline=None)
@given(st.lists(st.floats(0.0011, 1000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_a_quantile_is_right_to_the_width_of_a_bucket(times: list[float], part: float) -> None:
    what = folded(*[record(START, 2000.0, ttft=ttft) for ttft in times])
    _, filling = what.of("a")
    found = quantile(filling.times, part)
    exact = sorted(times)[math.ceil(part * len(times)) - 1]
    assert found is not None
    assert exact / 1.27 <= found <= exact * 1.27


def test_there_is_no_quantile_of_nothing_and_the_longest_is_bounded() -> None:
    assert quantile([], 0.5) is None
    assert seen(folded(record(START, 1e6, ttft=1e5)), START).now.ttft_p95 == pytest.approx(BOUNDS[-1])


def test_the_times_of_now_are_those_of_the_last_minute() -> None:
    what = folded(record(START + 1, 5.0, ttft=4.0), record(START + 100, ttft=0.05))
    here = seen(what, START + 101).backends[0]
    assert here.now.ttft_p95 is not None
    assert here.now.ttft_p95 < 0.1
    assert max(one for one in here.ttft_p95 if one is not None) > 3.0


# --- requests


def test_the_latest_come_first_and_say_why_they_went_where_they_did() -> None:
    what = folded(*[record(START + number, request_id=f"r{number}", decision="prefix 8/9") for number in range(30)])
    here = seen(what, START + 30)
    assert [one.id for one in here.latest] == [f"r{29 - place}" for place in range(LATEST)]
    assert (here.latest[0].decision, here.latest[0].backend, here.latest[0].ago) == ("prefix 8/9", "a", 1.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.001, 100)), max_size=80))
def test_the_slowest_are_those_of_the_whole_window(asked: list[tuple[float, float]]) -> None:
    what, now = Live(START), START
    totals = []
    for wait, total in asked:
        now += wait
        what(record(now, total))
        totals.append((int(now // SECONDS), now - (now - total)))
    here = seen(what, now)
    inside = sorted((total for number, total in totals if number >= int(now // SECONDS) - BUCKETS), reverse=True)
    assert [one.total for one in here.slowest] == [round(total, 4) for total in inside[:SLOWEST]]


# --- bounds


def test_names_are_short_and_printable_whatever_they_are() -> None:
    evil = "<img src=x onerror=alert(1)>\x1b[31m\u202e\x00\n" + "m" * 10_000
    what = folded(record(START, model=evil, tenant=evil, request_id=evil, decision=evil, backend=evil))
    how = status(state(evil, reason=evil), scheduling=NOTHING._replace(waiting={evil: 2}))
    here = seen(what, START, how)
    texts = [here.latest[0].model, here.latest[0].tenant, here.latest[0].id, here.latest[0].backend, here.tenants[0].name]
    for text in [*texts, here.backends[0].name, here.backends[0].reason]:
        assert text.isprintable()
        assert text.startswith("<img src=x onerror=alert(1)>\ufffd[31m\ufffd\ufffd\ufffd")
        assert len(text) <= REASON + 1
    assert len(what.latest[0].model) < 100
    assert len(msgspec.json.encode(here)) < 16_000


@given(st.text(max_size=300))
def test_shown_leaves_good_names_alone(name: str) -> None:
    if name.isprintable() and len(name) <= live.LONGEST:
        assert shown(name) == name
    assert shown(name).isprintable()


def test_of_many_tenants_some_are_shown_and_all_are_counted() -> None:
    what = folded(*[record(START, tenant=f"t{number}", tokens=(number, 0, 0)) for number in range(1000)])
    assert all(len(bucket.tenants) <= TENANTS + 1 for bucket in what.buckets())
    here = seen(what, START, status(scheduling=NOTHING._replace(waiting={"t500": 7, "new": 1})))
    assert len(here.tenants) == SHOWN_TENANTS + 1
    assert [(one.name, one.waiting) for one in here.tenants[:2]] == [("t500", 7), ("new", 1)]
    assert here.tenants[-1].name == live.OTHERS
    assert sum(one.requests for one in here.tenants) == 1000
    assert sum(one.tokens for one in here.tenants) == sum(range(1000))


def test_what_is_kept_does_not_grow() -> None:
    what = Live(START)
    for number in range(20_000):
        name = str(number % 500)
        what(record(START + number / 10, tenant=name, backend=f"b{number % 7}", code="queue_full", fault="gateway", ttft=0.1))
    assert len(list(what.buckets())) == BUCKETS + 1
    assert sum(len(bucket.slowest) for bucket in what.buckets()) <= SLOWEST * (BUCKETS + 1)
    assert len(what._tracks) == 7
    seen(what, START + 100_000)
    assert not what._tracks


# --- how things stand


def test_a_backend_is_shown_with_what_it_says_of_itself() -> None:
    load = Load(running=3, waiting=2, kv_usage=0.25, at=START)
    how = status(
        state("a", slots=4, load=load, breaker="half_open", opened=2, restarts=1),
        scheduling=NOTHING._replace(
            inflight={"a": 3}, index_tokens={"a": 77}, depth={"interactive": 1, "default": 0, "batch": 4}
        ),
    )
    here = seen(Live(START), START + 5, how)
    one = here.backends[0]
    assert (one.held, one.slots, one.running, one.waiting, one.kv_usage, one.cached_tokens) == (3, 4, 3, 2, 0.25, 77)
    assert (one.breaker, one.opened, one.restarts, one.since) == ("half_open", 2, 1, 5.0)
    assert (here.inflight, here.queued, here.priorities["batch"]) == (3, 5, 4)
    assert here.latest == []
    assert not here.echo
    assert seen(Live(START), START, status(state("echo", kind="echo"))).echo
