from __future__ import annotations

from typing import Any

import pytest

from gateway.core.backend_settings import BackendSettings
from gateway.core.errors import BACKENDS_DOING, CODES
from gateway.core.health import Health, Rules, offers, windows
from gateway.core.load import Load
from gateway.core.ranges import Window
from gateway.core.reports import Report

RULES = Rules(2.0, 1, 2, 3, 10.0, 0.0, True)


def models(*ids: str) -> tuple[dict[str, Any], ...]:
    return tuple({"id": id} for id in ids)


def report(*ids: str, **more: Any) -> Report:
    return Report(**{"kind": "llamacpp", "models": models(*ids or ("m",)), "slots": 4, **more})


def health(name: str = "a", rules: Rules = RULES, up: bool = True, **own: Any) -> Health:
    made = Health(BackendSettings(name=name, url="http://a", **own), rules, 0.0)
    if up:
        made.reported(report(), 0.0)
    return made


def fail(backend: Health, times: int, now: float = 0.0, code: str = "backend_error") -> None:
    for _ in range(times):
        backend.failed(backend.sent(now), code, now)


def states(backend: Health, now: float = 0.0) -> tuple[str, bool]:
    return backend.state(now).state, backend.offer(now).accepting


def test_before_the_first_look_nothing_is_sent_and_one_good_look_is_enough() -> None:
    backend = health(up=False, rules=RULES._replace(probe_up=3))
    assert states(backend) == ("warming", False)
    backend.reported(report(), 0.0)
    assert states(backend) == ("healthy", True)


def test_thresholds_hold_both_ways() -> None:
    backend = health(rules=RULES._replace(probe_up=2, probe_down=3))
    for expected in ("healthy", "healthy", "unhealthy"):
        backend.unreachable("gone", gone=False)
        assert backend.state(1.0).state == expected
    backend.reported(report(), 2.0)
    assert states(backend, 2.0) == ("unhealthy", False)
    backend.reported(report(), 3.0)
    assert states(backend, 3.0) == ("healthy", True)
    assert (backend.state(9.0).since, backend.state(9.0).reason) == (3.0, "")


def test_a_backend_that_says_it_loads_is_believed_at_once_and_keeps_its_models() -> None:
    backend = health()
    backend.reported(Report("llamacpp", "warming", "it loads its model"), 1.0)
    assert states(backend, 1.0) == ("warming", False)
    assert backend.state(1.0).models == frozenset({"m"})


@pytest.mark.parametrize(
    ("again", "restarts"),
    [
        (report(), 0),
        (report("other"), 1),
        (report(slots=8), 1),
        (report(started=5.0), 0),
        (report(kind="ollama"), 0),
        (report("m", "pulled", kind="ollama"), 0),
    ],
)
def test_another_model_or_number_of_slots_is_another_process(again: Report, restarts: int) -> None:
    backend = health()
    backend.reported(again, 2.0)
    assert backend.offer(2.0).restarts == restarts


def test_who_comes_back_or_has_started_at_another_time_is_another_process_and_its_breaker_is_closed() -> None:
    backend = health()
    backend.reported(report(started=5.0), 0.0)
    backend.reported(report(started=6.0), 0.0)
    assert backend.offer(0.0).restarts == 1
    fail(backend, 3)
    assert states(backend) == ("unhealthy", False)
    backend.unreachable("first_byte_timeout", gone=False)
    backend.reported(report(started=6.0), 1.0)
    assert (backend.offer(1.0).restarts, backend.offer(1.0).accepting) == (1, False)
    backend.unreachable("refused", gone=True)
    backend.reported(report(started=6.0), 2.0)
    assert (backend.offer(2.0).restarts, backend.offer(2.0).accepting) == (2, True)


def test_a_rate_limit_ends_by_itself() -> None:
    backend = health()
    backend.rate_limited(backend.sent(0.0), 5.0, 0.0)
    assert (states(backend, 4.9), backend.changes_at(4.9)) == (("rate_limited", False), 5.0)
    assert states(backend, 5.0) == ("healthy", True)
    backend.reported(Report("llamacpp", "rate_limited", retry_after=3.0), 6.0)
    assert states(backend, 6.0) == ("rate_limited", False)
    assert states(backend, 9.0) == ("healthy", True)


def test_busy_is_what_it_reports_of_itself_lately_and_it_still_takes_requests() -> None:
    backend = health()
    backend.reported(report(load=Load(4, 1, None, 1.0)), 1.0)
    assert states(backend, 1.0) == ("busy", True)
    backend.reported(report(load=None), 3.0)
    assert states(backend, 7.0) == ("busy", True)
    assert (states(backend, 7.1), backend.offer(7.1).load) == (("healthy", True), None)


def test_a_draining_backend_takes_nothing_new_and_shows_what_it_still_holds() -> None:
    backend = health()
    era = backend.sent(0.0)
    backend.draining = True
    assert (states(backend), backend.state(0.0).held) == (("draining", False), 1)
    backend.succeeded(era, 0.1, 0.0)
    backend.draining = False
    assert (states(backend), backend.state(0.0).held) == (("healthy", True), 0)


@pytest.mark.parametrize("code", sorted(CODES))
def test_only_the_backends_own_failures_are_held_against_it(code: str) -> None:
    backend = health()
    fail(backend, 3, code=code)
    assert states(backend) == (("unhealthy", False) if code in BACKENDS_DOING else ("healthy", True))
    assert (code in BACKENDS_DOING) <= (CODES[code].fault == "backend")


def test_a_half_open_breaker_offers_one_slot_more_than_is_held() -> None:
    backend = health()
    old = backend.sent(0.0)
    fail(backend, 3)
    assert states(backend, 9.9) == ("unhealthy", False)
    assert (backend.offer(10.0).accepting, backend.offer(10.0).slots) == (True, 2)
    trial = backend.sent(10.0)
    assert not backend.offer(10.0).accepting
    backend.cancelled(old)
    backend.succeeded(trial, 0.1, 10.0)
    assert (states(backend, 10.0), backend.offer(10.0).slots) == (("healthy", True), 4)


def test_slow_first_bytes_count_when_that_is_wanted() -> None:
    for limit, expected in ((0.0, "healthy"), (1.0, "unhealthy")):
        backend = health(rules=RULES._replace(slow_first_byte=limit))
        for _ in range(3):
            backend.succeeded(backend.sent(0.0), 1.5, 0.0)
        assert backend.state(0.0).state == expected


def test_slots_are_the_settings_then_what_is_reported_then_found_out() -> None:
    untold = report(slots=None)
    for own, told, adaptive, expected in (
        (7, report(), True, 7),
        (None, report(), True, 4),
        (None, untold, True, 32),
        (None, untold, False, None),
        (None, report(slots=None, load=Load(1, 0, None, 0.0)), True, None),
    ):
        backend = health(up=False, slots=own, rules=RULES._replace(adaptive_concurrency=adaptive))
        backend.reported(told, 0.0)
        assert backend.offer(0.0).slots == expected


def test_models_of_the_settings_come_before_those_it_lists() -> None:
    backend = health(models=("mine", "m"))
    assert backend.models == frozenset({"mine", "m"})
    assert backend.entries() == [{"id": "mine", "object": "model", "created": 0, "owned_by": "a"}, {"id": "m"}]


# --- all together


def offered(*backends: Health, now: float = 0.0, panic: bool = True) -> dict[str, set[str]]:
    """The models for which each backend that accepts is offered; "any" for any."""
    return {offer.name: set(offer.models or ["any"]) for offer in offers(backends, now, panic=panic) if offer.accepting}


def down(name: str, *ids: str) -> Health:
    backend = health(name, up=False)
    backend.reported(report(*ids), 0.0)
    for _ in range(2):
        backend.unreachable("refused", gone=True)
    return backend


def test_when_all_are_out_of_order_all_are_tried_unless_that_is_not_wanted() -> None:
    broken = health("b")
    fail(broken, 3)
    assert offered(down("a"), broken) == {"a": {"m"}, "b": {"m"}}
    assert offered(down("a"), broken, panic=False) == {}


def test_one_out_of_order_is_tried_only_for_models_that_nobody_else_has() -> None:
    up = health("up")
    assert offered(up, down("a", "m", "rare")) == {"up": {"m"}, "a": {"rare"}}
    assert offered(up, down("a")) == {"up": {"m"}}


def test_a_backend_that_will_soon_be_there_is_waited_for() -> None:
    assert offered(health("new", up=False), down("a")) == {}
    loading = health("loading")
    loading.reported(Report("llamacpp", "warming"), 1.0)
    assert offered(loading, down("a", "m", "rare"), now=1.0) == {"a": {"rare"}}


def test_neither_a_draining_backend_nor_one_with_a_wrong_key_is_a_last_resort() -> None:
    draining, keyless, lost = health("draining"), health("keyless"), health("lost", up=False)
    draining.draining = True
    keyless.reported(Report("vllm", "config_error", "401", key_refused=True), 1.0)
    assert offered(draining, keyless, now=1.0) == {}
    lost.reported(Report("openai", "config_error", "404"), 1.0)
    assert offered(draining, keyless, lost, now=1.0) == {"lost": {"any"}}


def test_a_window_is_known_if_every_backend_that_may_have_the_model_tells_it() -> None:
    llama, vllm, silent = health("a"), health("b"), health("c")
    aliased = ({"id": "m", "aliases": ["small"]},)
    llama.reported(Report("llamacpp", models=aliased, context=4096), 0.0)
    vllm.reported(Report("vllm", models=({"id": "m", "max_model_len": 8192}, {"id": "v", "max_model_len": 100})), 0.0)
    assert windows([llama]) == {"m": Window(4096, whole=False), "small": Window(4096, whole=False)}
    assert windows([llama, vllm]) == {
        "m": Window(8192, whole=False),
        "small": Window(4096, whole=False),
        "v": Window(100, whole=True),
    }
    silent.reported(Report("openai", models=({"id": "m"},)), 0.0)
    assert set(windows([llama, vllm, silent])) == {"small", "v"}
    silent.reported(Report("openai"), 0.0)  # it does not tell its models, so it may have any
    assert windows([llama, vllm, silent]) == {}


def test_a_server_that_loads_has_the_window_that_it_had() -> None:
    llama = health()
    llama.reported(report(context=4096), 0.0)
    llama.reported(Report("llamacpp", "warming"), 1.0)
    assert windows([llama]) == {"m": Window(4096, whole=False)}
