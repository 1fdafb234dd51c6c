"""Several backends behind one gateway: another one answers when one fails, and nobody hears of it but the headers."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from . import asking
from .asking import DONE, HELLO, STREAM, Request, answers, ask, fails, metric, streams
from .backends import Connection, Script, backend, completion, event
from .processes import PATIENCE, Running, free_port, llama_process, wait_for


def code_of(content: bytes) -> str:
    code: str = json.loads(content)["error"]["code"]
    return code


def state_of(gateway: Running, url: str) -> dict[str, Any]:
    """Of a backend that is named after its URL."""
    return asking.state_of(gateway, url.partition("://")[2])


def in_order(gateway: Running, *urls: str) -> None:
    wait_for(lambda: all(state_of(gateway, url)["state"] == "healthy" for url in urls))


def hangs_up(connection: Connection, _: Request) -> None:
    connection.close()


def stalls(connection: Connection, _: Request) -> None:
    connection.gone()


ROUND_ROBIN = {"GATEWAY_POLICY": "round-robin", "GATEWAY_BACKEND_KIND": "openai", "GATEWAY_PROBE_INTERVAL": "0.1s"}


def _more_than(posts: list[Any], before: int) -> bool:
    return len(posts) > before


# --- another attempt


@pytest.mark.parametrize(
    ("script", "failure"), [(fails, "backend_error"), (hangs_up, "backend_unreachable"), (stalls, "first_byte_timeout")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_one_backend_fails_at_another_is_asked(tmp_path: Path, script: Script, failure: str, stream: bool) -> None:
    good = streams("a") if stream else answers
    with backend(script) as bad, backend(good) as other:
        urls = f"{bad.url},{other.url}"
        options = {**ROUND_ROBIN, "GATEWAY_FIRST_BYTE_TIMEOUT": "0.5s", "GATEWAY_LOG_FORMAT": "json"}
        with Running(tmp_path, BACKEND_URL=urls, **options) as gateway:
            in_order(gateway, bad.url, other.url)
            attempts = []
            for number in range(2):
                status, headers, content = ask(gateway, STREAM if stream else HELLO, X_Request_ID=f"r{number}")
                assert status == 200
                assert DONE in content if stream else json.loads(content)["model"] == "m"
                assert headers["x-gateway-backend"] == other.url[7:]
                attempts.append(headers["x-gateway-attempts"])
            assert sorted(attempts) == ["1", "2"]
            retried = next(line for number in range(2) if "retried" in (line := gateway.access(f"r{number}")))
            assert (retried["retried"], retried["attempts"]) == (failure, 2)
            assert metric(gateway, rf'gateway_retries_total\{{code="{failure}"') == 1.0
            # a kept-alive connection that closes without a byte was perhaps stale: a fresh one is tried, once
            assert len(bad.posts) == (2 if script is hangs_up else 1)


def test_a_backend_that_refuses_connections_is_passed_over(tmp_path: Path) -> None:
    with backend(answers) as other:
        urls = f"http://127.0.0.1:{free_port()},{other.url}"
        with Running(tmp_path, BACKEND_URL=urls, **ROUND_ROBIN) as gateway:
            in_order(gateway, other.url)
            assert [ask(gateway, HELLO)[0] for _ in range(4)] == [200] * 4


def test_nothing_is_repeated_once_the_client_has_a_byte(tmp_path: Path) -> None:
    def breaks(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("one"))
        connection.close()

    with backend(breaks) as one, backend(breaks) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **ROUND_ROBIN) as gateway:
            in_order(gateway, one.url, two.url)
            status, headers, content = ask(gateway, STREAM)
            assert (status, headers["x-gateway-attempts"]) == (200, "1")
            assert b"one" in content
            assert b"backend_protocol_error" in content
            assert DONE not in content
            assert len(one.posts) + len(two.posts) == 1


def test_a_request_that_is_wrong_is_wrong_everywhere(tmp_path: Path) -> None:
    def rejects(connection: Connection, _: Request) -> None:
        connection.answer(b'{"error":{"message":"too long"}}', b"400 Bad Request")

    with backend(rejects) as one, backend(rejects) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **ROUND_ROBIN) as gateway:
            in_order(gateway, one.url, two.url)
            status, headers, _ = ask(gateway, HELLO)
            assert (status, headers["x-gateway-attempts"]) == (400, "1")


@pytest.mark.parametrize(("budget", "attempts"), [("0", 1), ("0.1", 2)])
def test_when_all_fail_the_last_failure_is_told_and_the_budget_holds(tmp_path: Path, budget: str, attempts: int) -> None:
    with backend(fails) as one, backend(fails) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", GATEWAY_RETRY_BUDGET=budget, **ROUND_ROBIN) as gateway:
            in_order(gateway, one.url, two.url)
            status, _, content = ask(gateway, HELLO)
            assert (status, code_of(content)) == (502, "backend_error")
            assert len(one.posts) + len(two.posts) == attempts


# --- backends out of order


def test_a_breaker_opens_lets_one_try_and_closes(tmp_path: Path) -> None:
    works = threading.Event()

    def script(connection: Connection, request: Request) -> None:
        (answers if works.is_set() else fails)(connection, request)

    options = {"GATEWAY_BREAKER_FAILURES": "2", "GATEWAY_BREAKER_OPEN": "1s", "GATEWAY_RETRY_BUDGET": "1", **ROUND_ROBIN}
    with backend(script) as bad, backend(answers) as other:
        with Running(tmp_path, BACKEND_URL=f"{bad.url},{other.url}", **options) as gateway:
            in_order(gateway, bad.url, other.url)
            while len(bad.posts) < 2:
                assert ask(gateway, HELLO)[0] == 200
            seen = state_of(gateway, bad.url)
            assert seen["state"] == "unhealthy"
            assert seen["breaker"] in ("open", "half_open")
            assert metric(gateway, rf'gateway_breaker_transitions_total\{{backend="{bad.url[7:]}",state="open"') >= 1.0
            works.set()

            def answered_by_it() -> bool:
                return ask(gateway, HELLO)[1]["x-gateway-backend"] == bad.url[7:]

            wait_for(answered_by_it)
            assert state_of(gateway, bad.url)["breaker"] == "closed"


def test_a_request_on_a_used_connection_whose_client_leaves_is_not_sent_again(tmp_path: Path) -> None:
    stall = threading.Event()

    def script(connection: Connection, request: Request) -> None:
        (stalls if stall.is_set() else answers)(connection, request)

    with backend(script) as only, Running(tmp_path, BACKEND_URL=only.url, **ROUND_ROBIN) as gateway:
        in_order(gateway, only.url)
        assert ask(gateway, HELLO)[0] == 200
        stall.set()
        client = gateway.connect()
        body = json.dumps(HELLO).encode()
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: len(only.posts) == 2)
        client.close()
        wait_for(lambda: state_of(gateway, only.url)["in_flight"] == 0)
        assert ask(gateway, {**HELLO, "model": "none"})[0] == 404  # and by now another would have come
        assert len(only.posts) == 2


def test_a_client_that_leaves_does_not_count_against_a_backend(tmp_path: Path) -> None:
    with backend(stalls) as only:
        with Running(tmp_path, BACKEND_URL=only.url, GATEWAY_BREAKER_FAILURES="1", **ROUND_ROBIN) as gateway:
            in_order(gateway, only.url)
            for _ in range(3):
                before = len(only.posts)
                client = gateway.connect()
                body = json.dumps(STREAM).encode()
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
                wait_for(partial(_more_than, only.posts, before))
                client.close()
            wait_for(lambda: state_of(gateway, only.url)["in_flight"] == 0)
            assert state_of(gateway, only.url)["breaker"] == "closed"


@pytest.mark.parametrize(("panic", "status", "code"), [("true", 502, "backend_error"), ("false", 503, "no_backend")])
def test_when_all_are_out_of_order_all_are_tried_unless_that_is_switched_off(
    tmp_path: Path, panic: str, status: int, code: str
) -> None:
    options = {"GATEWAY_BREAKER_FAILURES": "1", "GATEWAY_PANIC": panic, **ROUND_ROBIN}
    with backend(fails) as one, backend(fails) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **options) as gateway:
            in_order(gateway, one.url, two.url)
            for _ in range(3):
                ask(gateway, HELLO)
            assert {state_of(gateway, server.url)["breaker"] for server in (one, two)} == {"open"}
            got, headers, content = ask(gateway, HELLO)
            assert (got, code_of(content)) == (status, code)
            if status == 503:
                assert 1 <= int(headers["retry-after"]) <= 120


def test_a_429_of_a_backend_passes_and_sends_the_next_ones_elsewhere(tmp_path: Path) -> None:
    def limits(connection: Connection, _: Request) -> None:
        body = b'{"error":{"message":"slow down"}}'
        connection.send(b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nRetry-After: 60\r\n")
        connection.send(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    with backend(limits) as limited, backend(answers) as other:
        with Running(tmp_path, BACKEND_URL=f"{limited.url},{other.url}", **ROUND_ROBIN) as gateway:
            in_order(gateway, limited.url, other.url)
            statuses = [ask(gateway, HELLO)[0] for _ in range(6)]
            assert sorted(statuses) == [200] * 5 + [429]
            assert state_of(gateway, limited.url)["state"] == "rate_limited"


def test_a_drained_backend_finishes_and_gets_nothing_new(tmp_path: Path) -> None:
    go_on = threading.Event()

    def slow(connection: Connection, request: Request) -> None:
        assert go_on.wait(PATIENCE)
        connection.answer(completion())

    with backend(slow) as one, backend(answers) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **ROUND_ROBIN) as gateway:
            in_order(gateway, one.url, two.url)
            results: list[int] = []
            asking = [threading.Thread(target=lambda: results.append(ask(gateway, HELLO)[0])) for _ in range(2)]
            for thread in asking:
                thread.start()
            wait_for(lambda: one.posts)
            path = f"/admin/backends/{one.url[7:]}"
            status, _, content = ask(gateway, {"draining": True}, path)
            assert (status, json.loads(content)["state"]) == (200, "draining")
            assert {ask(gateway, HELLO)[1]["x-gateway-backend"] for _ in range(4)} == {two.url[7:]}
            go_on.set()
            for thread in asking:
                thread.join(PATIENCE)
            assert results == [200, 200]
            assert ask(gateway, {"draining": False}, path)[0] == 200
            wait_for(lambda: ask(gateway, HELLO)[1]["x-gateway-backend"] == one.url[7:])
            assert ask(gateway, {"draining": 1}, path)[0] == 400
            assert ask(gateway, {"draining": True}, "/admin/backends/nobody")[0] == 404


def test_admin_routes_can_be_switched_off(tmp_path: Path) -> None:
    with backend(answers) as one, Running(tmp_path, "--admin", "off", BACKEND_URL=one.url, **ROUND_ROBIN) as gateway:
        assert ask(gateway, HELLO, "/admin/explain")[0] == 404


# --- models


def test_models_are_the_union_and_a_request_goes_where_its_model_is(tmp_path: Path) -> None:
    with backend(answers, models=["a", "both"]) as one, backend(answers, models=["b", "both"]) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **ROUND_ROBIN) as gateway:
            in_order(gateway, one.url, two.url)
            assert [entry["id"] for entry in gateway.get("/v1/models")[1]["data"]] == ["a", "both", "b"]
            for model, server in (("a", one), ("b", two)):
                for _ in range(3):
                    assert ask(gateway, {**HELLO, "model": model})[1]["x-gateway-backend"] == server.url[7:]
            assert {ask(gateway, {**HELLO, "model": "both"})[1]["x-gateway-backend"] for _ in range(4)} == {
                one.url[7:],
                two.url[7:],
            }
            status, _, content = ask(gateway, {**HELLO, "model": "c"})
            assert (status, code_of(content)) == (404, "model_not_found")
            assert ask(gateway, {"draining": True}, f"/admin/backends/{one.url[7:]}")[0] == 200
            status, _, content = ask(gateway, {**HELLO, "model": "a"})
            assert (status, code_of(content)) == (503, "no_backend")


# --- policies, seen from outside


def test_explain_tells_the_candidates_and_sends_nothing(tmp_path: Path) -> None:
    with backend(answers) as one, backend(answers) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", GATEWAY_BACKEND_KIND="openai") as gateway:
            in_order(gateway, one.url, two.url)
            status, _, content = ask(gateway, HELLO, "/admin/explain")
            told = json.loads(content)
            assert (status, told["policy"]) == (200, "expected-completion")
            assert {one["name"] for one in told["candidates"]} == {one.url[7:], two.url[7:]}
            assert all(candidate["why_not"] == "" for candidate in told["candidates"])
            assert not one.posts
            assert not two.posts


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("round-robin", 2), ("least-load", 2), ("session", 1), ("prefix", 1), ("expected-completion", 1)],
)
def test_each_policy_sends_alike_requests_of_a_session_as_it_promises(tmp_path: Path, policy: str, expected: int) -> None:
    """To how many of two backends six long prompts of one session go, one after the other."""
    body = {**HELLO, "messages": [{"role": "user", "content": "word " * 2000}]}
    options = {**ROUND_ROBIN, "GATEWAY_POLICY": policy}
    with backend(answers) as one, backend(answers) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **options) as gateway:
            in_order(gateway, one.url, two.url)
            headers = [ask(gateway, body, X_Session_Id="s")[1] for _ in range(6)]
            assert {one["x-gateway-policy"] for one in headers} == {policy}
            assert len({one["x-gateway-backend"] for one in headers}) == expected


def test_the_cheaper_device_is_preferred(tmp_path: Path) -> None:
    with backend(answers) as dear, backend(answers) as cheap:
        rows = [(dear.url, "gpu", 1.0), (cheap.url, "cpu", 0.2)]
        config = "".join(
            f'[[backends]]\nurl = "{url}"\nkind = "openai"\ndevice = "{device}"\ncost_factor = {cost}\n'
            for url, device, cost in rows
        )
        (tmp_path / "gateway.toml").write_text(config)
        with Running(tmp_path, "--config", "gateway.toml", "--policy", "device") as gateway:
            in_order(gateway, dear.url, cheap.url)
            assert {ask(gateway, HELLO)[1]["x-gateway-backend"] for _ in range(4)} == {cheap.url[7:]}


# --- hedging


def test_a_late_stream_is_hedged_and_the_loser_is_cancelled(tmp_path: Path) -> None:
    stall = threading.Event()
    cancelled = threading.Event()

    def script(connection: Connection, request: Request) -> None:
        if stall.is_set():
            connection.gone()
            cancelled.set()
        else:
            streams("a")(connection, request)

    options = {**ROUND_ROBIN, "GATEWAY_HEDGE": "true"}
    with backend(script) as one, backend(streams("a")) as two:
        with Running(tmp_path, BACKEND_URL=f"{one.url},{two.url}", **options) as gateway:
            in_order(gateway, one.url, two.url)
            for _ in range(24):
                assert ask(gateway, STREAM)[0] == 200
            stall.set()
            winners = []
            for _ in range(2):
                status, headers, content = ask(gateway, STREAM)
                assert (status, content.count(DONE)) == (200, 1)
                winners.append((headers["x-gateway-backend"], headers["x-gateway-attempts"]))
            assert {winner for winner, _ in winners} == {two.url[7:]}
            assert "2" in {attempts for _, attempts in winners}
            assert cancelled.wait(PATIENCE)
            wait_for(lambda: state_of(gateway, one.url)["in_flight"] == 0)
            assert state_of(gateway, one.url)["breaker"] == "closed"


# --- a real engine


class Conversation:
    """Every turn brings the whole conversation again. ``hits``: of each turn but the first, whether what the one before it had
    computed was not computed again."""

    def __init__(self, gateway: Running, number: int) -> None:
        self.hits: list[bool] = []
        self._gateway = gateway
        self._session = f"conversation-{number}"
        self._messages = [{"role": "user", "content": f"conversation {number} " + f"{number} and so on " * 40}]
        self._before = 0

    def turn(self) -> None:
        body = {"messages": self._messages, "max_tokens": 4, "temperature": 0}
        answer = json.loads(ask(self._gateway, body, X_Session_Id=self._session)[2])
        if self._before:
            self.hits.append(answer["timings"]["cache_n"] >= 0.9 * self._before)
        self._before = answer["usage"]["prompt_tokens"]
        self._messages += [answer["choices"][0]["message"], {"role": "user", "content": "and then, after all that?"}]


def cached_share(tmp_path: Path, urls: str, policy: str, first: int) -> float:
    """The share of repeated turns that were answered from the cache: six conversations, whoever of them is next."""
    with Running(tmp_path, BACKEND_URL=urls, GATEWAY_POLICY=policy) as gateway:
        in_order(gateway, *urls.split(","))
        conversations = [Conversation(gateway, number) for number in range(first, first + 6)]
        turns = [one for one in conversations for _ in range(8)]
        Random(1).shuffle(turns)
        for one in turns:
            one.turn()
    hits = [hit for one in conversations for hit in one.hits]
    assert len(hits) == 6 * 7
    return sum(hits) / len(hits)


def test_turns_of_a_conversation_find_their_cache_in_two_real_llama_servers(tmp_path: Path, tiny_model: Path) -> None:
    ports = (free_port(), free_port())
    options = ("-c", "16384", "-np", "4", "--cache-ram", "0")
    with (
        llama_process(tmp_path, tiny_model, *options, port=ports[0]),
        llama_process(tmp_path, tiny_model, *options, port=ports[1]),
    ):
        urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
        ours = cached_share(tmp_path, urls, "expected-completion", 0)
        others = cached_share(tmp_path, urls, "round-robin", 100)
    assert ours >= 0.95, (ours, others)
    assert others <= 0.75, (ours, others)
