"""Backends that come and go while requests are on their way, and requests that go while backends are busy."""

from __future__ import annotations

import json
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

from .asking import HELLO, STREAM, Asking, Request, answers, ask, fails, metric, state_of, streams, table, until
from .backends import Connection, ScriptedBackend, backend
from .processes import PATIENCE, Running, wait_for
from .test_faults import raw_post

SLOW_LOOKS = "--probe-interval=1h"
"""The gateway finds out by the requests alone what becomes of its backends, once it has looked at each."""


def preferring(first: ScriptedBackend, second: ScriptedBackend, directory: Path) -> tuple[str, ...]:
    """Options with which requests go to ``first`` as long as that is in order."""
    tables = table("first", first.url, cost_factor=0.1) + table("second", second.url)
    (directory / "g.toml").write_text(tables)
    return ("--config", "g.toml", "--policy", "device", SLOW_LOOKS)


def test_a_backend_that_has_gone_since_the_last_look_costs_no_request(tmp_path: Path) -> None:
    gone = ScriptedBackend(answers)
    with backend(answers) as other:
        (tmp_path / "g.toml").write_text(table("gone", gone.url) + table("other", other.url))
        options = ("--config", "g.toml", "--policy", "round-robin", "--log-format", "json", SLOW_LOOKS)
        with Running(tmp_path, *options, GATEWAY_BREAKER_FAILURES="2") as gateway:
            until(gateway, "healthy", "gone", "other")
            gone.stop()
            replies = [ask(gateway, X_Request_ID=f"r{number}") for number in range(8)]
            assert {(reply.status, reply.backend) for reply in replies} == {(200, "other")}
            assert sorted(reply.headers["x-gateway-attempts"] for reply in replies) == ["1"] * 6 + ["2"] * 2
            retried = [line for number in range(8) if "retried" in (line := gateway.access(f"r{number}"))]
            assert [line["retried"] for line in retried] == ["backend_unreachable"] * 2
            assert metric(gateway, r'gateway_retries_total\{code="backend_unreachable"') == 2.0
            shown = state_of(gateway, "gone")
            assert (shown["breaker"], shown["state"]) == ("open", "unhealthy")


def test_a_half_open_breaker_lets_one_try_at_a_time_and_a_client_that_leaves_proves_nothing(tmp_path: Path) -> None:
    how = "fail"

    def script(connection: Connection, request: Request) -> None:
        if how == "stall":
            connection.gone()
        else:
            (fails if how == "fail" else answers)(connection, request)

    breaker = {"GATEWAY_BREAKER_FAILURES": "1", "GATEWAY_BREAKER_OPEN": "300ms"}
    with (
        backend(script) as first,
        backend(answers) as second,
        Running(tmp_path, *preferring(first, second, tmp_path), **breaker) as gateway,
    ):
        until(gateway, "healthy", "first", "second")
        assert ask(gateway).headers["x-gateway-attempts"] == "2"
        assert state_of(gateway, "first")["state"] == "unhealthy"
        how = "stall"
        wait_for(lambda: state_of(gateway, "first")["breaker"] == "half_open")
        with gateway.connect() as trial:
            trial.sendall(raw_post(HELLO))
            wait_for(lambda: len(first.posts) == 2)
            assert {ask(gateway).backend for _ in range(4)} == {"second"}
            assert len(first.posts) == 2
        wait_for(lambda: state_of(gateway, "first")["in_flight"] == 0)
        assert state_of(gateway, "first")["breaker"] == "half_open"
        how = "answer"
        assert {ask(gateway).backend for _ in range(4)} == {"first"}
        assert state_of(gateway, "first")["breaker"] == "closed"


def test_each_failed_trial_doubles_the_time_to_the_next(tmp_path: Path) -> None:
    tried: list[float] = []

    def script(connection: Connection, request: Request) -> None:
        tried.append(time.monotonic())
        fails(connection, request)

    breaker = {"GATEWAY_BREAKER_FAILURES": "1", "GATEWAY_BREAKER_OPEN": "200ms", "GATEWAY_RETRY_BUDGET": "1"}
    with (
        backend(script) as first,
        backend(answers) as second,
        Running(tmp_path, *preferring(first, second, tmp_path), **breaker) as gateway,
    ):
        until(gateway, "healthy", "first", "second")
        while len(tried) < 4:
            assert ask(gateway).status == 200
        between = [later - sooner for sooner, later in pairwise(tried)]
        assert all(took >= least for took, least in zip(between, (0.2, 0.4, 0.8), strict=True)), between


def test_the_loser_of_a_race_is_closed_at_once_and_tokens_are_counted_once(tmp_path: Path) -> None:
    stall, closed = threading.Event(), threading.Event()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
    quick = streams("a", usage=usage)

    def script(connection: Connection, request: Request) -> None:
        if stall.is_set():
            connection.gone()
            closed.set()
        else:
            quick(connection, request)

    with backend(script) as first, backend(quick) as second:
        options = (*preferring(first, second, tmp_path), "--hedge", "true", "--log-format", "json")
        with Running(tmp_path, *options) as gateway:
            until(gateway, "healthy", "first", "second")
            assert {ask(gateway, STREAM).backend for _ in range(20)} == {"first"}
            stall.set()
            reply = ask(gateway, STREAM, X_Request_ID="raced")
            assert (reply.status, reply.backend, reply.headers["x-gateway-attempts"]) == (200, "second", "2")
            assert reply.body.count(b"[DONE]") == 1
            assert closed.wait(PATIENCE)
            page = gateway.get("/metrics")[1]
            assert (page["request_count"], page["error_count"], page["total_tokens"]) == (21, 0, 21 * 5)
            wait_for(lambda: state_of(gateway, "first")["in_flight"] == 0)
            assert state_of(gateway, "first")["breaker"] == "closed"
            assert "retried" not in gateway.access("raced")  # nothing failed


def test_a_plain_answer_is_not_raced(tmp_path: Path) -> None:
    release = threading.Event()

    def script(connection: Connection, request: Request) -> None:
        if not json.loads(request[2]).get("stream"):
            assert release.wait(PATIENCE)
            answers(connection, request)
        else:
            streams("a")(connection, request)

    with (
        backend(script) as first,
        backend(answers) as second,
        Running(tmp_path, *preferring(first, second, tmp_path), "--hedge", "true") as gateway,
    ):
        until(gateway, "healthy", "first", "second")
        for _ in range(20):
            ask(gateway, STREAM)
        asking = Asking(gateway)
        wait_for(lambda: len(first.posts) == 21)
        time.sleep(0.3)  # many times what a race would have waited for
        release.set()
        reply = asking.reply()
        assert (reply.backend, reply.headers["x-gateway-attempts"], len(second.posts)) == ("first", "1", 0)


def test_a_request_that_would_be_late_is_refused_once_it_is_known_how_long_prompts_take(tmp_path: Path) -> None:
    release = threading.Event()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1000,"completion_tokens":2,"total_tokens":1002}}\n\n'

    def script(connection: Connection, request: Request) -> None:
        if json.loads(request[2]).get("stream"):
            time.sleep(0.2)
            streams("a", usage=usage)(connection, request)
        else:
            assert release.wait(PATIENCE)
            answers(connection, request)

    prompt = {**STREAM, "messages": [{"role": "user", "content": "word " * 1000}]}
    with backend(script) as only:
        (tmp_path / "g.toml").write_text(table("only", only.url, slots=1))
        with Running(tmp_path, "--config", "g.toml", SLOW_LOOKS) as gateway:
            until(gateway, "healthy", "only")
            assert ask(gateway, prompt, X_Stainless_Read_Timeout="0.05").status == 200  # nobody knows any better
            for _ in range(8):
                assert ask(gateway, prompt).status == 200
            before = len(only.posts) + 1
            held = Asking(gateway)
            wait_for(lambda: len(only.posts) == before)
            reply = ask(gateway, prompt, X_Stainless_Read_Timeout="0.05")
            assert (reply.status, reply.code) == (503, "queue_timeout")
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            assert b"would not be served before its deadline" in reply.body
            patient = Asking(gateway, prompt, X_Stainless_Read_Timeout="600")
            wait_for(lambda: metric(gateway, "gateway_queue_depth") == 1.0)
            release.set()
            assert [held.reply().status, patient.reply().status] == [200, 200]
            assert len(only.posts) == before + 1


def test_requests_that_wait_when_the_gateway_stops_are_told_so(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.gone()

    with backend(script) as only:
        (tmp_path / "g.toml").write_text(table("only", only.url, slots=1))
        with Running(tmp_path, "--config", "g.toml", "--grace", "500ms") as gateway:
            until(gateway, "healthy", "only")
            held, waits = Asking(gateway), Asking(gateway)
            wait_for(lambda: metric(gateway, "gateway_queue_depth") == 1.0)
            gateway.process.send_signal(signal.SIGTERM)
            assert [(reply.status, reply.code) for reply in (held.reply(), waits.reply())] == [(503, "draining")] * 2
            assert gateway.process.wait(PATIENCE) == 0
        assert len(only.posts) == 1


def test_what_waits_for_one_backend_goes_to_another_that_is_taken_back(tmp_path: Path) -> None:
    release = threading.Event()

    def slow(connection: Connection, request: Request) -> None:
        assert release.wait(PATIENCE)
        answers(connection, request)

    with backend(slow) as busy, backend(answers) as away:
        tables = table("busy", busy.url, slots=1) + table("away", away.url, slots=1)
        (tmp_path / "g.toml").write_text(tables)
        with Running(tmp_path, "--config", "g.toml") as gateway:
            until(gateway, "healthy", "busy", "away")
            path = "/admin/backends/away"
            assert json.loads(ask(gateway, {"draining": True}, path).body) == {
                "name": "away",
                "state": "draining",
                "in_flight": 0,
            }
            held = Asking(gateway)
            wait_for(lambda: state_of(gateway, "busy")["in_flight"] == 1)
            waits = Asking(gateway)
            wait_for(lambda: metric(gateway, "gateway_queue_depth") == 1.0)
            assert ask(gateway, {"draining": False}, path).status == 200
            reply = waits.reply()
            assert (reply.status, reply.backend) == (200, "away")
            assert int(reply.headers["x-gateway-queue-ms"]) > 0
            release.set()
            assert held.reply().status == 200


def test_work_is_shared_by_weight(tmp_path: Path) -> None:
    with backend(answers) as heavy, backend(answers) as light:
        (tmp_path / "g.toml").write_text(table("heavy", heavy.url, weight=3.0) + table("light", light.url))
        with Running(tmp_path, "--config", "g.toml", "--policy", "round-robin") as gateway:
            until(gateway, "healthy", "heavy", "light")
            got = [ask(gateway).backend for _ in range(16)]
            assert (got.count("heavy"), got.count("light")) == (12, 4)
