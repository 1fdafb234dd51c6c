"""Gateways that share limits through a real Redis, which is killed and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .asking import HELLO, STREAM, Asking, ask, metric
from .backends import Connection, backend, completion, event
from .processes import PATIENCE, TWISTD, Running, clean_environment, wait_for
from .redis_process import Client, Redis

Request = tuple[bytes, dict[bytes, bytes], bytes]
ASKED = {**HELLO, "max_tokens": 80}
KEY = "gateway:limits:{address 127.0.0.1}"


def up(gateway: Running, is_up: bool = True) -> None:
    wait_for(lambda: metric(gateway, "gateway_limits_redis_up") == is_up)


def settled(gateway: Running) -> None:
    wait_for(lambda: metric(gateway, "gateway_limits_unsettled") == 0)


def used(redis: Redis, what: str) -> float:
    """Requests or tokens that Redis knows to be used, as of its last write."""
    with Client(redis) as client:
        return int(client("HGET", KEY, what) or 0) / 60_000


def answers(connection: Connection, _: Request) -> None:
    connection.answer(completion())  # 1 token and 1


def test_two_gateways_share_one_limit(tmp_path: Path, redis: Redis) -> None:
    options = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_LIMIT_REQUESTS": "10"}
    with Running(tmp_path, **options) as one, Running(tmp_path, **options) as two:
        up(one)
        up(two)
        begun = time.monotonic()
        replies = [ask(gateway, HELLO | {"model": "echo"}) for gateway in [one, two] * 8]
        assert replies[1].headers["x-ratelimit-remaining-requests"] == "8"
        admitted = [reply.status for reply in replies].count(200)
        assert 10 <= admitted <= 10 + (time.monotonic() - begun) / 6 + 1
        refused = next(reply for reply in replies if reply.status == 429)
        assert 0 < int(refused.headers["retry-after-ms"]) <= 6000


def test_concurrency_is_shared_and_given_back(tmp_path: Path, redis: Redis) -> None:
    go_on = threading.Event()

    def script(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("a"))
        go_on.wait(PATIENCE)
        connection.chunk(event("", "stop") + b"data: [DONE]\n\n")
        connection.chunk(b"")

    with backend(script) as server:
        options = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_LIMIT_CONCURRENCY": "1", "BACKEND_URL": server.url}
        with Running(tmp_path, **options) as one, Running(tmp_path, **options) as two:
            up(one)
            up(two)
            running = Asking(one, STREAM)
            wait_for(lambda: server.posts)
            assert ask(two, STREAM).status == 429
            go_on.set()
            assert running.reply().status == 200
            settled(one)
            assert ask(two, STREAM).status == 200


class Load:
    """Requests one after the other from several clients, until told to stop."""

    def __init__(self, gateway: Running, clients: int = 4) -> None:
        self.statuses: Counter[int] = Counter()
        self.codes: Counter[str] = Counter()
        self.sent = 0
        self._gateway = gateway
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.sent += 1
            reply = ask(self._gateway, ASKED)
            with self._lock:
                self.statuses[reply.status] += 1
                if reply.status != 200:
                    self.codes[json.loads(reply.body)["error"]["code"]] += 1
            time.sleep(0.005)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def test_redis_killed_in_mid_load_loses_no_request_and_counts_none_twice(tmp_path: Path, redis: Redis) -> None:
    limit = 300
    with backend(answers) as server:
        options = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_LIMIT_REQUESTS": str(limit), "BACKEND_URL": server.url}
        with Running(tmp_path, GATEWAY_LIMIT_TOKENS="1000000", GATEWAY_LIMIT_CONCURRENCY="50", **options) as gateway:
            up(gateway)
            begun = time.monotonic()
            load = Load(gateway)
            wait_for(lambda: load.statuses[200] > 60)
            redis.kill()
            up(gateway, False)
            wait_for(lambda: load.statuses[429] > 20)  # this process alone goes on where Redis was
            redis.start()
            up(gateway)
            came_back = load.sent
            wait_for(lambda: load.sent > came_back + 100)
            load.stop()
            took = time.monotonic() - begun
            settled(gateway)
            figures: dict[str, Any] = {
                "requests": load.sent,
                "answered": sum(load.statuses.values()),
                "admitted": load.statuses[200],
                "refused": load.statuses[429],
                "reached the backend": len(server.posts),
                "most that may be": round(limit + limit * took / 60, 1),
                "decided without Redis": metric(gateway, "gateway_limits_without_redis_total"),
                "settlements lost": metric(gateway, "gateway_limits_settlements_lost"),
                "requests on the account": round(used(redis, "requests"), 1),
                "seconds": round(took, 2),
            }
            assert figures["requests"] == figures["answered"] == figures["admitted"] + figures["refused"], figures
            assert figures["reached the backend"] == figures["admitted"], figures
            assert limit <= figures["admitted"] <= figures["most that may be"], figures
            assert figures["settlements lost"] == 0, figures
            assert figures["decided without Redis"] > 0, figures
            assert limit - limit * took / 60 <= figures["requests on the account"] <= limit, figures
            assert set(load.codes) == {"rate_limit_exceeded"}, load.codes
            with Client(redis) as client:  # nobody holds a place any more
                assert client("ZCOUNT", f"{KEY}:leases", "0", "+inf") == 0


def test_a_gateway_that_stops_has_told_redis_what_its_last_requests_used(tmp_path: Path, redis: Redis) -> None:
    go_on = threading.Event()

    def script(connection: Connection, request: Request) -> None:
        go_on.wait(PATIENCE)
        answers(connection, request)

    with backend(script) as server:
        options = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_LIMIT_CONCURRENCY": "9", "GATEWAY_LIMIT_TOKENS": "1000000"}
        with Running(tmp_path, BACKEND_URL=server.url, **options) as gateway:
            up(gateway)
            asking = [Asking(gateway, ASKED) for _ in range(8)]
            wait_for(lambda: len(server.posts) == 8)
            with Client(redis) as client:
                assert client("ZCOUNT", f"{KEY}:leases", "0", "+inf") == 8
            gateway.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "stopping" in gateway.lines())
            go_on.set()
            assert [one.reply().status for one in asking] == [200] * 8
    with Client(redis) as client:
        assert client("ZCOUNT", f"{KEY}:leases", "0", "+inf") == 0


def test_fail_closed_lets_nobody_in_until_redis_is_back(tmp_path: Path, redis: Redis) -> None:
    options = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_LIMIT_REQUESTS": "1000", "GATEWAY_LIMITS_FAIL": "closed"}
    with Running(tmp_path, **options) as gateway:
        up(gateway)
        hello = HELLO | {"model": "echo"}
        assert ask(gateway, hello).status == 200
        redis.kill()
        up(gateway, False)
        refused = ask(gateway, hello)
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "limits_unavailable", "1")
        assert metric(gateway, r'gateway_limits_without_redis_total\{decision="refused"\}') == 1
        redis.start()
        up(gateway)
        assert ask(gateway, hello).status == 200


def test_a_redis_that_hangs_costs_one_timeout_and_then_nothing(tmp_path: Path, redis: Redis) -> None:
    options = {"GATEWAY_REDIS_URL": redis.url, "GATEWAY_LIMIT_TOKENS": "100000", "GATEWAY_REDIS_TIMEOUT": "100ms"}
    with backend(answers) as server, Running(tmp_path, BACKEND_URL=server.url, **options) as gateway:
        up(gateway)
        assert ask(gateway, ASKED).status == 200
        settled(gateway)
        before = used(redis, "tokens")
        assert redis.pid is not None
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            assert ask(gateway, ASKED).status == 200
            assert metric(gateway, "gateway_limits_redis_up") == 0
            assert ask(gateway, ASKED).status == 200
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        up(gateway)
        settled(gateway)
        assert used(redis, "tokens") <= before, "the request that Redis was late with is not on the account"
        assert ask(gateway, ASKED).status == 200


def test_a_password_is_used_and_never_shown(tmp_path: Path, redis: Redis) -> None:
    redis.kill()
    redis.password = "s3cret-word"
    redis.start()
    with Running(tmp_path, GATEWAY_REDIS_URL=redis.url, GATEWAY_LIMIT_REQUESTS="10") as gateway:
        up(gateway)
        assert ask(gateway, HELLO | {"model": "echo"}).status == 200
    assert redis.password not in gateway.lines()
    wrong = redis.url.replace(redis.password, "wr0ng-word")
    with Running(tmp_path, GATEWAY_REDIS_URL=wrong, GATEWAY_LIMIT_REQUESTS="10") as gateway:
        wait_for(lambda: "is away" in gateway.lines())
        assert ask(gateway, HELLO | {"model": "echo"}).status == 200
    assert "wr0ng-word" not in gateway.lines()


def test_redis_without_its_extra_is_one_line_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "txredisapi.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = clean_environment(GATEWAY_REDIS_URL="redis://:s3cret@127.0.0.1", PYTHONPATH=path)
    command = [TWISTD, "-n", "--pidfile=", "inference-gateway", "--port", "0"]
    ended = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        "inference-gateway: GATEWAY_REDIS_URL needs txredisapi: pip install 'inference-gateway[redis]'\n"
    ), ended.stderr


def test_scripts_that_redis_has_forgotten_are_sent_again(tmp_path: Path, redis: Redis) -> None:
    with Running(tmp_path, GATEWAY_REDIS_URL=redis.url, GATEWAY_LIMIT_REQUESTS="10") as gateway:
        up(gateway)
        with Client(redis) as client:
            client("SCRIPT", "FLUSH")
        assert [ask(gateway, HELLO | {"model": "echo"}).headers["x-ratelimit-remaining-requests"] for _ in "ab"] == ["9", "8"]
        settled(gateway)
        assert metric(gateway, "gateway_limits_without_redis_total") == 0
        assert metric(gateway, "gateway_limits_settlements_lost") == 0
