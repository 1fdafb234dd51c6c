from __future__ import annotations

import json
from typing import Any, cast

import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure

from gateway.core.record import Record
from gateway.core.repeats import MAX_REPEATS, SECONDS
from gateway.core.trace_context import Trace
from gateway.core.usage import Usage
from gateway.logs import QUIET, AccessText, LineObserver, access_fields, access_log


class Log:
    """A logger, its observer, and the lines that came of it; ``now`` is what the observer takes for the time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lines: list[dict[str, Any]] = []
        self.now = 1000.0
        self.observer = LineObserver(lambda text: self.lines.extend(map(json.loads, text.splitlines())), "json")
        self.log = Logger("gateway.pool", observer=LogPublisher(self.observer))
        patch.setattr("gateway.logs.time", lambda: self.now)

    def warn(self, name: str) -> None:
        self.log.warn("backend {name} is unhealthy", name=name)

    def said(self) -> list[str]:
        return [line["message"] for line in self.lines]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


def test_a_warning_that_repeats_itself_is_counted(log: Log) -> None:
    for _ in range(100):
        log.warn("a")
    log.warn("b")
    log.log.info("something else")
    assert log.said() == [*["backend a is unhealthy"] * MAX_REPEATS, "backend b is unhealthy", "something else"]
    log.now += SECONDS
    log.log.info("later")
    assert log.said()[-2:] == [f"{100 - MAX_REPEATS} times more within 60 s: backend a is unhealthy", "later"]
    log.warn("a")
    assert log.said()[-1] == "backend a is unhealthy"


@pytest.mark.parametrize("route", sorted(QUIET))
def test_who_watches_has_no_lines_unless_something_is_wrong(log: Log, route: str) -> None:
    said: Any = []
    observers = (log.observer.access(Clock()), access_log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.logs._log", Logger("gateway.access", observer=LogPublisher(cast(Any, said.append))))
        for status in (200, 401, 200):
            for observe in observers:
                observe(Record("r", "GET", route, 1.0, status=status, ended=2.0))
    log.observer.flush()
    assert [line["status"] for line in log.lines] == [401]
    assert len(said) == 1


def test_what_is_no_warning_is_always_said(log: Log) -> None:
    for _ in range(100):
        log.log.info("listens")
    assert len(log.lines) == 100


def test_a_bug_that_every_request_meets_has_few_tracebacks(log: Log) -> None:
    for number in range(100):
        try:
            raise ValueError("oops")
        except ValueError:
            log.log.failure("{id}: a bug in the gateway", Failure(), id=f"request-{number}")
    assert len(log.lines) == MAX_REPEATS
    log.observer.close()
    assert log.said()[-1] == f"{100 - MAX_REPEATS} times more within 60 s: {{id}}: a bug in the gateway"


def test_lines_of_requests_bring_what_was_kept_back_too(log: Log) -> None:
    for _ in range(MAX_REPEATS + 1):
        log.warn("a")
    log.now += SECONDS
    log.observer._gathered.append(json.dumps({"message": "a request"}) + "\n")
    log.observer.flush()
    assert log.said()[-2:] == ["a request", "1 times more within 60 s: backend a is unhealthy"]


@pytest.mark.parametrize("trace", [None, Trace("ab" * 16, "cd" * 8, False), Trace("ab" * 16, "", True, first=7)])
def test_the_quick_text_is_that_of_the_fields(trace: Trace | None) -> None:
    record = Record(
        "r", "POST", "/v1/chat/completions", 1.0, client="::1", model="m", backend="b", attempts=1, status=200, ended=2.0
    )
    record.usage, record.finish_reason, record.queued, record.trace = Usage(3, 4, 2, True), "stop", 0.25, trace
    text = AccessText()
    assert text(record) == str(access_fields(record))
    assert text(record) == str(access_fields(record))
    assert ("trace_id" in text(record)) == (trace is not None)
