"""The gateway is started anew, stopped and upgraded while clients ask: nobody notices."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .backends import Connection, backend, completion, event
from .processes import PATIENCE, TWISTD, Running, clean_environment, free_port, wait_for

HELLO = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
STREAM = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True})
EVENTS = 20


def served(connection: Connection, request: tuple[bytes, dict[bytes, bytes], bytes]) -> None:
    """A plain answer, or a stream that takes a second."""
    if b'"stream"' not in request[2]:
        connection.answer(completion())
        return
    connection.start_stream()
    for _ in range(EVENTS):
        connection.chunk(event("a"))
        time.sleep(1 / EVENTS)
    connection.chunk(event("", "stop") + b"data: [DONE]\n\n")
    connection.chunk(b"")


class Clients:
    """Threads that ask again and again; `failures` says what went wrong, `answered` counts by kind what did not."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self.failures: list[str] = []
        self.answered: Counter[str] = Counter()
        self.processes: set[str] = set()
        kinds: list[tuple[str, Callable[[http.client.HTTPConnection | None], http.client.HTTPConnection]]] = [
            ("kept alive", self._plain),
            ("kept alive", self._plain),
            ("new connection", self._fresh),
            ("stream", self._stream),
            ("stream", self._stream),
        ]
        self._threads = [threading.Thread(target=self._ask, args=kind) for kind in kinds]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _ask(self, kind: str, ask: Callable[[Any], Any]) -> None:
        connection = None
        while not self._over.is_set():
            try:
                connection = ask(connection)
                self.answered[kind] += 1
            except (OSError, http.client.HTTPException, AssertionError) as problem:
                self.failures.append(f"{kind}: {problem!r}")
                connection = None
            time.sleep(0.005)
        if connection is not None:
            connection.close()

    def _post(self, connection: http.client.HTTPConnection, body: str) -> bytes:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 200, (response.status, answer)
        self.processes.add((response.getheader("x-request-id") or "")[:24])
        return answer

    def _plain(self, connection: http.client.HTTPConnection | None) -> http.client.HTTPConnection:
        """One connection for as long as the gateway wants it."""
        connection = connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        assert b'"hi"' in self._post(connection, HELLO)
        return connection

    def _fresh(self, _: object) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        with closing(connection):
            assert b'"hi"' in self._post(connection, HELLO)

    def _stream(self, connection: http.client.HTTPConnection | None) -> http.client.HTTPConnection:
        connection = connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        answer = self._post(connection, STREAM)
        assert answer.count(b'"content"') >= EVENTS, answer
        assert answer.endswith(b"data: [DONE]\n\n"), answer
        return connection


class Daemon:
    """A gateway that may be replaced by a successor: the pidfile tells which process it is now."""

    def __init__(self, directory: Path, *options: str, **environment: str) -> None:
        self.pidfile = directory / "gw.pid"
        self.log = directory / "gw.log"
        self.port = free_port()
        command = [TWISTD, "--pidfile", str(self.pidfile), "--logfile", str(self.log), "inference-gateway"]
        command += ["--port", str(self.port), *options]
        subprocess.run(command, cwd=directory, env=clean_environment(**environment), check=True, timeout=PATIENCE)

    def __enter__(self) -> Daemon:
        wait_for(lambda: "listens on" in self.lines())
        return self

    def __exit__(self, *_: object) -> None:
        pid = self.pid
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not alive(pid), 2 * PATIENCE)
        assert not self.pidfile.exists()
        assert "Traceback" not in self.lines(), self.lines()

    @property
    def pid(self) -> int:
        return int(self.pidfile.read_text())

    def lines(self) -> str:
        return self.log.read_text()

    def hand_over(self) -> int:
        """Start a successor, and wait until it has taken over. Returns the process of before."""
        before = self.pid
        os.kill(before, signal.SIGUSR2)
        wait_for(lambda: self.pid != before)
        return before


def alive(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "restarts"), [(1, 20), (2, 5)])
def test_no_request_is_lost_in_twenty_restarts(tmp_path: Path, workers: int, restarts: int) -> None:
    with backend(served) as server, Daemon(tmp_path, "--workers", str(workers), BACKEND_URL=server.url) as daemon:
        with Clients(daemon.port) as clients:
            gone = [daemon.hand_over() for _ in range(restarts)]
            asked = sum(clients.answered.values())
            wait_for(lambda: sum(clients.answered.values()) > asked + 100)
        wait_for(lambda: not any(map(alive, gone)))
    print(f"{workers} workers: restarts {restarts}, requests {dict(clients.answered)}, failed {len(clients.failures)}")
    assert clients.failures == []
    assert len(set(gone)) == restarts
    assert len(clients.processes) > restarts  # each of them has answered
    assert daemon.lines().count("listens on") == restarts + 1


def test_a_successor_that_does_not_start_changes_nothing(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        (tmp_path / ".env").write_text("GATEWAY_GRACE=nonsense\n")
        before = daemon.pid
        os.kill(before, signal.SIGUSR2)
        wait_for(lambda: "before it ran" in daemon.lines())
        assert "GATEWAY_GRACE: 'nonsense' is not" in daemon.lines()
        assert daemon.pid == before
        assert get(daemon.port, "/healthz") == 200
        (tmp_path / ".env").unlink()
        daemon.hand_over()  # and it can be tried again
        wait_for(lambda: not alive(before))


def test_while_it_settles_balancers_are_told_and_everybody_is_answered(tmp_path: Path) -> None:
    with Running(tmp_path, "--drain-settle", "30s") as gateway:
        idle = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
        idle.request("GET", "/healthz")
        idle.getresponse().read()
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: gateway.get("/readyz")[0] == 503)
        assert gateway.post({"messages": [{"role": "user", "content": "late"}]})[0] == 200
        idle.request("POST", "/v1/chat/completions", HELLO, {"Content-Type": "application/json"})
        response = idle.getresponse()
        assert response.status == 200
        assert response.getheader("connection") == "close"
        response.read()
        gateway.process.send_signal(signal.SIGTERM)  # the second one waits for nobody


# --- systemd


@contextmanager
def notified(directory: Path) -> Iterator[Callable[[], list[str]]]:
    """A socket such as systemd has it; yields what asks for the lines that came."""
    lines: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager:
        service_manager.bind(str(directory / "notify"))
        service_manager.setblocking(False)

        def come() -> list[str]:
            with suppress(BlockingIOError):
                while True:
                    lines.extend(service_manager.recv(4096).decode().splitlines())
            return lines

        yield come


def test_systemd_hands_its_socket_over_and_is_told_how_things_stand(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, notified(tmp_path) as come:
        port = listener.getsockname()[1]
        queued = socket.create_connection(("127.0.0.1", port))  # who comes before there is a gateway waits for it
        queued.sendall(b"GET /healthz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n")
        # LISTEN_PID is the id of the process that is started, which only that process knows before.
        start = f"exec 3<&{listener.fileno()}; LISTEN_PID=$$ exec {TWISTD} -n --pidfile= inference-gateway --port 1"
        environ = clean_environment(LISTEN_FDS="1", LISTEN_FDNAMES="gateway.socket", WATCHDOG_USEC="200000")
        environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", start], pass_fds=[listener.fileno()], cwd=tmp_path, env=environ, stdout=log, stderr=log
            )
        try:
            wait_for(lambda: "READY=1" in come())
            queued.settimeout(PATIENCE)
            assert queued.recv(4096).startswith(b"HTTP/1.1 200")
            queued.close()
            wait_for(lambda: come().count("WATCHDOG=1") > 2)
            assert f":{port}," in (tmp_path / "log").read_text()
            process.send_signal(signal.SIGUSR2)
            wait_for(lambda: any(line.startswith("MAINPID=") for line in come()))
            successor = int(next(line for line in come() if line.startswith("MAINPID="))[8:])
            assert process.wait(PATIENCE) == 0
            assert "STOPPING=1" not in come()
            assert get(port, "/healthz") == 200
            os.kill(successor, signal.SIGTERM)
            wait_for(lambda: "STOPPING=1" in come())
            wait_for(lambda: not alive(successor))
        finally:
            process.kill()
            process.wait()


def test_a_socket_of_systemd_that_others_reach_asks_for_keys(tmp_path: Path) -> None:
    """Whatever --host says: it is the unit that says where the socket is."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        start = f"exec 3<&{listener.fileno()}; LISTEN_PID=$$ exec {TWISTD} -n --pidfile= inference-gateway"
        done = subprocess.run(
            ["bash", "-c", start],
            pass_fds=[listener.fileno()],
            cwd=tmp_path,
            env=clean_environment(LISTEN_FDS="1", LISTEN_FDNAMES="http"),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1, done.stdout
    assert "--host 0.0.0.0 is not loopback, and nobody is asked for a key" in done.stderr


# --- workers


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path, "--workers", "2") as gateway:
        yield gateway


def test_a_worker_that_dies_is_started_again_and_the_others_go_on(two: Running) -> None:
    first, second = children(two.process.pid)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: "worker 1 of 2 ended with signal 9, and is started again" in two.lines())
    assert get(two.port, "/healthz") == 200
    wait_for(lambda: two.lines().count("worker 1 of 2 runs") == 2)
    assert second in children(two.process.pid)
    assert len(children(two.process.pid)) == 2


def connections_of(pid: int) -> int:
    """Sockets that a process has open."""
    count = 0
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += str(file.readlink()).startswith("socket:")
    return count


def test_connections_are_shared_evenly_and_one_that_hangs_holds_none_up(two: Running) -> None:
    pids = children(two.process.pid)
    before = [connections_of(pid) for pid in pids]

    def held() -> list[int]:
        return [connections_of(pid) - first for pid, first in zip(pids, before, strict=True)]

    with ExitStack() as stack:

        def connect() -> None:
            stack.enter_context(socket.create_connection(("127.0.0.1", two.port), PATIENCE))

        for slow, other in ((0, 1), (1, 0)):  # whichever of them would be the quicker one
            os.kill(pids[slow], signal.SIGSTOP)
            there = held()[other]
            for _ in range(60):
                connect()
            wait_for(partial(lambda place, count: held()[place] == count, other, there + 60))
            os.kill(pids[slow], signal.SIGCONT)
            while held()[slow] < there + 40:  # how soon: test_shares.py
                connect()
                time.sleep(0.01)


def test_a_worker_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    with Running(tmp_path, "--workers", "2", GATEWAY_WORKER_TIMEOUT="5s") as gateway:
        first, second = children(gateway.process.pid)
        os.kill(first, signal.SIGSTOP)
        wait_for(lambda: "worker 1 of 2 has hung for 5 s, and is ended" in gateway.lines())
        wait_for(lambda: gateway.lines().count("worker 1 of 2 runs") == 2)
        assert "worker 1 of 2 ended with signal 9, and is started again" in gateway.lines()
        assert second in children(gateway.process.pid)
        assert gateway.lines().count("has hung") == 1


def test_a_worker_that_is_asked_says_where_it_is_and_goes_on(two: Running) -> None:
    pids = children(two.process.pid)
    os.kill(pids[0], signal.SIGQUIT)
    wait_for(lambda: " in doPoll" in two.lines())
    assert "worker 1 of 2: Current thread 0x" in two.lines()
    os.kill(pids[0], signal.SIGQUIT)
    wait_for(lambda: two.lines().count(" in doPoll") == 2)
    assert children(two.process.pid) == pids


def test_what_comes_while_one_worker_drains_the_others_answer(tmp_path: Path) -> None:
    over = threading.Event()
    hanging: list[bytes] = []

    def slow(connection: Connection, request: tuple[bytes, dict[bytes, bytes], bytes]) -> None:
        if b"hang" in request[2]:
            hanging.append(request[2])
            over.wait(PATIENCE)
        else:
            served(connection, request)

    with backend(slow) as server, Running(tmp_path, "--workers", "2", BACKEND_URL=server.url) as gateway, ExitStack() as stack:
        for _ in range(8):  # each worker has some
            client = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
            stack.callback(client.close)
            client.request("POST", "/v1/chat/completions", HELLO.replace("hello", "hang"), {"Content-Type": "application/json"})
        stack.callback(over.set)
        wait_for(lambda: len(hanging) == 8)
        os.kill(children(gateway.process.pid)[0], signal.SIGTERM)
        wait_for(lambda: "stopping: requests in flight" in gateway.lines())
        with Clients(gateway.port) as clients:
            wait_for(lambda: clients.failures or min(clients.answered[kind] for kind in ("kept alive", "new connection")) >= 60)
        assert not clients.failures


def test_workers_go_with_their_parent(two: Running) -> None:
    workers = children(two.process.pid)
    two.process.kill()
    two.process.wait()
    wait_for(lambda: not any(map(alive, workers)))
    two.process = subprocess.Popen(["true"])  # how a killed one ends is not looked at
    two.process.wait()


def test_ctrl_c_at_a_terminal_stops_all_of_them_once(tmp_path: Path) -> None:
    """The terminal sends SIGINT to each process of the group: workers must not take it for a second signal."""
    with backend(served) as server, Running(tmp_path, "--workers", "2", BACKEND_URL=server.url) as gateway:
        stream = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
        stream.request("POST", "/v1/chat/completions", STREAM, {"Content-Type": "application/json"})
        response = stream.getresponse()
        for pid in [gateway.process.pid, *children(gateway.process.pid)]:
            os.kill(pid, signal.SIGINT)
        assert response.read().endswith(b"data: [DONE]\n\n")
        stream.close()
        assert gateway.process.wait(PATIENCE) == 0
        assert "second signal" not in gateway.lines()


def test_a_worker_that_cannot_start_at_all_ends_the_start(tmp_path: Path) -> None:
    keys = tmp_path / "journal-is-a-directory.journal.0"
    keys.mkdir()
    command = [TWISTD, "-n", "--pidfile=", "inference-gateway", "--port", "0", "--workers", "2"]
    environ = clean_environment(GATEWAY_LEDGER="journal-is-a-directory")
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1, done.stdout
    why = "worker [12] of 2: inference-gateway: cannot write the usage ledger's journal"  # whichever of them is the first
    assert re.search(why, done.stdout)
    assert "a worker does not start" in done.stdout


def test_each_worker_writes_the_one_ledger_and_the_one_log(tmp_path: Path) -> None:
    with Running(tmp_path, "--workers", "2", GATEWAY_LEDGER="usage.sqlite", GATEWAY_LEDGER_FLUSH="0") as gateway:
        for _ in range(40):
            assert get(gateway.port, "/healthz") == 200
            assert gateway.post({"messages": [{"role": "user", "content": "hi"}]})[0] == 200
    with closing(sqlite3.connect(tmp_path / "usage.sqlite")) as ledger:
        assert ledger.execute("select count(*) from usage").fetchone() == (40,)
    assert gateway.lines().count("route=/v1/chat/completions status=200") == 40


def test_each_worker_has_a_port_for_operators(tmp_path: Path) -> None:
    with Running(tmp_path, "--workers", "2", "--admin-port", "0") as gateway:
        first, second = map(int, re.findall(r"http://127\.0\.0\.1:(\d+) \(admin\)", gateway.lines()))
        for _ in range(8):
            assert gateway.post({"messages": [{"role": "user", "content": "hi"}]})[0] == 200
        counts = [metrics(port)["request_count"] for port in (first, second)]
        assert sum(counts) == 8
        assert get(gateway.port, "/metrics") == 404
        assert get(first, "/v1/models") == 404


def metrics(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as response:
        found: dict[str, Any] = json.load(response)
    return found


def get(port: int, path: str) -> int:
    """The status of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status
