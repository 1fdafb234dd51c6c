from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.task import Clock

from gateway.jwks import AT_LEAST, EVERY, MAX_BYTES, RETRY, Jwks
from gateway.net.agent import BackendClient

from .conftest import Logged, Said
from .fakes import FakeAgent, FakeResponse


class Fetched:
    """The signing keys of an issuer whose answers a test gives by hand; `used` is what came."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.agent = FakeAgent()
        self.used: list[bytes] = []
        self.jwks = Jwks("https://issuer/jwks?p=1", BackendClient(self.agent), self.clock, self._use)
        self.jwks.startService()

    def _use(self, body: bytes) -> None:
        if body == b"bad":
            raise ValueError("it is bad")
        if body == b"bug":
            raise ZeroDivisionError
        self.used.append(body)

    def answer(self, body: bytes = b"one", code: int = 200) -> None:
        self.agent.answer(FakeResponse(code), body)

    @property
    def asked(self) -> int:
        return len(self.agent.requests)

    def refreshed(self) -> list[object]:
        """A list that gets something once it has happened."""
        found: list[object] = []
        self.jwks.refreshed().addBoth(found.append)
        return found

    def end(self) -> None:
        self.jwks.stopService()
        assert not self.clock.getDelayedCalls()


@pytest.fixture
def fetched() -> Iterator[Fetched]:
    made = Fetched()
    yield made
    made.end()


@pytest.fixture
def said() -> Iterator[list[str]]:
    with Said("gateway.jwks") as lines:
        yield lines


def test_keys_are_fetched_at_the_start_and_every_few_minutes(fetched: Fetched) -> None:
    assert fetched.agent.requests[0][:2] == (b"GET", b"https://issuer/jwks?p=1")
    fetched.answer()
    assert (fetched.used, fetched.jwks.fetched) == ([b"one"], True)
    fetched.clock.advance(EVERY - 1)
    assert fetched.asked == 1
    fetched.clock.advance(1)
    fetched.answer(b"two")
    assert fetched.used == [b"one", b"two"]


def test_those_who_miss_a_key_at_the_same_time_share_a_fetch(fetched: Fetched) -> None:
    fetched.answer()
    fetched.clock.advance(AT_LEAST)
    waiting = [fetched.refreshed() for _ in range(5)]
    assert fetched.asked == 2
    assert waiting == [[]] * 5
    fetched.answer(b"two")
    assert waiting == [[None]] * 5
    assert not fetched.jwks._waiting


def test_unknown_keys_do_not_make_it_fetch_more_often_than_it_may(fetched: Fetched) -> None:
    fetched.answer()
    for _ in range(100):
        assert fetched.refreshed() == [None]
    assert fetched.asked == 1
    fetched.clock.advance(AT_LEAST)
    fetched.refreshed()
    fetched.answer()
    assert [fetched.refreshed() for _ in range(100)] == [[None]] * 100
    assert fetched.asked == 2


def test_a_client_that_leaves_does_not_stop_the_fetch_of_the_others(fetched: Fetched) -> None:
    leaves: Deferred[None] = fetched.jwks.refreshed()
    stays = fetched.refreshed()
    left: list[Any] = []
    leaves.addErrback(left.append)
    leaves.cancel()
    assert left[0].check(CancelledError)
    fetched.answer()
    assert (stays, fetched.used) == ([None], [b"one"])


@pytest.mark.parametrize("how", ["refused", "status", "bad", "large", "silent"])
def test_while_a_fetch_fails_the_keys_stay_and_it_is_said_once(fetched: Fetched, said: list[str], how: str) -> None:
    fetched.answer()
    for _ in range(3):
        fetched.clock.advance(EVERY)
        if how == "refused":
            fetched.agent.fail(ConnectionRefusedError())
        elif how == "silent":
            fetched.clock.advance(5)
            fetched.agent.waiting.clear()
        else:
            body = {"status": b"no", "bad": b"bad", "large": b"x" * (MAX_BYTES + 1)}[how]
            fetched.answer(body, 500 if how == "status" else 200)
    assert fetched.used == [b"one"]
    assert len(said) == 2
    assert "the signing keys of before stay" in said[1]
    fetched.clock.advance(RETRY)
    fetched.answer(b"two")
    assert fetched.used == [b"one", b"two"]
    assert len(said) == 3


def test_a_failed_fetch_is_tried_again_soon(fetched: Fetched) -> None:
    fetched.agent.fail(ConnectionRefusedError())
    assert not fetched.jwks.fetched
    fetched.clock.advance(RETRY)
    fetched.answer()
    assert fetched.jwks.fetched


def test_who_waits_is_told_that_the_fetch_failed_by_nothing_new(fetched: Fetched) -> None:
    waiting = fetched.refreshed()
    fetched.agent.fail(ConnectionRefusedError())
    assert waiting == [None]


def test_a_bug_is_logged_and_the_next_fetch_comes(fetched: Fetched, logged: Logged) -> None:
    fetched.answer(b"bug")
    assert [type(failure) for failure in logged.flush()] == [ZeroDivisionError]
    fetched.clock.advance(EVERY)
    fetched.answer()
    assert fetched.used == [b"one"]


def test_a_stop_in_the_middle_of_a_fetch_leaves_nothing_behind() -> None:
    fetched = Fetched()
    waiting = fetched.refreshed()
    fetched.end()
    assert (fetched.agent.cancelled, waiting) == (1, [None])
