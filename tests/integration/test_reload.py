"""Settings that change while the gateway runs: on SIGHUP, when a file changes, and what `inference-gateway check` says."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from .backends import Connection, Script, backend, completion, event
from .processes import PATIENCE, Running, clean_environment, wait_for
from .test_faults import STREAM

Request = tuple[bytes, dict[bytes, bytes], bytes]


def answers(word: str) -> Script:
    def serve(connection: Connection, request: Request) -> None:
        connection.answer(completion(word))

    return serve


class Configured:
    """A gateway with a file of settings."""

    def __init__(self, directory: Path, text: str) -> None:
        self.path = directory / "gateway.toml"
        self.path.write_text(text)
        self.gateway = Running(directory, "--config", "gateway.toml")

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def hang_up(self) -> None:
        self.gateway.process.send_signal(signal.SIGHUP)

    def says(self, words: str, times: int = 1) -> None:
        wait_for(lambda: self.gateway.lines().count(words) >= times)

    def content(self, model: str = "m") -> str:
        status, answer = self.gateway.post({"model": model, "messages": [{"role": "user", "content": "hi"}]})
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])

    def metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=PATIENCE)
        with closing(connection):
            connection.request("GET", "/metrics", headers={"Accept": "text/plain"})
            text = connection.getresponse().read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        assert found, text
        return float(found[1])


def table(url: str, name: str) -> str:
    return f'[[backends]]\nurl = "{url}"\nname = "{name}"\nkind = "openai"\nmodels = ["m"]\n'


def test_a_reload_changes_what_begins_and_leaves_what_runs(tmp_path: Path) -> None:
    go_on: list[Connection] = []

    def first(connection: Connection, request: Request) -> None:
        if b'"stream"' not in request[2]:
            connection.answer(completion("first"))
            return
        connection.start_stream()
        connection.chunk(event("a"))
        go_on.append(connection)

    with backend(first) as old, backend(answers("second")) as new:
        configured = Configured(tmp_path, table(old.url, "old"))
        with configured.gateway as gateway:
            assert configured.content() == "first"
            stream = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=PATIENCE)
            stream.request("POST", "/v1/chat/completions", json.dumps(STREAM), {"Content-Type": "application/json"})
            response = stream.getresponse()
            assert b'"a"' in response.readline()
            configured.write(table(new.url, "new"))
            configured.hang_up()
            configured.says("settings: generation 2 holds")
            assert configured.content() == "second"
            lines = gateway.lines()
            assert "settings: backends.new: new" in lines
            assert "settings: backends.old: taken away" in lines
            (connection,) = go_on
            connection.chunk(event("b", "stop") + b"data: [DONE]\n\n")
            connection.chunk(b"")
            rest = response.read()
            assert b'"b"' in rest
            assert rest.endswith(b"data: [DONE]\n\n")
            stream.close()
            assert configured.metric("gateway_settings_generation") == 2
            assert configured.metric('gateway_settings_reloads_total{result="applied"}') == 1


def test_a_file_that_changes_is_read_without_being_told(tmp_path: Path) -> None:
    configured = Configured(tmp_path, "grace = 5\n")
    with configured.gateway:
        configured.write("grace = 6\n")
        configured.says("settings: grace: 5.0 -> 6.0")
        (tmp_path / ".env").write_text("GATEWAY_GRACE=7\n")
        configured.says("settings: grace: 6.0 -> 7.0")
        configured.says("settings: generation 3 holds")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("grace = 'soon'\n", "gateway.toml: grace: 'soon' is not"),
        ("[[backends]]\nname = 'a'\n", "backends[0].url: missing"),
        ("keys = 'nowhere.toml'\n", "GATEWAY_KEYS: nowhere.toml: there is no such file"),
        ("not toml", "is not TOML"),
    ],
)
def test_all_of_it_or_nothing(tmp_path: Path, wrong: str, words: str) -> None:
    configured = Configured(tmp_path, "grace = 5\n[models.n]\nbackend_model = 'm'\n")
    with configured.gateway as gateway:
        configured.write("limit_requests = 1\n" + wrong)
        configured.says("generation 1 holds on")
        assert words in gateway.lines()
        assert configured.metric('gateway_settings_reloads_total{result="refused"}') == 1
        for _ in range(3):
            assert gateway.post({"messages": [{"role": "user", "content": "hi"}]})[0] == 200


def test_limits_and_keys_hold_from_then_on(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[[keys]]\nid = "k"\ntenant = "t"\nhash = "{sha256(b"sk-one").hexdigest()}"\n')
    configured = Configured(tmp_path, "grace = 5\n")
    hello = {"messages": [{"role": "user", "content": "hi"}]}
    with configured.gateway as gateway:
        assert gateway.post(hello)[0] == 200
        configured.write("grace = 5\nlimit_requests = 1\nkeys = 'keys.toml'\n")
        configured.hang_up()
        configured.says("generation 2 holds")
        assert gateway.post(hello)[0] == 401
        assert gateway.post(hello, Authorization="Bearer sk-one")[0] == 200
        assert gateway.post(hello, Authorization="Bearer sk-one")[0] == 429
        configured.write("grace = 5\n")
        configured.hang_up()
        configured.says("generation 3 holds")
        assert gateway.post(hello)[0] == 200


def test_what_a_reload_cannot_take_over_is_named(tmp_path: Path) -> None:
    configured = Configured(tmp_path, "grace = 5\n")
    with configured.gateway:
        configured.write("grace = 5\nlog_format = 'json'\n")
        configured.hang_up()
        configured.says("settings that wait for a restart (SIGUSR2 loses no request): log_format")
        configured.says("generation 1 holds on")


# --- check


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Configured]:
    made = Configured(tmp_path, "grace = 5\n")
    with made.gateway:
        yield made


def check(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway.cli", "check", *arguments]
    return subprocess.run(
        command, cwd=directory, env=clean_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_check_says_whether_a_start_would_succeed(tmp_path: Path) -> None:
    assert check(tmp_path).stdout == "settings: in order\n"
    (tmp_path / "new.toml").write_text("keys = 'nowhere.toml'\n")
    done = check(tmp_path, "--", "--config", "new.toml")
    assert done.returncode == 1
    assert done.stderr == (
        "inference-gateway: GATEWAY_KEYS: nowhere.toml: there is no such file; `inference-gateway keys add` makes one\n"
    )
    done = check(tmp_path, "--", "--port", "nine")
    assert (done.returncode, done.stderr) == (
        1,
        "inference-gateway: --port: 'nine' is not a whole number from 0 to 65535, or off\n",
    )


def test_check_says_what_a_reload_and_a_restart_would_change(configured: Configured, tmp_path: Path) -> None:
    options = ["--diff", "--url", configured.gateway.url, "--", "--port", "0", "--config"]
    assert check(tmp_path, *options, "gateway.toml").stdout == ("settings: in order, and those of generation 1 that holds\n")
    (tmp_path / "new.toml").write_text(
        "grace = 6\nlog_format = 'json'\n[[backends]]\nurl = 'http://127.0.0.1:9'\nname = 'nine'\n"
    )
    assert check(tmp_path, *options, "new.toml").stdout.splitlines() == [
        "at a reload   backends.nine: new",
        "at a reload   grace: 5.0 -> 6.0",
        "at a restart  log_format: text -> json",
    ]


def test_check_says_that_nobody_answers(tmp_path: Path) -> None:
    done = check(tmp_path, "--diff", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert json.dumps(done.stderr).count("\\n") == 1
    assert "http://127.0.0.1:9" in done.stderr
