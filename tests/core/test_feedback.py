from __future__ import annotations

import pytest

from gateway.core.policy import ExpectedCompletion
from gateway.core.scheduler import Scheduler
from gateway.core.tickets import Ticket
from gateway.core.usage import Usage


def pool() -> Scheduler:
    scheduler = Scheduler(ExpectedCompletion())
    for name in ("a", "b"):
        scheduler.set_backend(name, 0.0)
    return scheduler


def serve(scheduler: Scheduler, now: float, residence: float, *, streams: bool) -> None:
    """A request whose first token comes when it was predicted, and whose answer takes so many seconds from there."""
    ticket = Ticket("", now, prompt_tokens=1000, streams=streams)
    assert scheduler.submit(ticket, now)
    read = now + ticket.seconds
    if streams:
        scheduler.first_token(ticket, read)
    scheduler.release(ticket, read + residence, Usage(prompt_tokens=1000, completion_tokens=10))


@pytest.mark.parametrize("streams", [True, False])
def test_how_long_answers_take_is_known_from_the_first_one_on(streams: bool) -> None:
    scheduler = pool()
    serve(scheduler, 0.0, 0.2, streams=streams)
    assert scheduler.backends.residence == pytest.approx(0.2)
    serve(scheduler, 10.0, 0.4, streams=streams)
    assert scheduler.backends.residence == pytest.approx(0.3)


def test_how_long_answers_take_follows_what_changes_but_slowly() -> None:
    scheduler = pool()
    for number in range(300):
        serve(scheduler, 10.0 * number, 1.0, streams=True)
    serve(scheduler, 3000.0, 9.0, streams=True)
    assert scheduler.backends.residence == pytest.approx(1.08)


def test_an_answer_that_failed_tells_nothing_of_how_long_answers_take() -> None:
    scheduler = pool()
    before = scheduler.backends.residence
    ticket = Ticket("", 0.0, prompt_tokens=1000)
    assert scheduler.submit(ticket, 0.0)
    scheduler.first_token(ticket, 1.0)
    scheduler.release(ticket, 1.1, None)
    assert scheduler.backends.residence == before
