"""Backends that come and go, on a stopped clock: pool, scheduler and dispatcher are the real ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from gateway.core.backend_settings import BackendSettings
from gateway.core.errors import BackendFailed, GatewayError
from gateway.core.policy import ExpectedCompletion
from gateway.core.prefix import blocks_of
from gateway.core.reports import Report
from gateway.core.scheduler import Scheduler
from gateway.core.settings import Settings
from gateway.core.spans import Place
from gateway.core.tickets import Ticket
from gateway.core.usage import Usage
from gateway.discovery import Discovery, Failed, Found
from gateway.dispatch import Dispatcher, Lease
from gateway.members import Change, Made, Members
from gateway.pool import Pool

from .fakes import now_of

FAILED = BackendFailed("backend_error", "it failed")
TEXT = "a prompt of some length " * 100


class Named:
    """A backend that answers a look when a test says so, and from then on at once."""

    def __init__(self, own: BackendSettings) -> None:
        self.name = own.name
        self.own = own
        self.looking: Deferred[None] = Deferred()
        self.says: Report | None = None

    async def send(self, call: Any) -> Any:
        raise NotImplementedError

    async def models(self, headers: Any) -> Any:
        raise NotImplementedError

    async def probe(self) -> Any:
        if self.says is None:
            await self.looking
        return self.says

    def answer(self, report: Report) -> None:
        self.says = report
        self.looking.callback(None)


def own(name: str, port: int = 1, **more: Any) -> BackendSettings:
    return BackendSettings(name=name, url=f"http://h:{port}", slots=1, **more)


class FakeSource:
    """A source whose finds a test gives by hand."""

    def __init__(self, found: Found, failed: Failed) -> None:
        self.found = found
        self.failed = failed
        self.runs = False

    def start(self) -> None:
        self.runs = True

    def stop(self) -> Deferred[None]:
        self.runs = False
        return succeed(None)


class House:
    """A gateway without its sockets."""

    def __init__(self, *wanted: BackendSettings, **more: Any) -> None:
        self.clock = Clock()
        self.clock.advance(1000.0)
        self.backends: dict[str, Any] = {}
        self.places: dict[str, Place] = {}
        self.closed: list[BackendSettings] = []
        self.changes = 0
        self.pool = Pool([], Settings(**more), self.clock, random=lambda: 0.5)
        self.scheduler = Scheduler(ExpectedCompletion())
        self.dispatcher = Dispatcher(self.scheduler, self.pool, self.backends, self.clock)
        self.sources: dict[str, FakeSource] = {}
        self.discovery = Discovery(self.make_source, self.clock.seconds)
        self.members = Members(self.make, self.pool, self.backends, self.places, self.discovery, self.changed)
        self.members.use(wanted)
        self.pool.startService()
        self.discovery.startService()

    def make_source(self, url: str, found: Found, failed: Failed) -> FakeSource:
        self.sources[url] = FakeSource(found, failed)
        return self.sources[url]

    def make(self, own: BackendSettings) -> Made:
        return Made(Named(own), lambda: self.closed.append(own))

    def changed(self) -> None:
        self.changes += 1

    def up(self, *names: str, model: str = "m") -> None:
        for name in names:
            self.backends[name].answer(Report("openai", models=({"id": model},)))

    def lease(self, model: str = "m", text: str = "") -> Lease:
        now = self.clock.seconds()
        return self.dispatcher.lease(Ticket(model, now, expires=now + 30.0, prompt=blocks_of("m", text), prompt_tokens=10))

    def states(self) -> dict[str, tuple[str, int]]:
        return {state.name: (state.state, state.held) for state in self.pool.snapshot()}

    def stop(self) -> None:
        """No timer is left once it has been stopped."""
        self.pool.stopService()
        self.dispatcher.close()
        assert not self.clock.getDelayedCalls()


def refusal(lease: Lease) -> str:
    with pytest.raises(GatewayError) as caught:
        now_of(lease.granted())
    return caught.value.code


def test_what_changes_is_told_by_name() -> None:
    house = House(own("a"), own("b"), own("c"))
    change = house.members.use([own("a"), own("c", weight=2.0), own("d"), own("e", 5)])
    assert change == Change(("d", "e"), ("b",), ("c",))
    assert str(change) == "added d, e; removed b; changed c"
    assert str(house.members.use([own("a"), own("c", weight=2.0), own("d"), own("e", 5)])) == "nothing has changed"
    assert set(house.backends) == set(house.places) == {"a", "c", "d", "e"}
    assert house.places["e"] == Place("h", 5, "http://h:5")
    house.stop()


def test_one_that_is_added_is_looked_at_and_requests_for_its_model_wait_for_that() -> None:
    house = House(own("a"))
    house.up("a", model="other")
    house.members.use([own("a"), own("b")])
    lease = house.lease()
    granted = lease.granted()
    assert lease.backend is None
    house.up("b")
    assert now_of(granted).name == "b"
    lease.end()
    house.stop()


def test_one_that_is_removed_ends_what_it_has_and_then_nothing_of_it_is_left() -> None:
    house = House(own("a"), own("b"))
    house.up("a", "b")
    leases = [house.lease(text=TEXT), house.lease(text=TEXT)]
    left = next(lease for lease in leases if lease.ticket.backend == "a")
    house.members.use([own("b")])
    assert house.states() == {"b": ("healthy", 1), "a": ("draining", 1)}
    assert house.scheduler.snapshot().inflight == {"a": 1, "b": 1}
    assert house.scheduler.snapshot().index_tokens.keys() == {"b"}
    assert [one.name for one in house.closed] == ["a"]
    for lease in leases:
        lease.usage = Usage(100, 10)
        lease.end()
    assert left.backend is not None
    assert house.states() == {"b": ("healthy", 0)}
    assert house.scheduler.snapshot().inflight == {"b": 0}
    assert house.scheduler.backends.names.count("") == 1
    house.members.use([own("b")])
    assert house.places.keys() == {"b"}
    house.stop()


@pytest.mark.parametrize("how", ["failed", "cancelled", "rate_limited", "answered"])
def test_however_its_last_request_ends_the_others_hear_nothing_of_it(how: str) -> None:
    house = House(own("a"), own("b"), breaker_failures=1)
    house.up("a", "b")
    leases = [house.lease(), house.lease()]
    house.members.use([own("b")])
    for lease in [lease for lease in leases if lease.ticket.backend == "a"]:
        if how == "rate_limited":
            lease.rate_limited(5.0)
        lease.end({"failed": FAILED, "cancelled": GatewayError("client_cancelled", "x")}.get(how))
    assert house.states() == {"b": ("healthy", 1)}
    for lease in leases:
        if lease.ticket.backend == "b":
            lease.end()
    house.stop()


def test_a_look_that_fails_because_it_is_ended_is_not_told() -> None:
    house = House(own("a"), own("b"))
    house.members.use([own("a")])
    house.backends["a"].looking = Deferred(lambda ended: ended.errback(FAILED))
    house.pool.stopService()
    house.pool.startService()
    house.members.use([own("b")])
    assert house.states() == {"b": ("warming", 0)}
    house.stop()


def test_its_look_ends_with_it() -> None:
    house = House(own("a"), own("b"))
    looking = house.backends["a"].looking
    house.members.use([own("b")])
    assert looking.called
    house.up("b")
    house.clock.advance(10.0)
    assert house.states() == {"b": ("healthy", 0)}
    house.stop()


def test_other_settings_change_nothing_that_has_been_learnt() -> None:
    house = House(own("a"), own("b"), breaker_failures=1)
    house.up("a", "b")
    for _ in range(2):
        with house.lease(text=TEXT) as lease:
            lease.usage = Usage(100, 10)
    cached = house.scheduler.snapshot().index_tokens
    assert sum(cached.values()) > 0
    house.pool.failed(house.pool.sent("a"), FAILED)
    house.members.use([own("a", weight=3.0), own("b", weight=2.0, models=("m", "n"))])
    assert {state.name: state.breaker for state in house.pool.snapshot()} == {"a": "open", "b": "closed"}
    assert house.scheduler.snapshot().index_tokens == cached
    assert house.pool.known_models() == frozenset({"m", "n"})
    assert house.scheduler.backends.weight == [3.0, 2.0]
    quick, slow = house.scheduler.backends.rates.seconds
    assert quick * 3.0 == pytest.approx(slow * 2.0)
    assert (house.changes, len(house.closed)) == (2, 2)
    house.stop()


def test_another_url_is_another_backend_and_the_ends_of_old_requests_do_not_count_against_it() -> None:
    house = House(own("a"), breaker_failures=1)
    house.up("a")
    old = house.lease(text=TEXT)
    house.members.use([own("a", 2)])
    assert house.states() == {"a": ("warming", 0)}
    house.up("a")
    new = house.lease(text=TEXT)
    assert (new.ticket.backend, new.ticket.cached_tokens, new.ticket.lane) == ("a", 0, 1)
    assert house.scheduler.snapshot().inflight == {"a": 2}
    old.end(FAILED)
    assert (house.states(), house.pool.snapshot()[0].breaker) == ({"a": ("healthy", 1)}, "closed")
    new.end()
    assert (house.states(), house.scheduler.snapshot().inflight, house.changes) == ({"a": ("healthy", 0)}, {"a": 0}, 2)
    house.stop()


def test_who_waits_for_a_model_that_nobody_has_any_more_is_told_and_the_others_go_on() -> None:
    house = House(own("a"), own("b"))
    house.up("a", model="m")
    house.up("b", model="n")
    held = [house.lease("m"), house.lease("n")]
    gone, waits = house.lease("m"), house.lease("n")
    granted = waits.granted()
    house.members.use([own("b")])
    assert refusal(gone) == "model_not_found"
    held[1].end()
    assert now_of(granted).name == "b"
    waits.end()
    held[0].end()
    house.stop()


def test_who_waits_goes_to_the_one_that_comes_in_the_place_of_another() -> None:
    house = House(own("a"))
    house.up("a")
    held, waits = house.lease(), house.lease()
    granted = waits.granted()
    house.members.use([own("b")])
    house.up("b")
    assert now_of(granted).name == "b"
    held.end()
    waits.end()
    house.stop()


def test_who_waits_goes_to_one_that_is_tried_for_want_of_a_better_one() -> None:
    house = House(own("a"), own("b"))
    house.up("a", "b")
    house.pool._unreachable("b", FAILED)
    house.pool._unreachable("b", FAILED)
    held, waits = house.lease(), house.lease()
    granted = waits.granted()
    house.members.use([own("b")])
    assert now_of(granted).name == "b"
    held.end()
    waits.end()
    house.stop()


def test_without_any_there_is_the_echo() -> None:
    house = House()
    assert house.states() == {"echo": ("warming", 0)}
    assert house.members.use([own("a")]) == Change(("a",), ("echo",), ())
    assert house.members.use([]) == Change(("echo",), ("a",), ())
    assert house.backends["echo"].own.kind == "echo"
    house.stop()


def test_a_backend_that_cannot_be_made_changes_nothing() -> None:
    house = House(own("a"))
    house.members._make = lambda own: 1 / 0  # type: ignore[assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        house.members.use([own("b")])
    assert set(house.backends) == {"a"} == set(house.states())
    house.stop()


NAMES = ["a", "b", "c", "d"]


@settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
class Comings(RuleBasedStateMachine):
    """Anything may happen in any order: what is counted is right, and nothing that is gone gets a request."""

    def __init__(self) -> None:
        super().__init__()
        self.house = House(own("a"), own("b"), breaker_failures=2)
        self.leases: list[Lease] = []

    @rule(
        names=st.lists(st.sampled_from(NAMES), unique=True),
        port=st.integers(1, 2),
        weight=st.sampled_from([1.0, 2.0]),
        up=st.booleans(),
    )
    def use(self, names: list[str], port: int, weight: float, up: bool) -> None:
        self.house.members.use([own(name, port, weight=weight) for name in names])
        for name in names if up else []:
            self.reported(name, "m")

    @rule(name=st.sampled_from(NAMES), model=st.sampled_from(["m", "n"]))
    def look(self, name: str, model: str) -> None:
        self.reported(name, model)

    def reported(self, name: str, model: str) -> None:
        if name in self.house.backends:
            self.house.pool._reported(name, Report("openai", models=({"id": model},)))

    @rule(name=st.sampled_from(NAMES))
    def away(self, name: str) -> None:
        if name in self.house.backends:
            self.house.pool._unreachable(name, FAILED)

    @rule(model=st.sampled_from(["m", "n"]), text=st.sampled_from(["", TEXT, TEXT + TEXT]))
    def ask(self, model: str, text: str) -> None:
        try:
            lease = self.house.lease(model, text)
        except GatewayError:
            return
        self.leases.append(lease)
        lease.granted().addErrback(lambda _: self.leases.remove(lease))
        if lease.backend is not None:
            assert lease.backend is self.house.backends[lease.backend.name]

    @rule(place=st.integers(0, 20), how=st.sampled_from([None, FAILED, GatewayError("client_cancelled", "x")]))
    def end(self, place: int, how: BaseException | None) -> None:
        if self.leases:
            lease = self.leases.pop(place % len(self.leases))
            lease.usage = Usage(100, 10)
            lease.end(how)

    @rule(seconds=st.floats(0.0, 40.0))
    def pass_time(self, seconds: float) -> None:
        self.house.clock.advance(seconds)

    @invariant()
    def counts_are_right(self) -> None:
        house = self.house
        bound = [lease for lease in self.leases if lease.backend is not None]
        snapshot = house.scheduler.snapshot()
        assert sum(snapshot.inflight.values()) == len(bound)
        assert sum(snapshot.depth.values()) == len(self.leases) - len(bound)
        there = set(house.backends)
        assert set(house.scheduler.backends.place) == there == set(house.pool._health) == set(house.pool._offers)
        assert snapshot.index_tokens.keys() == there
        leaving = [health for health in house.pool._leaving if health.held]
        assert sum(health.held for health in [*leaving, *house.pool._health.values()]) == len(bound)

    def teardown(self) -> None:
        for lease in self.leases:
            lease.end()
        house = self.house
        house.members.use([])
        assert house.states().keys() == {"echo"}
        assert sum(house.scheduler.snapshot().inflight.values()) == 0
        assert len(house.scheduler.backends.index) == 0
        house.stop()


test_comings_and_goings_in_any_order = Comings.TestCase
