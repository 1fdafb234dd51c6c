"""Races on a stopped clock, between attempts that begin or fail when a test says so."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock

from gateway.backend import Answer
from gateway.core.errors import BackendFailed
from gateway.core.slowest import ENOUGH
from gateway.core.tickets import Ticket
from gateway.hedge import Hedge

from .fakes import now_of

ANSWER = Answer(200, [], b"")
QUICK = 0.1
"""Seconds to the first token of all that a `Races` has seen."""


class FakeLease:
    def __init__(self, ticket: Ticket, seconds: float) -> None:
        self.ticket = ticket
        self.first_byte_seconds = seconds
        self.ended: list[BaseException | None] = []

    def end(self, problem: BaseException | None = None) -> None:
        self.ended.append(problem)


class FakeStream:
    def __init__(self) -> None:
        self.stopped = False

    def stopProducing(self) -> None:
        self.stopped = True


class Attempt:
    """``deaf``: it begins although it was cancelled, as one does whose first byte comes in that very turn."""

    def __init__(self, ticket: Ticket, *, deaf: bool = False) -> None:
        self.ticket = ticket
        self.cancelled = False
        self.begun: Deferred[Any] = Deferred(self._cancel)
        self.lease: FakeLease | None = None
        self.stream = FakeStream()
        self._deaf = deaf

    def _cancel(self, begun: Deferred[Any]) -> None:
        self.cancelled = True
        if self._deaf:
            self.begin(self.stream)

    def begin(self, reply: Any = ANSWER, seconds: float = QUICK) -> FakeLease:
        self.lease = lease = FakeLease(self.ticket, seconds)
        self.begun.callback((lease, reply))
        return lease

    def fail(self, code: str = "backend_error") -> None:
        self.begun.errback(BackendFailed(code, "it failed"))


class Races:
    """A hedge that knows the ``known`` last requests of one class to have been quick."""

    def __init__(self, known: int = ENOUGH, *, second: bool = True) -> None:
        self.clock = Clock()
        self.attempts: list[Attempt] = []
        self.asked = 0
        self.deaf = False
        self._hedge = Hedge(self.clock)
        self._second = second
        for _ in range(known):
            racing = self.race()
            self.attempts.pop().begin()
            now_of(racing)
        assert not self.clock.getDelayedCalls()

    def race(self, *, sent: bool = True) -> Deferred[Any]:
        ticket = Ticket("m", self.clock.seconds(), prompt_tokens=100)
        if sent:
            self.send(ticket)
        return ensureDeferred(self._hedge.race(self._attempt, ticket, self._again))

    def send(self, ticket: Ticket) -> None:
        ticket.backend, ticket.granted_at = "first", self.clock.seconds()

    async def _attempt(self, ticket: Ticket) -> Any:
        attempt = Attempt(ticket, deaf=self.deaf)
        self.attempts.append(attempt)
        return await attempt.begun

    def _again(self, ticket: Ticket) -> Ticket | None:
        self.asked += 1
        return Ticket("m", ticket.arrived, tried=frozenset(["first"])) if self._second else None


def test_nothing_is_late_before_there_is_anything_to_compare_with() -> None:
    races = Races(known=ENOUGH - 1)
    racing = races.race()
    races.clock.advance(1000.0)
    assert len(races.attempts) == 1
    lease = races.attempts[0].begin()
    assert now_of(racing) == (lease, ANSWER)


def test_a_late_token_starts_a_second_attempt_and_the_slower_one_is_cancelled() -> None:
    races = Races()
    racing = races.race()
    races.clock.advance(QUICK * 0.9)
    assert len(races.attempts) == 1
    races.clock.advance(QUICK * 0.2)
    first, second = races.attempts
    assert second.ticket.tried == {"first"}
    lease = second.begin()
    assert now_of(racing) == (lease, ANSWER)
    assert first.cancelled
    assert not races.clock.getDelayedCalls()


def test_the_slower_one_is_cancelled_before_anything_goes_on() -> None:
    """What is done with the winner may be over before it is known that it has won: a whole answer may be there."""
    races = Races()
    seen: list[bool] = []
    races.race().addCallback(lambda _: seen.append(races.attempts[0].cancelled))
    races.clock.advance(QUICK * 1.1)
    races.attempts[1].begin()
    assert seen == [True]


def test_the_first_may_still_win() -> None:
    races = Races()
    racing = races.race()
    races.clock.advance(QUICK * 1.1)
    first, second = races.attempts
    lease = first.begin()
    assert now_of(racing) == (lease, ANSWER)
    assert second.cancelled


def test_there_are_never_more_than_two() -> None:
    races = Races()
    racing = races.race()
    races.clock.advance(QUICK * 1.1)
    races.clock.advance(1000.0)
    assert len(races.attempts) == 2
    races.attempts[0].begin()
    now_of(racing)


def test_time_in_the_queue_is_not_the_backends() -> None:
    races = Races()
    racing = races.race(sent=False)
    races.clock.pump([QUICK] * 20)
    assert len(races.attempts) == 1
    races.send(races.attempts[0].ticket)
    races.clock.advance(QUICK * 0.5)
    assert len(races.attempts) == 1
    races.clock.pump([QUICK * 0.5] * 3)
    assert len(races.attempts) == 2
    races.attempts[1].begin()
    now_of(racing)
    assert not races.clock.getDelayedCalls()


def test_no_second_where_there_is_to_be_none() -> None:
    races = Races(second=False)
    racing = races.race()
    races.clock.advance(1000.0)
    assert (races.asked, len(races.attempts)) == (1, 1)
    races.attempts[0].begin()
    now_of(racing)


def test_a_failure_before_it_is_late_is_a_failure() -> None:
    races = Races()
    racing = races.race()
    races.attempts[0].fail()
    with pytest.raises(BackendFailed):
        now_of(racing)
    races.clock.advance(1000.0)
    assert len(races.attempts) == 1
    assert not races.clock.getDelayedCalls()


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_leaves_the_race_to_the_other(failing: int) -> None:
    races = Races()
    racing = races.race()
    races.clock.advance(QUICK * 1.1)
    races.attempts[failing].fail()
    assert not racing.called
    lease = races.attempts[1 - failing].begin()
    assert now_of(racing) == (lease, ANSWER)


def test_when_both_fail_the_last_failure_counts() -> None:
    races = Races()
    racing = races.race()
    races.clock.advance(QUICK * 1.1)
    races.attempts[1].fail("backend_unreachable")
    races.attempts[0].fail("first_byte_timeout")
    with pytest.raises(BackendFailed) as caught:
        now_of(racing)
    assert caught.value.code == "first_byte_timeout"


def test_a_client_that_leaves_cancels_both() -> None:
    races = Races()
    racing = races.race()
    races.clock.advance(QUICK * 1.1)
    racing.cancel()
    with pytest.raises(CancelledError):
        now_of(racing)
    assert [attempt.cancelled for attempt in races.attempts] == [True, True]
    assert not races.clock.getDelayedCalls()


def test_a_loser_that_begins_all_the_same_is_given_back_and_its_stream_is_stopped() -> None:
    races = Races()
    racing = races.race()
    races.deaf = True
    races.clock.advance(QUICK * 1.1)
    lease = races.attempts[0].begin()
    assert now_of(racing) == (lease, ANSWER)
    assert not lease.ended
    loser = races.attempts[1]
    assert loser.stream.stopped
    assert loser.lease is not None
    assert [type(problem) for problem in loser.lease.ended] == [CancelledError]


def test_what_the_winner_took_is_remembered() -> None:
    races = Races(known=ENOUGH - 1)
    races.race()
    races.attempts[0].begin(seconds=5.0)
    racing = races.race()
    races.clock.advance(4.9)
    assert len(races.attempts) == 2
    races.clock.advance(0.2)
    assert len(races.attempts) == 3
    races.attempts[1].begin()
    now_of(racing)
