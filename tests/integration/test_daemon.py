"""The program as its operators meet it: foreground, daemon, settings, signals, logs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.core.settings import option_rows

from .backends import Connection, backend, completion, event
from .processes import PATIENCE, TWISTD, Running, clean_environment, free_port, wait_for
from .test_faults import HELLO, STREAM, raw_post, read_all

Request = tuple[bytes, dict[bytes, bytes], bytes]


def twistd(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run twistd until it ends by itself, or has become a daemon."""
    return subprocess.run(
        [TWISTD, *arguments],
        cwd=directory,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


# --- what can go wrong at the start


def fails_with_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("inference-gateway: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("mode", [["-n"], []])
def test_a_port_in_use_is_one_line_and_status_1(tmp_path: Path, taken: str, mode: list[str]) -> None:
    done = twistd(tmp_path, *mode, "inference-gateway", "--port", taken)
    fails_with_one_line(done, taken, "Address already in use", "--port")
    assert not (tmp_path / "twistd.pid").exists()


@pytest.mark.parametrize("mode", [["-n"], []])
@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        (["--port", "http"], {}, ["--port", "'http'", "whole number"]),
        ([], {"PORT": "70000"}, ["PORT", "'70000'"]),
        ([], {"GATEWAY_BACKEND_API_KEY": "caf\u00e9"}, ["GATEWAY_BACKEND_API_KEY", "ASCII"]),
        ([], {"BACKEND_URL": "localhost:9"}, ["BACKEND_URL", "http://"]),
        (["--max-body", "lots"], {}, ["--max-body", "'lots'"]),
        (["--bogus", "1"], {}, ["bogus", "--help"]),
        (["extra"], {}, ["'extra'", "--help"]),
        (["--config", "missing.toml"], {}, ["missing.toml", "No such file"]),
        (["--host", "203.0.113.1"], {}, ["203.0.113.1", "--host"]),
    ],
)
def test_a_bad_setting_is_one_line_and_status_1(
    tmp_path: Path, mode: list[str], options: list[str], environment: dict[str, str], words: list[str]
) -> None:
    fails_with_one_line(twistd(tmp_path, *mode, "inference-gateway", *options, **environment), *words)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("prot = 8080\n", ["gateway.toml", "unknown setting 'prot'", "port"]),
        ("port = \n", ["gateway.toml", "line 1"]),
        ("port = true\n", ["gateway.toml", "port", "True"]),
    ],
)
def test_a_bad_file_is_one_line_and_status_1(tmp_path: Path, toml: str, words: list[str]) -> None:
    (tmp_path / "gateway.toml").write_text(toml)
    fails_with_one_line(twistd(tmp_path, "-n", "inference-gateway", "--config", "gateway.toml"), *words)


@pytest.mark.parametrize(("line", "words"), [("PORT: 1", ["line 2"]), ("GATEWAY_GRCE=5s", ["GATEWAY_GRCE"])])
def test_a_bad_line_in_dotenv_is_one_line_and_status_1(tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / ".env").write_text(f"# settings\n{line}\nOTHER_PROGRAM=fine\n")
    fails_with_one_line(twistd(tmp_path, "-n", "inference-gateway", "--port", "0"), ".env", *words)


def test_a_pidfile_that_cannot_be_written_is_one_line_and_status_1(tmp_path: Path) -> None:
    fails_with_one_line(twistd(tmp_path, "--pidfile", "no/dir/x.pid", "inference-gateway", "--port", "0"), "no/dir/x.pid")


def test_a_log_file_that_cannot_be_written_is_one_line_and_status_1(tmp_path: Path) -> None:
    fails_with_one_line(twistd(tmp_path, "--logfile", "no/such/dir/x.log", "inference-gateway", "--port", "0"), "no/such/dir")


def test_help_and_version_know_the_settings(tmp_path: Path) -> None:
    done = twistd(tmp_path, "inference-gateway", "--help")
    assert done.returncode == 0
    said = " ".join(done.stdout.split()).replace("- ", "-")  # as it was before it was wrapped
    for option, help in option_rows():
        assert f"--{option}= {help}".replace("- ", "-") in said
    assert "api-key" not in said
    assert re.fullmatch(r"inference-gateway \d+\.\d+\.\d+\n", twistd(tmp_path, "inference-gateway", "--version").stdout)


# --- settings


def test_the_sources_in_their_order(tmp_path: Path) -> None:
    """Each source names a backend port of its own; the one that is called tells which source won."""
    names = ("file", "dotenv", "environment", "option")
    urls = {name: f"http://127.0.0.1:{free_port()}" for name in names}
    (tmp_path / "gateway.toml").write_text(f'backend_url = "{urls["file"]}"\nlog_format = "json"\n')
    settings: list[dict[str, str]] = [{}]
    options: list[str] = ["--config", "gateway.toml"]
    for name in names:
        if name == "dotenv":
            (tmp_path / ".env").write_text(f'BACKEND_URL="{urls["dotenv"]}"\n')
        if name == "environment":
            settings.append({"BACKEND_URL": urls["environment"]})
        if name == "option":
            options += ["--backend-url", urls["option"]]
        with Running(tmp_path, *options, **settings[-1]) as gateway:
            backends = gateway.get("/metrics")[1]["backends"]
            assert [f"http://{one['name']}" for one in backends] == [urls[name]]
            assert json.loads(gateway.lines().splitlines()[0])["level"] == "info"


def test_it_may_open_as_many_files_as_it_may_have_connections(tmp_path: Path) -> None:
    limited = f"ulimit -Sn 256; exec {TWISTD} -n --pidfile= inference-gateway --port 0 --max-connections 1000"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["bash", "-c", limited], cwd=tmp_path, env=clean_environment(), stdout=log, stderr=log)
    try:
        wait_for(lambda: "listens" in (tmp_path / "log").read_text())
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"Max open files\s+2100\s", limits), limits
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "::"])
def test_it_listens_where_it_is_told(tmp_path: Path, host: str) -> None:
    with Running(tmp_path, "--host", host, "--insecure-open") as gateway:
        reached = {"::1": ["::1"], "::": ["::1", "127.0.0.1"]}.get(host, ["127.0.0.1"])
        for address in reached:
            with socket.create_connection((address, gateway.port), timeout=PATIENCE) as client:
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n")
                assert b"200 OK" in client.recv(65536)


# --- the daemon


def test_a_daemon_writes_its_pid_and_log_and_stops_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    pidfile, log = tmp_path / "gw.pid", tmp_path / "gw.log"
    done = twistd(tmp_path, "--pidfile", str(pidfile), "--logfile", str(log), "inference-gateway", "--port", str(port))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(pidfile.read_text())
    try:
        wait_for(lambda: f"127.0.0.1:{port}" in log.read_text())
        gateway = Running(tmp_path)
        gateway.port = port
        assert gateway.post(HELLO)[0] == 200
        wait_for(lambda: "route=/v1/chat/completions status=200" in log.read_text())
        again = twistd(tmp_path, "--pidfile", str(pidfile), "inference-gateway", "--port", "0")
        assert again.returncode == 1
        assert "Another twistd server is running" in again.stderr

        os.kill(pid, signal.SIGUSR1)
        wait_for((tmp_path / "gw.log.1").exists)
        log.rename(tmp_path / "moved.log")
        os.kill(pid, signal.SIGUSR1)
        wait_for(log.exists)
        assert log.stat().st_mode == (tmp_path / "moved.log").stat().st_mode
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: "settings: generation 1 holds on" in log.read_text())
        assert gateway.get("/healthz")[0] == 200
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not pidfile.exists())
    wait_for(lambda: "Server Shut Down" in log.read_text())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_daemon_cannot_log_to_standard_output(tmp_path: Path) -> None:
    fails_with_one_line(twistd(tmp_path, "--logfile", "-", "inference-gateway", "--port", "0"), "--logfile")


def test_a_log_file_does_not_grow_without_bound(tmp_path: Path) -> None:
    port = free_port()
    pidfile = tmp_path / "gw.pid"
    options = ["--port", str(port), "--log-file-size", "64KiB", "--log-files", "2"]
    twistd(tmp_path, "--pidfile", str(pidfile), "--logfile", "gw.log", "inference-gateway", *options)
    try:
        gateway = Running(tmp_path)
        gateway.port = port
        wait_for(lambda: "listens" in (tmp_path / "gw.log").read_text())
        for _ in range(1500):
            gateway.get("/healthz")
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)
    wait_for(lambda: not pidfile.exists())
    assert sorted(path.name for path in tmp_path.glob("gw.log*")) == ["gw.log", "gw.log.1", "gw.log.2"]
    assert sum(path.stat().st_size for path in tmp_path.glob("gw.log*")) < 4 * 65536


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_gateway_stops_at_once_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    with Running(tmp_path) as gateway, gateway.connect() as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        gateway.process.send_signal(number)
        assert gateway.process.wait(10) == 0
        assert client.recv(65536) == b""


def test_in_the_foreground_sigusr1_has_nothing_to_rotate_and_kills_nothing(tmp_path: Path) -> None:
    with Running(tmp_path) as gateway:
        gateway.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: "no log file" in gateway.lines())
        assert gateway.get("/healthz")[0] == 200


class Paced:
    """A backend whose answers go on when the test says so."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()

    def script(self, connection: Connection, request: Request) -> None:
        stream = json.loads(request[2]).get("stream")
        if stream:
            connection.start_stream()
            connection.chunk(event("first"))
        self.begun.release()
        assert self.go_on.wait(PATIENCE)
        if stream:
            connection.chunk(event("last", "stop") + b"data: [DONE]\n\n")
            connection.send(b"0\r\n\r\n")
        else:
            connection.answer(completion())


def test_requests_in_flight_finish_first(tmp_path: Path) -> None:
    paced = Paced()
    with backend(paced.script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway:
        with gateway.connect() as streaming, gateway.connect() as plain, gateway.connect() as idle:
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: g\r\n\r\n")
            assert b"200 OK" in idle.recv(65536)
            streaming.sendall(raw_post(STREAM))
            plain.sendall(raw_post(HELLO))
            for _ in range(2):
                assert paced.begun.acquire(timeout=PATIENCE)
            gateway.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "stopping" in gateway.lines())

            assert idle.recv(65536) == b""
            status, answer = gateway.get("/readyz")
            assert (status, answer["error"]["code"]) == (503, "draining")
            assert gateway.get("/healthz")[0] == 200
            status, answer = gateway.post(HELLO)
            assert (status, answer["error"]["code"]) == (503, "draining")

            paced.go_on.set()
            answered = read_all(streaming)
            assert b"last" in answered
            assert answered.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            received = plain.recv(65536)
            assert b"chatcmpl-backend" in received
            assert b"Connection: close" in received
        assert gateway.process.wait(PATIENCE) == 0


def test_after_the_grace_time_the_rest_is_told_and_ended(tmp_path: Path) -> None:
    paced = Paced()
    with backend(paced.script) as server:
        with Running(tmp_path, "--grace", "300ms", BACKEND_URL=server.url) as gateway:
            with gateway.connect() as streaming, gateway.connect() as plain:
                streaming.sendall(raw_post(STREAM))
                plain.sendall(raw_post(HELLO))
                for _ in range(2):
                    assert paced.begun.acquire(timeout=PATIENCE)
                gateway.process.send_signal(signal.SIGTERM)
                answered = read_all(streaming)
                assert b"first" in answered
                assert b'"draining"' in answered
                assert b"[DONE]" not in answered
                assert b" 503 " in plain.recv(65536)
            assert gateway.process.wait(PATIENCE) == 0
            assert "ended 2 requests" in gateway.lines()
        paced.go_on.set()


def test_an_answer_that_is_still_leaving_gets_the_grace_time_too(tmp_path: Path) -> None:
    """The backend is done and the request has ended for the gateway, but its client reads slowly."""
    content = "x" * 3_000_000

    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion(content))

    with backend(script) as server, Running(tmp_path, BACKEND_URL=server.url) as gateway, gateway.connect(65536) as client:
        client.sendall(raw_post(HELLO))
        data = bytearray(client.recv(1000))
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(4)
        while more := client.recv(65536):
            data += more
        assert content.encode() in data
        assert gateway.process.wait(PATIENCE) == 0


def test_a_long_answer_that_the_grace_time_cuts_leaves_a_clean_log(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion("x" * 30_000_000))

    with (
        backend(script) as server,
        Running(tmp_path, "--grace", "300ms", BACKEND_URL=server.url) as gateway,
        gateway.connect() as client,
    ):
        client.sendall(raw_post(HELLO))
        client.recv(1000)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(PATIENCE) == 0


def test_a_request_that_is_still_arriving_is_answered(tmp_path: Path) -> None:
    with Running(tmp_path) as gateway, gateway.connect() as client:
        request = raw_post(HELLO)
        client.sendall(request[:-10])
        wait_for(lambda: gateway.get("/metrics")[1]["connections"] == 2)
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(3)
        client.sendall(request[-10:])
        assert b'"draining"' in client.recv(65536)
        assert gateway.process.wait(PATIENCE) == 0


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    paced = Paced()
    with backend(paced.script) as server:
        with Running(tmp_path, "--grace", "1h", BACKEND_URL=server.url) as gateway, gateway.connect() as client:
            client.sendall(raw_post(HELLO))
            assert paced.begun.acquire(timeout=PATIENCE)
            gateway.process.send_signal(signal.SIGTERM)
            wait_for(lambda: "stopping" in gateway.lines())
            time.sleep(0.1)
            assert gateway.process.poll() is None
            gateway.process.send_signal(signal.SIGTERM)
            assert b" 503 " in client.recv(65536)
            assert gateway.process.wait(PATIENCE) == 0
        paced.go_on.set()


# --- logs


def test_each_request_is_one_line_in_either_format(tmp_path: Path) -> None:
    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion())

    body = {**HELLO, "model": "my model"}
    with backend(script, models=["my model"]) as server:
        with Running(tmp_path, "--log-format", "json", BACKEND_URL=server.url) as gateway:
            assert gateway.post(body, X_Request_ID="abc")[0] == 200
            line = gateway.access("abc")
            assert all(json.loads(one) for one in gateway.lines().splitlines())
        with Running(tmp_path, BACKEND_URL=server.url) as gateway:
            assert gateway.post(body, X_Request_ID="abc")[0] == 200
            wait_for(lambda: "request_id=abc" in gateway.lines())
            (text,) = [one for one in gateway.lines().splitlines() if "request_id=abc" in one]
    assert line["duration_ms"] > 0
    expected = {"method": "POST", "route": "/v1/chat/completions", "status": 200, "model": "my model"}
    expected |= {"backend": server.url[7:], "attempts": 1, "prompt_tokens": 1, "completion_tokens": 1, "finish_reason": "stop"}
    assert {name: line[name] for name in expected} == expected
    assert 'model="my model"' in text
    assert "status=200" in text
