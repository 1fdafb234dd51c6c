"""The pool on a stopped clock, before a fake agent or before backends that say what a test wants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.task import Clock

from gateway.backend import HTTPBackend
from gateway.core.backend_settings import BackendSettings, Kind
from gateway.core.errors import BackendFailed
from gateway.core.load import Load
from gateway.core.reports import Report
from gateway.core.settings import Settings
from gateway.core.status import BackendState, Offer
from gateway.net.agent import BackendClient
from gateway.pool import Pool

from .conftest import Logged
from .fakes import TIMEOUTS, FakeAgent, FakeResponse

REFUSED = BackendFailed("backend_unreachable", "no")


class FakeBackend:
    """Its probes report what stands in ``says``."""

    def __init__(self, name: str, says: Report | Exception | None = None) -> None:
        self.name = name
        self.says = says or Report("vllm", models=({"id": "m", "owned_by": name},))
        self.looks = 0

    async def send(self, call: Any) -> Any:
        raise NotImplementedError

    async def models(self, headers: Any) -> Any:
        raise NotImplementedError

    async def probe(self) -> Report:
        self.looks += 1
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


class Watched:
    """A pool that runs, and the offers that its watcher has seen."""

    def __init__(
        self, *backends: FakeBackend, random: float = 0.5, own: tuple[BackendSettings, ...] = (), **settings: Any
    ) -> None:
        self.clock = Clock()
        self.pool = Pool(backends, Settings(backends=own, **settings), self.clock, random=lambda: random)
        self.seen: list[Offer] = []
        self.pool.watch(self.seen.append)
        self.pool.startService()

    def offers(self) -> dict[str, Offer]:
        return {offer.name: offer for offer in self.seen}

    def states(self) -> dict[str, str]:
        return {state.name: state.state for state in self.pool.snapshot()}

    def fail(self, name: str, times: int, code: str = "backend_error") -> None:
        for _ in range(times):
            self.pool.failed(self.pool.sent(name), BackendFailed(code, "x"))


@pytest.mark.parametrize(("random", "interval"), [(0.0, 1.8), (0.5, 2.0), (1.0, 2.2)])
def test_looks_come_a_tenth_sooner_or_later(random: float, interval: float) -> None:
    backend = FakeBackend("a")
    pool = Watched(backend, random=random)
    pool.clock.advance(interval - 0.001)
    assert backend.looks == 1
    pool.clock.advance(0.002)
    assert backend.looks == 2
    pool.pool.stopService()
    assert not pool.clock.getDelayedCalls()


def test_a_watcher_sees_each_offer_and_then_what_changes_only() -> None:
    a, b = FakeBackend("a"), FakeBackend("b")
    own = (BackendSettings(name="b", url="http://b", weight=2.0, slots=3, device="cpu", cost_factor=0.5),)
    pool = Watched(a, b, own=own)
    assert [(offer.name, offer.accepting) for offer in pool.seen] == [("a", False), ("b", False), ("a", True), ("b", True)]
    assert pool.seen[-1] == Offer("b", True, frozenset(["m"]), 3, None, 2.0, "cpu", 0.5, None, 0)
    pool.clock.advance(2.0)
    assert len(pool.seen) == 4
    a.says = Report("vllm", models=({"id": "m"},), load=Load(5, 1, 0.5, 4.0))
    pool.clock.advance(2.0)
    assert pool.seen[4:] == [Offer("a", True, frozenset(["m"]), None, None, 1.0, "gpu", 1.0, Load(5, 1, 0.5, 4.0), 0)]


def test_failed_requests_open_the_breaker_and_time_alone_lets_one_request_try_again() -> None:
    pool = Watched(FakeBackend("a"), FakeBackend("b"), breaker_failures=2)
    pool.fail("a", 2, "first_byte_timeout")
    assert not pool.offers()["a"].accepting
    state = pool.pool.snapshot()[0]
    assert (state.state, state.breaker, state.reason) == (
        "unhealthy",
        "open",
        "requests failed, the last with first_byte_timeout",
    )
    pool.clock.advance(10.0)
    assert (pool.offers()["a"].accepting, pool.offers()["a"].slots) == (True, 1)
    trial = pool.pool.sent("a")
    assert not pool.offers()["a"].accepting
    pool.pool.succeeded(trial)
    assert (pool.offers()["a"].accepting, pool.states()["a"]) == (True, "healthy")


def test_a_pool_that_stops_waits_for_nothing() -> None:
    pool = Watched(FakeBackend("a"), FakeBackend("b"), breaker_failures=1)
    pool.fail("a", 1)
    pool.pool.rate_limited(pool.pool.sent("b"), 5.0)
    left = pool.pool.sent("b")
    pool.pool.stopService()
    pool.pool.failed(left, REFUSED)
    assert not pool.clock.getDelayedCalls()


def test_a_client_that_leaves_and_a_4xx_are_held_against_nobody() -> None:
    pool = Watched(FakeBackend("a"), breaker_failures=1)
    seen = len(pool.seen)
    for _ in range(10):
        pool.pool.cancelled(pool.pool.sent("a"))
        pool.pool.succeeded(pool.pool.sent("a"))
    pool.fail("a", 3, "total_timeout")
    assert (pool.states()["a"], len(pool.seen), pool.pool.snapshot()[0].held) == ("healthy", seen, 0)


def test_a_rate_limit_is_kept_for_as_long_as_was_asked() -> None:
    pool = Watched(FakeBackend("a"), FakeBackend("b"))
    pool.pool.rate_limited(pool.pool.sent("a"), 5.0)
    assert (pool.states()["a"], pool.offers()["a"].accepting) == ("rate_limited", False)
    pool.clock.advance(5.0)
    assert (pool.states()["a"], pool.offers()["a"].accepting) == ("healthy", True)


def test_an_operator_drains_a_backend_and_takes_it_back() -> None:
    pool = Watched(FakeBackend("a"))
    pool.pool.drain("a")
    assert (pool.states()["a"], pool.offers()["a"].accepting) == ("draining", False)
    pool.clock.advance(2.0)
    assert pool.states()["a"] == "draining"
    pool.pool.undrain("a")
    assert (pool.states()["a"], pool.offers()["a"].accepting) == ("healthy", True)
    with pytest.raises(KeyError):
        pool.pool.drain("nobody")


@pytest.mark.parametrize("panic", [True, False])
def test_when_all_are_out_of_order_all_are_tried_by_setting(panic: bool) -> None:
    a, b = FakeBackend("a"), FakeBackend("b")
    pool = Watched(a, b, panic=panic, probe_down=1)
    a.says = b.says = REFUSED
    pool.clock.advance(2.0)
    assert pool.states() == {"a": "unhealthy", "b": "unhealthy"}
    assert [offer.accepting for offer in pool.offers().values()] == [panic, panic]


def test_a_restart_shows_in_the_offer() -> None:
    a = FakeBackend("a")
    pool = Watched(a)
    was, a.says = a.says, REFUSED
    pool.clock.advance(2.0)
    assert pool.states()["a"] == "healthy"
    a.says = was
    pool.clock.advance(2.0)
    assert pool.offers()["a"].restarts == 1


def test_models_are_the_union_and_stay_known_while_their_backend_is_down() -> None:
    a, b, c = FakeBackend("a"), FakeBackend("b"), FakeBackend("c", REFUSED)
    b.says = Report("openai", models=({"id": "m", "owned_by": "b"}, {"id": "n", "owned_by": "b"}))
    pool = Watched(a, b, c, probe_down=1)
    assert [(entry["id"], entry["owned_by"]) for entry in pool.pool.models()] == [("m", "a"), ("n", "b")]
    assert pool.pool.known_models() is None  # c may have any
    c.says = Report("openai", models=())
    pool.clock.advance(2.0)
    b.says = c.says = REFUSED
    pool.clock.advance(2.0)
    assert pool.pool.known_models() == frozenset({"m", "n"})
    assert len(pool.pool.models()) == 2


def test_the_limit_that_was_found_out_is_offered() -> None:
    pool = Watched(FakeBackend("a"), adaptive_concurrency=True)
    assert pool.offers()["a"].slots == 32
    for sent in [pool.pool.sent("a") for _ in range(32)]:
        pool.pool.first_token(sent, 0.01, 100.0)
    assert pool.offers()["a"].slots == 64


def test_a_probe_with_a_bug_is_logged_and_goes_on(logged: Logged) -> None:
    backend = FakeBackend("a", ZeroDivisionError())
    pool = Watched(backend)
    pool.clock.advance(2.0)
    assert backend.looks == 2
    assert [type(failure) for failure in logged.flush()] == [ZeroDivisionError] * 2
    pool.pool.stopService()


# --- what a look asks


class Looked:
    """A pool of one HTTP backend, whose pages a test gives; what it has not is 404."""

    def __init__(self, kind: Kind | None = None, own_key: bool = True) -> None:
        self.clock = Clock()
        self.agent = FakeAgent()
        self.pages: dict[str, Any] = {}
        self.asked: list[str] = []
        self.server = ""
        backend = HTTPBackend("b", "http://b:1", BackendClient(self.agent), self.clock, TIMEOUTS, kind=kind, own_key=own_key)
        self.pool = Pool([backend], Settings(probe_down=1), self.clock, random=lambda: 0.5)

    def look(self) -> BackendState:
        """Start, or let the time to the next look pass, and answer all that it asks."""
        if self.pool.running:
            self.clock.advance(2.0)
        else:
            self.pool.startService()
        self.asked = []
        while self.agent.waiting:
            path = self.agent.requests[-1][1].decode().removeprefix("http://b:1")
            self.asked.append(path)
            page = self.pages.get(path, 404)
            if isinstance(page, Exception):
                self.agent.fail(page)
            elif isinstance(page, int):
                self.agent.answer(FakeResponse(page, server=self.server, retry_after="7"), b"{}")
            else:
                body = page if isinstance(page, bytes) else json.dumps(page).encode()
                self.agent.answer(FakeResponse(server=self.server), body)
        return self.pool.snapshot()[0]


MODELS = {"object": "list", "data": [{"id": "m"}]}


def owned(owner: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "m", "owned_by": owner}]}


def test_what_a_server_lacks_it_is_asked_once_and_its_models_seldom() -> None:
    looked = Looked()
    looked.server = "llama.cpp"
    looked.pages = {"/v1/models": MODELS, "/health": {}, "/props": {"total_slots": 2}, "/slots": [{"is_processing": True}]}
    state = looked.look()
    assert (state.kind, state.state, state.slots) == ("llamacpp", "healthy", 2)
    assert looked.asked == ["/v1/models", "/health", "/v1/models", "/props", "/metrics", "/slots"]
    looked.look()
    assert looked.asked == ["/health", "/slots"]
    for _ in range(8):
        looked.look()
    looked.look()
    assert looked.asked == ["/health", "/v1/models", "/slots"]


def test_a_server_that_comes_back_is_asked_everything_anew() -> None:
    looked = Looked()
    looked.pages = {"/v1/models": owned("vllm"), "/health": {}}
    assert looked.look().kind == "vllm"
    looked.pages["/health"] = error.ConnectionRefusedError()
    state = looked.look()
    assert (state.state, state.kind, state.models) == ("unhealthy", "vllm", frozenset({"m"}))
    assert state.reason.startswith("backend_unreachable: ")
    looked.server = "llama.cpp"
    looked.pages = {"/v1/models": 503, "/health": 503}
    state = looked.look()
    assert (state.state, state.kind, state.reason) == ("warming", "llamacpp", "it loads its model")
    looked.pages = {"/v1/models": MODELS, "/health": {}, "/props": {"total_slots": 8}}
    state = looked.look()
    assert (state.state, state.slots, state.restarts) == ("healthy", 8, 1)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("kind", "path"), [("openai", "/v1/models"), ("vllm", "/v1/models"), ("llamacpp", "/props"), ("tgi", "/health")]
)
def test_a_refused_key_is_an_error_of_the_settings(kind: Kind, path: str, status: int) -> None:
    looked = Looked(kind)
    looked.pages = {"/v1/models": MODELS, "/health": {}, path: status}
    state = looked.look()
    assert state.state == "config_error"
    assert state.reason == f"it answered {status} to GET {path}: give it the right key (backend_api_key, api_key_env)"
    looked.pages[path] = MODELS
    assert looked.look().state == "healthy"


def test_where_the_clients_bring_their_keys_a_refusal_says_nothing() -> None:
    looked = Looked("openai", own_key=False)
    looked.pages = {"/v1/models": 401}
    state = looked.look()
    assert (state.state, state.models) == ("healthy", None)


def test_nothing_at_all_under_the_url_is_an_error_of_the_settings_but_still_a_last_resort() -> None:
    looked = Looked()
    seen: list[Offer] = []
    looked.pool.watch(seen.append)
    state = looked.look()
    assert (state.state, seen[-1].accepting, seen[-1].models) == ("config_error", True, None)
    assert "404" in state.reason
    looked.pages = {"/v1/models": MODELS}
    assert looked.look().state == "healthy"


def test_a_server_that_knows_only_the_endpoint_itself_is_there() -> None:
    looked = Looked()
    looked.pages = {"/v1/chat/completions": 405}
    assert (looked.look().state, looked.pool.known_models()) == ("healthy", None)


@pytest.mark.parametrize("status", [405, 501])
def test_a_server_without_a_list_of_models_is_there_all_the_same(status: int) -> None:
    looked = Looked()
    looked.pages = {"/v1/models": status}
    state = looked.look()
    assert (state.state, state.kind, state.models) == ("healthy", "openai", None)


def test_a_429_is_a_rate_limit_for_as_long_as_it_says() -> None:
    looked = Looked("openai")
    looked.pages = {"/v1/models": 429}
    assert looked.look().state == "rate_limited"
    looked.pages = {"/v1/models": MODELS}
    assert [looked.look().state for _ in range(4)] == ["rate_limited"] * 3 + ["healthy"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (500, "backend_error"),
        (302, "backend_protocol_error"),
        ([], "backend_protocol_error"),
        (b"<html>", "backend_protocol_error"),
    ],
)
def test_what_is_no_answer_is_unhealthy(page: Any, reason: str) -> None:
    looked = Looked("openai")
    looked.pages = {"/v1/models": page}
    state = looked.look()
    assert (state.state, state.reason.partition(":")[0]) == ("unhealthy", reason)


def test_a_load_that_does_not_come_does_not_make_it_unhealthy_and_is_asked_for_again() -> None:
    looked = Looked("vllm")
    looked.pages = {"/v1/models": MODELS, "/health": {}, "/metrics": error.ConnectionLost()}
    assert (looked.look().state, looked.pool.snapshot()[0].load) == ("healthy", None)
    looked.pages["/metrics"] = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n"
    load = looked.look().load
    assert load == Load(3, 1, None, 2.0)


def test_a_look_has_its_own_short_timeout_and_stops_with_the_pool() -> None:
    looked = Looked("openai")
    looked.pool.startService()
    looked.clock.advance(5.0)
    assert looked.pool.snapshot()[0].reason.startswith("first_byte_timeout")
    looked.clock.advance(2.0)
    looked.pool.stopService()
    assert not looked.clock.getDelayedCalls()
    assert looked.agent.cancelled == 2
