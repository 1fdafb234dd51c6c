"""What every test stands on: nothing may be left behind, and nothing may fail in silence."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import hypothesis
import pytest
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from zope.interface import implementer

hypothesis.settings.register_profile("gateway", deadline=None)  # no test depends on the speed of the machine
hypothesis.settings.load_profile("gateway")


def cannot_run(why: str, remedy: str) -> NoReturn:
    """Skip a test whose machine lacks something; under CI, where everything must run, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"{why}: {remedy}")
    pytest.skip(f"{why}: {remedy}")


@implementer(ILogObserver)
class Logged:
    """The failures that were logged while a test ran."""

    def __init__(self) -> None:
        self.failures: list[LogEvent] = []

    def __call__(self, event: LogEvent) -> None:
        if "log_failure" in event:
            self.failures.append(event)

    def flush(self) -> list[BaseException]:
        """Take the failures that the test expected."""
        taken, self.failures = self.failures, []
        return [event["log_failure"].value for event in taken]


@implementer(ILogObserver)
class Said:
    """The lines that one part of the gateway logged, as they are written, while a block ran."""

    def __init__(self, namespace: str) -> None:
        self.lines: list[str] = []
        self._namespace = namespace

    def __call__(self, event: LogEvent) -> None:
        if event.get("log_namespace") == self._namespace:
            self.lines.append(formatEvent(event))

    def __enter__(self) -> list[str]:
        globalLogPublisher.addObserver(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        globalLogPublisher.removeObserver(self)


@pytest.fixture(autouse=True)
def logged(request: pytest.FixtureRequest) -> Iterator[Logged]:
    """Fails a test that logged a failure, or dropped a Deferred with an unhandled one, or left a delayed call."""
    seen = Logged()
    if request.path.parent.name in {"core", "deploy"}:  # no reactor runs there
        yield seen
        return
    from twisted.internet import reactor

    running: Any = reactor
    before = set(running.getDelayedCalls())
    globalLogPublisher.addObserver(seen)
    try:
        yield seen
        gc.collect()
    finally:
        globalLogPublisher.removeObserver(seen)
    assert not seen.failures, [event["log_failure"].getTraceback() for event in seen.failures]
    left = [call for call in running.getDelayedCalls() if call not in before and call.active()]
    assert not left, left
