"""The usage ledger of a real daemon: killed, locked out, with a full disk, with PostgreSQL; against what the backend served."""

from __future__ import annotations

import http.client
import json
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gateway.core.ledger import POSTGRESQL, encode
from gateway.core.usage_report import GROUPS, report
from gateway.database import DatabaseAway, UnreadableLines
from gateway.sqlite import LOCKED_SECONDS

from ..core.test_usage_report import START, row
from .asking import HELLO, STREAM, Request, ask, metric
from .backends import Connection, ScriptedBackend, backend, event
from .postgres import postgres
from .processes import PATIENCE, Running, clean_environment, wait_for

KILLS = 12
FLUSH = "0.1"


class Counting:
    """Answers, streamed or not, with a number of tokens of its own for each request; remembers them by request id."""

    def __init__(self) -> None:
        self.served: dict[str, int] = {}

    def __call__(self, connection: Connection, request: Request) -> None:
        id, body = request[1][b"x-request-id"].decode(), json.loads(request[2])
        tokens = self.served[id] = len(self.served) + 1
        usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "hi"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            connection.answer(json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode())
            return
        connection.start_stream()
        connection.chunk(event("a") + event("b") + event("", "stop"))
        connection.chunk(b"data: " + json.dumps({"id": "c", "choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        connection.chunk(b"")


class Load:
    """Clients that ask one thing after the other until they are stopped, or their gateway is."""

    def __init__(self, gateway: Running, name: str, clients: int = 4) -> None:
        self.asked: list[str] = []
        self.answered: list[str] = []
        self._gateway = gateway
        self._name = name
        self._numbers = count()
        self._stopped = False
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self._gateway.port, timeout=PATIENCE)
        with suppress(OSError, http.client.HTTPException), closing(client):
            while not self._stopped:
                number = next(self._numbers)
                id = f"{self._name}-{number}"
                self.asked.append(id)
                body = json.dumps(STREAM if number % 2 else HELLO)
                client.request("POST", "/v1/chat/completions", body, {"X-Request-ID": id, "X-Session-ID": "s"})
                response = client.getresponse()
                answer = response.read()
                if response.status == 200 and (not number % 2 or answer.endswith(b"data: [DONE]\n\n")):
                    self.answered.append(id)

    def wait_for(self, more: int) -> None:
        """Until so many more are answered."""
        enough = len(self.answered) + more
        wait_for(lambda: len(self.answered) >= enough)

    def stop(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join(PATIENCE)


def outcome(gateway: Running, which: str) -> float:
    return metric(gateway, rf'gateway_ledger_rows_total{{outcome="{which}"}}')


def _has_written(gateway: Running, rows: float) -> bool:
    return outcome(gateway, "written") >= rows


def acknowledged(gateway: Running, load: Load) -> list[str]:
    """Those that were answered when this was called, once they are acknowledged as written."""
    answered = load.answered[:]
    ended = outcome(gateway, "journaled") + metric(gateway, "gateway_ledger_buffered")
    wait_for(lambda: outcome(gateway, "journaled") >= ended)
    return answered


def rows_of(path: Path, query: str = "select request_id, status, code, completion_tokens, estimated from usage") -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@contextmanager
def alive(gateway: Running) -> Iterator[Running]:
    """A gateway that will be killed in the block."""
    gateway.__enter__()
    try:
        yield gateway
    finally:
        gateway.process.kill()
        gateway.process.wait()


@pytest.fixture
def counting() -> Iterator[tuple[Counting, ScriptedBackend]]:
    script = Counting()
    with backend(script) as running:
        yield script, running


def settings(running: ScriptedBackend, ledger: object, **more: str) -> dict[str, str]:
    return {
        "BACKEND_URL": running.url,
        "GATEWAY_BACKEND_KIND": "openai",
        "GATEWAY_LEDGER": str(ledger),
        "GATEWAY_LEDGER_FLUSH": FLUSH,
        **more,
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("flush", [FLUSH, "0"])
def test_kills_lose_no_request_that_was_acknowledged(
    tmp_path: Path, counting: tuple[Counting, ScriptedBackend], flush: str
) -> None:
    script, running = counting
    chance = random.Random(5)
    environment = settings(running, tmp_path / "usage.sqlite", GATEWAY_LEDGER_FLUSH=flush)
    safe: list[str] = []
    answered: list[str] = []
    for kill in range(KILLS):
        with alive(Running(tmp_path, **environment)) as gateway:
            load = Load(gateway, f"kill{kill}")
            if kill % 3:  # else while it may still be busy with what the last one has left
                load.wait_for(200)
                safe += acknowledged(gateway, load)
            time.sleep(chance.uniform(0.0, 0.3))
            gateway.process.kill()
            load.stop()
            answered += load.answered
    with Running(tmp_path, **environment):
        pass
    rows = rows_of(tmp_path / "usage.sqlite")
    ids = [row[0] for row in rows]
    lost, unacknowledged = set(safe) - set(ids), set(answered) - set(safe) - set(ids)
    print(
        f"flush {flush} s: {KILLS} kills, {len(script.served)} served, {len(answered)} answered, {len(safe)} acknowledged,"
        f" {len(rows)} rows, {len(lost)} lost, {len(ids) - len(set(ids))} twice, {len(unacknowledged)} unacknowledged lost"
    )
    assert len(safe) > 100 * KILLS
    assert not lost
    assert len(ids) == len(set(ids))
    assert {id: tokens for id, status, code, tokens, _ in rows if not code} == {
        id: script.served[id] for id, status, code, _, _ in rows if not code
    }


def test_every_stream_that_its_client_leaves_has_a_row(tmp_path: Path) -> None:
    streams = 24

    def endless(connection: Connection, _: Request) -> None:
        connection.start_stream()
        connection.chunk(event("word") + event("word"))
        connection.chunk(event("word"))
        connection.gone()

    with backend(endless) as running:
        with Running(tmp_path, **settings(running, "usage.sqlite")) as gateway:
            for number in range(streams):
                body = json.dumps(STREAM).encode()
                head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-Request-ID: left-%d\r\nContent-Length: %d\r\n\r\n"
                with gateway.connect() as client:
                    client.sendall(head % (number, len(body)) + body)
                    seen = b""
                    while seen.count(b"word") < 3:
                        seen += client.recv(65536)
            wait_for(lambda: outcome(gateway, "written") >= streams)
    query = "select request_id, code, completion_tokens, prompt_tokens > 0, estimated, status from usage"
    rows = rows_of(tmp_path / "usage.sqlite", query)
    print(f"{streams} streams left, {len(rows)} rows, {sum(row[4] for row in rows)} estimated")
    assert sorted(rows) == sorted((f"left-{number}", "client_cancelled", 3, 1, 1, 200) for number in range(streams))


def test_whatever_ends_a_request_there_is_a_row(tmp_path: Path) -> None:
    """Cut by the backend, refused, never answered, waiting in the queue, ended by the gateway's own end."""

    def script(connection: Connection, request: Request) -> None:
        what = request[1][b"x-request-id"]
        if what == b"cut":
            connection.start_stream()
            connection.chunk(event("one") + event("two"))
            connection.reset()
        elif what == b"boom":
            connection.answer(b"{}", b"500 Oops")
        elif what == b"no":
            connection.answer(b'{"error": {"message": "no"}}', b"422 No")
        else:
            connection.gone()

    more = {"GATEWAY_GRACE": "0", "GATEWAY_MAX_ATTEMPTS": "1", "GATEWAY_FIRST_BYTE_TIMEOUT": "30"}
    config = tmp_path / "gateway.toml"
    with backend(script) as running:
        config.write_text(f'[[backends]]\nurl = "{running.url}"\nkind = "openai"\nslots = 1\n')
        environment = settings(running, "usage.sqlite", GATEWAY_CONFIG=str(config), **more)
        del environment["BACKEND_URL"]
        with Running(tmp_path, **environment) as gateway:
            ask(gateway, STREAM, x_request_id="cut")
            ask(gateway, HELLO, x_request_id="boom")
            ask(gateway, HELLO, x_request_id="no")
            ask(gateway, {"messages": []}, x_request_id="invalid")
            ask(gateway, {**HELLO, "model": "x"}, x_request_id="unknown")
            held = [_leave_open(gateway, b"held"), _leave_open(gateway, b"queued")]
            wait_for(lambda: gateway.get("/metrics")[1]["queued"] == 1)
        for client in held:
            client.close()
    query = "select request_id, code, status, completion_tokens, estimated, attempts from usage"
    found = {row[0]: row[1:] for row in rows_of(tmp_path / "usage.sqlite", query)}
    assert found.pop("queued")[:3] == ("draining", 503, 0)
    assert found == {
        "cut": ("backend_protocol_error", 200, 2, 1, 1),
        "boom": ("backend_error", 502, 0, 0, 1),
        "no": ("rejected_by_backend", 422, 0, 0, 1),
        "invalid": ("invalid_value", 400, 0, 0, 0),
        "unknown": ("model_not_found", 404, 0, 0, 0),
        "held": ("draining", 503, 0, 1, 1),
    }


def _leave_open(gateway: Running, id: bytes) -> Any:
    body = json.dumps(HELLO).encode()
    client = gateway.connect()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-Request-ID: %b\r\nContent-Length: %d\r\n\r\n"
    client.sendall(head % (id, len(body)) + body)
    return client


def _away(tmp_path: Path, running: ScriptedBackend, script: Counting, begin: Callable[[Running], Callable[[], object]]) -> str:
    """Keep the database away for a while under load: nothing is lost, and nothing is there twice. The log."""
    (tmp_path / "place").mkdir()
    path = tmp_path / "place/usage.sqlite"
    environment = settings(running, path, GATEWAY_LEDGER_JOURNAL_FILE=str(tmp_path / "journal"))
    with Running(tmp_path, **environment) as gateway:
        load = Load(gateway, "a", clients=2)
        wait_for(lambda: outcome(gateway, "written") > 10)
        end = begin(gateway)
        wait_for(lambda: len(load.answered) > outcome(gateway, "written") + 100)
        load.stop()
        time.sleep(2 * LOCKED_SECONDS)
        assert outcome(gateway, "written") < len(load.answered)
        end()
        wait_for(lambda: outcome(gateway, "written") >= len(load.answered))
        wait_for(lambda: metric(gateway, "gateway_ledger_lag_seconds") == 0)
        assert outcome(gateway, "lost") == 0
    found = {id: tokens for id, _, _, tokens, _ in rows_of(path)}
    assert found == {id: script.served[id] for id in load.answered}
    assert len(rows_of(path)) == len(found)
    return gateway.lines()


def _is_on_the_disk(gateway: Running) -> None:
    assert metric(gateway, "gateway_ledger_buffered") == 0
    assert metric(gateway, "gateway_ledger_lag_seconds") > 0


def test_a_locked_database_catches_up(tmp_path: Path, counting: tuple[Counting, ScriptedBackend]) -> None:
    def lock(gateway: Running) -> Callable[[], object]:
        other = sqlite3.connect(tmp_path / "place/usage.sqlite", isolation_level=None, timeout=PATIENCE)
        other.execute("begin immediate")

        def end() -> None:
            _is_on_the_disk(gateway)
            other.close()

        return end

    log = _away(tmp_path, counting[1], counting[0], lock)
    assert log.count("database is away") == log.count("database is back") == 1


def test_a_directory_that_comes_back_catches_up(tmp_path: Path, counting: tuple[Counting, ScriptedBackend]) -> None:
    def move(gateway: Running) -> Callable[[], object]:
        moved = (tmp_path / "place").rename(tmp_path / "elsewhere")

        def end() -> None:
            _is_on_the_disk(gateway)
            moved.rename(tmp_path / "place")

        return end

    log = _away(tmp_path, counting[1], counting[0], move)
    assert log.count("database is away") == log.count("database is back") == 1


def test_a_disk_that_was_full_catches_up(tmp_path: Path, counting: tuple[Counting, ScriptedBackend]) -> None:
    """The kernel takes hardly a page of any file, so that database and journal fail both."""

    def fill(gateway: Running) -> Callable[[], object]:
        pid, (_, hard) = gateway.process.pid, resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (6000, hard))

        def end() -> None:
            assert metric(gateway, "gateway_ledger_buffered") > 0
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

        return end

    _away(tmp_path, counting[1], counting[0], fill)


@pytest.mark.timeout(300)
def test_postgresql_loses_nothing_when_it_is_killed_under_load(
    tmp_path: Path, counting: tuple[Counting, ScriptedBackend]
) -> None:
    script, running = counting
    with postgres() as server:
        with Running(tmp_path, **settings(running, server.url)) as gateway:
            load = Load(gateway, "pg", clients=3)
            for _ in range(3):
                wait_for(partial(_has_written, gateway, outcome(gateway, "written") + 20))
                server.kill()
                load.wait_for(50)  # the data path does not notice
                server.start()
            load.stop()
            wait_for(lambda: outcome(gateway, "written") >= len(load.answered))
            log = gateway.lines()
        rows = server.rows("select request_id, completion_tokens from usage")
        print(f"3 kills of PostgreSQL, {len(load.answered)} answered, {len(rows)} rows, {len(rows) - len(dict(rows))} twice")
        assert len(rows) == len(load.answered)
        assert dict(rows) == {id: script.served[id] for id in load.answered}
        assert "database is away" in log
        assert "s3cr3t" not in log
        report = _command("usage", "--ledger", server.url, "--by", "day,model,status", "--format", "json", cwd=tmp_path)
        found = [json.loads(line) for line in report.splitlines()]
        assert sum(one["requests"] for one in found) == len(rows)
        assert sum(one["completion_tokens"] for one in found) == sum(tokens for _, tokens in rows)


def test_a_postgresql_that_hangs_keeps_rows_on_the_disk_waiting_and_nobody_else(
    tmp_path: Path, counting: tuple[Counting, ScriptedBackend]
) -> None:
    script, running = counting
    with postgres() as server, Running(tmp_path, **settings(running, server.url)) as gateway:
        load = Load(gateway, "hung", clients=2)
        wait_for(partial(_has_written, gateway, 20))
        server.signal(signal.SIGSTOP)
        load.wait_for(200)
        safe = acknowledged(gateway, load)
        load.stop()
        assert outcome(gateway, "written") < len(safe)
        server.signal(signal.SIGCONT)
        wait_for(partial(_has_written, gateway, len(load.answered)))
        assert dict(server.rows("select request_id, completion_tokens from usage")) == {
            id: script.served[id] for id in load.answered
        }


def test_postgresql_does_what_sqlite_does() -> None:
    with postgres() as server:
        from gateway.postgresql import PostgreSQL

        first, second, reader = PostgreSQL(server.url), PostgreSQL(server.url), PostgreSQL(server.url, reads=True)
        lines = [encode(row(number, started=START + 3600 * number, model="\u00e9'\"%s", cost=None)) for number in range(10)]
        first.insert(lines[:6])
        second.insert(lines)
        for broken in (lines[0][:-5], b"\xff", lines[0].replace(b"acme", b"\\u0000")):
            with pytest.raises(UnreadableLines):
                first.insert([lines[0], broken])
        assert (first.delete(START + 7200, 1), first.delete(START + 7200, 5), first.delete(START + 7200, 5)) == (1, 1, 0)
        query, values, columns = report(POSTGRESQL, list(GROUPS), since=START + 7200, until=START + 10800, tenant="acme")
        (found,) = reader.rows(query, values)
        shown = dict(zip(columns, found, strict=True))
        assert (shown["hour"], shown["day"], shown["month"]) == ("2026-01-01 02:00", "2026-01-01", "2026-01")
        assert (shown["model"], shown["requests"], shown["prompt_tokens"], shown["cost"]) == ("\u00e9'\"%s", 1, 10, 0)
        server.kill()
        with pytest.raises(DatabaseAway):
            first.insert(lines)
        server.start()
        first.insert(lines)
        assert server.rows("select count(*) from usage") == [(10,)]
        for database in (first, second, reader):
            database.close()


def _command(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "gateway.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean_environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_reads_the_ledger_while_the_gateway_writes_it(
    tmp_path: Path, counting: tuple[Counting, ScriptedBackend]
) -> None:
    (tmp_path / ".env").write_text("GATEWAY_LEDGER=usage.sqlite\n")
    environment = settings(counting[1], "usage.sqlite")
    with Running(tmp_path, **environment) as gateway:
        for number in range(5):
            ask(gateway, HELLO, x_request_id=f"r{number}")
        wait_for(lambda: outcome(gateway, "written") >= 5)
        head, line = _command("usage", "--by", "model,status", "--since", "1d", "--format", "csv", cwd=tmp_path).splitlines()
        assert head.startswith("model,status,requests,failed,prompt_tokens")
        assert line.startswith("m,200,5,0,15,15")


def test_two_gateways_do_not_write_one_journal(tmp_path: Path, counting: tuple[Counting, ScriptedBackend]) -> None:
    environment = settings(counting[1], "usage.sqlite")
    with Running(tmp_path, **environment):
        second = Running(tmp_path, **environment)
        with pytest.raises(AssertionError, match="another gateway writes the usage ledger's journal"):
            second.__enter__()
