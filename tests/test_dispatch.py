"""Leases on a stopped clock: the scheduler and the pool are the real ones, the backends only have names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock

from gateway.core.backend_settings import BackendSettings
from gateway.core.errors import BackendFailed, GatewayError
from gateway.core.policy import ExpectedCompletion, LeastLoad
from gateway.core.prefix import blocks_of
from gateway.core.reports import Report
from gateway.core.scheduler import Scheduler
from gateway.core.settings import Settings
from gateway.core.tickets import BOUNDS, Bounds, Ticket
from gateway.core.usage import Usage
from gateway.dispatch import Dispatcher, Lease
from gateway.pool import Pool

from .fakes import now_of

FAILED = BackendFailed("backend_error", "it failed")
UP = Report("openai", models=({"id": "m"},))
PATIENCE = 30.0


class Named:
    """A backend of which only the name matters."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def send(self, call: Any) -> Any:
        raise NotImplementedError

    async def models(self, headers: Any) -> Any:
        raise NotImplementedError

    async def probe(self) -> Any:
        return await Deferred()


class Desk:
    """A dispatcher of backends with one slot each, unless told otherwise; the first ``up`` of them have been found in order."""

    def __init__(
        self, *names: str, up: int = 100, bounds: Bounds = BOUNDS, hashes: bool = False, slots: int | None = 1, **more: Any
    ) -> None:
        self.clock = Clock()
        self.clock.advance(1000.0)
        own = tuple(BackendSettings(name=name, url="", slots=slots) for name in names)
        backends = {name: Named(name) for name in names}
        self.pool = Pool(list(backends.values()), Settings(backends=own, **more), self.clock, random=lambda: 0.5)
        self.scheduler = Scheduler(ExpectedCompletion() if hashes else LeastLoad(), bounds)
        self.dispatcher = Dispatcher(self.scheduler, self.pool, backends, self.clock)
        self.pool.startService()
        for name in names[:up]:
            self.up(name)

    def up(self, name: str, report: Report = UP) -> None:
        self.pool._reported(name, report)

    def gone(self, name: str, times: int = 2) -> None:
        for _ in range(times):
            self.pool._unreachable(name, BackendFailed("backend_unreachable", "nobody there"))

    def lease(self, model: str = "m", *, deadline: float = float("inf"), text: str = "", patience: float = PATIENCE) -> Lease:
        now = self.clock.seconds()
        return self.dispatcher.lease(
            Ticket(model, now, expires=now + patience, deadline=deadline, prompt=blocks_of("m", text), prompt_tokens=10)
        )

    def name_of(self, lease: Lease) -> str | None:
        return None if lease.backend is None else lease.backend.name

    @property
    def inflight(self) -> int:
        return sum(self.scheduler.snapshot().inflight.values())

    @property
    def waiting(self) -> int:
        return sum(self.scheduler.snapshot().depth.values())

    @property
    def held(self) -> int:
        return sum(state.held for state in self.pool.snapshot())

    def stop(self) -> None:
        """No timer is left once it has been stopped."""
        self.pool.stopService()
        self.dispatcher.close()
        assert not self.clock.getDelayedCalls()


def code_of(lease: Lease) -> str:
    with pytest.raises(GatewayError) as caught:
        now_of(lease.granted())
    return caught.value.code


def refusal(desk: Desk, **more: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        desk.lease(**more)
    return caught.value


def test_a_backend_that_is_free_is_had_at_once_and_given_back() -> None:
    desk = Desk("a")
    with desk.lease() as lease:
        assert desk.name_of(lease) == "a"
        assert (desk.inflight, desk.held) == (1, 1)
    assert (desk.inflight, desk.held) == (0, 0)
    desk.stop()


def test_who_waits_gets_it_in_the_turn_in_which_it_is_given_back() -> None:
    desk = Desk("a")
    first, second, third = desk.lease(), desk.lease(), desk.lease()
    granted = second.granted()
    assert (second.backend, desk.waiting) == (None, 2)
    desk.clock.advance(2.0)
    first.end()
    assert now_of(granted).name == "a"
    assert second.ticket.granted_at - second.ticket.arrived == 2.0
    assert (third.backend, desk.waiting) == (None, 1)
    second.end()
    assert desk.name_of(third) == "a"
    third.end()
    desk.stop()


def test_who_waits_too_long_is_told_so_by_the_clock_alone() -> None:
    desk = Desk("a")
    held, waits = desk.lease(), desk.lease(patience=7.0)
    granted = waits.granted()
    desk.clock.advance(6.9)
    assert not granted.called
    desk.clock.advance(0.2)
    with pytest.raises(GatewayError) as caught:
        now_of(granted)
    assert (caught.value.code, caught.value.status, desk.waiting) == ("queue_timeout", 503, 0)
    assert 1.0 <= (caught.value.retry_after or 0.0) <= 120.0
    waits.end(caught.value)
    held.end()
    assert (desk.inflight, desk.held) == (0, 0)
    desk.stop()


def test_a_deadline_of_the_client_ends_the_wait_before_the_queues_own() -> None:
    desk = Desk("a")
    held, waits = desk.lease(), desk.lease(deadline=desk.clock.seconds() + 3.0)
    granted = waits.granted()
    desk.clock.advance(3.1)
    with pytest.raises(GatewayError):
        now_of(granted)
    waits.end()
    held.end()
    desk.stop()


def test_with_no_patience_at_all_nobody_waits() -> None:
    desk = Desk("a")
    held = desk.lease()
    waits = desk.lease(patience=0.0)
    assert (code_of(waits), desk.waiting) == ("queue_timeout", 0)
    waits.end()
    held.end()
    desk.stop()


def test_a_client_that_leaves_the_queue_leaves_nothing_behind() -> None:
    desk = Desk("a")
    first, second, third = desk.lease(), desk.lease(), desk.lease()
    for lease in (second, third):
        lease.granted().addErrback(lambda failure: failure.trap(CancelledError))
    second.end(CancelledError())
    assert desk.waiting == 1
    first.end()
    assert (second.backend, desk.name_of(third)) == (None, "a")
    third.end()
    desk.stop()


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    desk = Desk("a", bounds=Bounds(requests=1))
    held, waits = desk.lease(), desk.lease()
    full = refusal(desk)
    assert (full.code, full.status, desk.waiting) == ("queue_full", 429, 1)
    assert 1.0 <= (full.retry_after or 0.0) <= 120.0
    waits.end()
    held.end()
    desk.stop()


def test_a_model_that_nobody_has_and_one_whose_backend_is_down_are_told_apart() -> None:
    desk = Desk("a", panic=False)
    assert refusal(desk, model="other").code == "model_not_found"
    desk.gone("a")
    down = refusal(desk)
    assert (down.code, down.retry_after) == ("no_backend", 2.0)  # the next look
    assert refusal(desk, model="other").code == "model_not_found"
    assert desk.waiting == 0
    desk.stop()


def test_a_backend_that_is_about_to_be_there_is_waited_for() -> None:
    desk = Desk("a", up=0)
    lease = desk.lease()
    granted = lease.granted()
    assert desk.waiting == 1
    desk.up("a")
    assert now_of(granted).name == "a"
    lease.end()
    desk.stop()


def test_a_backend_that_comes_back_serves_those_that_wait_for_another() -> None:
    desk = Desk("a", "b", up=2)
    desk.gone("b")
    held, waits = desk.lease(), desk.lease()
    assert waits.backend is None
    desk.up("b")
    assert desk.name_of(waits) == "b"
    held.end()
    waits.end()
    desk.stop()


def test_a_drained_backend_is_nobodys_until_it_is_back() -> None:
    desk = Desk("a", "b")
    desk.pool.drain("a")
    first, second = desk.lease(), desk.lease()
    assert (desk.name_of(first), second.backend) == ("b", None)
    desk.pool.undrain("a")
    assert desk.name_of(second) == "a"
    first.end()
    second.end()
    desk.stop()


def test_failures_open_the_breaker_and_time_lets_one_try() -> None:
    desk = Desk("a", "b", breaker_failures=2, breaker_open=10.0)
    for _ in range(2):
        desk.pool.drain("b")
        desk.lease().end(FAILED)
        desk.pool.undrain("b")
    assert {desk.name_of(lease) for lease in (desk.lease(), desk.lease())} == {"b", None}
    third = desk.lease()
    assert third.backend is None
    desk.clock.advance(10.0)  # half open: one of the two that wait is the trial
    assert [state.breaker for state in desk.pool.snapshot()] == ["half_open", "closed"]
    assert desk.scheduler.snapshot().inflight == {"a": 1, "b": 1}
    assert desk.waiting == 1
    desk.stop()


def test_clients_that_leave_and_answers_of_4xx_open_nothing() -> None:
    desk = Desk("a", breaker_failures=1)
    desk.lease().end(CancelledError())
    desk.lease().end()
    state = desk.pool.snapshot()[0]
    assert (state.breaker, state.state, state.held) == ("closed", "healthy", 0)
    desk.stop()


def test_a_failure_in_the_middle_of_an_answer_counts_too() -> None:
    desk = Desk("a", breaker_failures=1, panic=False)
    with desk.lease() as lease:
        lease.first_byte()
        lease.failed(FAILED)
    assert desk.pool.snapshot()[0].breaker == "open"
    assert refusal(desk).code == "no_backend"
    desk.stop()


def test_a_backend_that_asks_for_patience_gets_it() -> None:
    desk = Desk("a", "b")
    with desk.lease() as lease:
        lease.rate_limited(20.0)
        limited = desk.name_of(lease)
    for _ in range(4):
        with desk.lease() as other:
            assert desk.name_of(other) != limited
    states = {state.name: state.state for state in desk.pool.snapshot()}
    assert states[limited or ""] == "rate_limited"
    desk.clock.advance(20.1)
    assert {state.state for state in desk.pool.snapshot()} == {"healthy"}
    desk.stop()


def test_a_new_process_has_an_empty_cache() -> None:
    desk = Desk("a", "b", hashes=True)
    with desk.lease(text="word " * 2000) as lease:
        lease.first_byte()
        lease.usage = Usage(prompt_tokens=2000, completion_tokens=1)
        name = desk.name_of(lease) or ""
    index = desk.scheduler.snapshot().index_tokens
    assert index[name] > 1000
    desk.gone(name)
    assert desk.scheduler.snapshot().index_tokens == index  # perhaps only the way there is broken
    desk.up(name)
    assert desk.scheduler.snapshot().index_tokens[name] == 0
    desk.stop()


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "end", "leave", "fail", "limit", "later", "drain", "undrain", "gone", "up"]), st.integers(0, 7)
    ),
    max_size=60,
)


class Story:
    """A desk at which anything may happen, and what its clients know of it."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.open: list[Lease] = []
        self.told: dict[Lease, int] = {}

    def do(self, what: str, number: int) -> None:
        name = "abc"[number % 3]
        if what == "ask":
            self._ask()
        elif what in ("end", "leave", "fail", "limit"):
            self._end(what, number)
        elif what == "later":
            self.desk.clock.advance(number * 4.0)
        elif what == "gone":
            self.desk.gone(name)
        elif what == "up":
            self.desk.up(name)
        else:
            self.desk.pool.drain(name) if what == "drain" else self.desk.pool.undrain(name)

    def _ask(self) -> None:
        try:
            lease = self.desk.lease()
        except GatewayError:
            return
        self.open.append(lease)
        if lease.backend is None:
            self.told[lease] = 0
            lease.granted().addCallbacks(lambda _: self._count(lease), lambda failure: self._refused(lease, failure))

    def _count(self, lease: Lease) -> None:
        self.told[lease] += 1

    def _refused(self, lease: Lease, failure: Any) -> None:
        self._count(lease)
        self.open.remove(lease)
        lease.end(failure.value)

    def _end(self, how: str, number: int) -> None:
        if not self.open:
            return
        lease = self.open.pop(number % len(self.open))
        if lease.backend is None or how == "leave":
            lease.end(CancelledError())
            return
        if how == "limit":
            lease.rate_limited(5.0)
        lease.end(FAILED if how == "fail" else None)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_whatever_happens_no_slot_leaks_and_each_client_is_told_once(steps: list[Step]) -> None:
    desk = Desk("a", "b", "c", bounds=Bounds(requests=4), breaker_failures=2)
    story = Story(desk)
    for what, number in steps:
        story.do(what, number)
        bound = [lease for lease in story.open if lease.backend is not None]
        assert desk.inflight == desk.held == len(bound)
        assert desk.waiting == len(desk.dispatcher._waiting) == len(story.open) - len(bound) <= 4
        assert max(desk.scheduler.snapshot().inflight.values()) <= 1
    while story.open:
        story.do("end", 0)
    assert (desk.inflight, desk.held, desk.waiting) == (0, 0, 0)
    assert all(told <= 1 for told in story.told.values())
    desk.stop()


def test_answers_that_are_not_streamed_teach_how_many_a_backend_takes_at_once() -> None:
    desk = Desk("a", slots=None, adaptive_concurrency=True)
    before = desk.pool._offers["a"].slots
    for _ in range(20):
        leases = [desk.lease() for _ in range(50)]
        desk.clock.advance(0.01)
        for lease in leases:
            lease.ticket.streams = False
            lease.usage = Usage(10, 5)
            lease.end()
    after = desk.pool._offers["a"].slots
    assert before is not None
    assert after is not None
    assert after > before
    assert (desk.inflight, desk.held) == (0, 0)
    desk.stop()
