"""Keys and tokens as operators and callers meet them: the command, the daemon, the SDK, an issuer that changes its keys."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from ..core.test_jwt_tokens import SECRET, jwk, jwk_set, pem, token
from .backends import Connection, backend, completion
from .keys import HELLO, add, ask, command, id_of, keys, status
from .processes import PATIENCE, Running, wait_for
from .test_daemon import fails_with_one_line, twistd

Request = tuple[bytes, dict[bytes, bytes], bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


# --- the command


def test_a_key_is_printed_once_and_only_its_hash_is_stored(path: Path) -> None:
    done = command(path.parent, "keys", "add", "--tenant", "acme", "--keys", "keys.toml")
    key = done.stdout.strip()
    assert key.startswith("gw-")
    assert key not in done.stderr
    stored = path.read_text()
    assert key.split("-", 2)[2] not in stored
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for listed in (keys(path, "list"), keys(path, "list", "--json")):
        assert id_of(key) in listed
        assert key not in listed
        assert stored.partition('hash = "')[2][:64] not in listed


def test_a_key_is_listed_with_what_it_may(path: Path) -> None:
    limits = "--models m-*,gpt --rpm 60 --tpm 9000 --concurrency 4 --priority batch --weight 2 --admin".split()
    add(path, "acme", *limits, "--budget", "100000tokens/day", "--expires", "2030-01-31")
    (row,) = json.loads(keys(path, "list", "--json"))
    row.pop("created")
    assert row == {
        "id": row["id"],
        "tenant": "acme",
        "state": "active",
        "models": ["m-*", "gpt"],
        "rpm": 60,
        "tpm": 9000,
        "concurrency": 4,
        "budget": "100000 tokens/day",
        "priority": "batch",
        "weight": 2.0,
        "admin": True,
        "expires": "2030-01-31T00:00:00Z",
    }
    table = keys(path, "list").splitlines()
    assert "rpm=60 tpm=9000 concurrency=4 budget=100000 tokens/day priority=batch weight=2.0 admin" in table[1]


def test_the_file_is_the_one_of_the_settings(tmp_path: Path) -> None:
    done = command(tmp_path, "keys", "add", "--tenant", "a", GATEWAY_KEYS="from-environment.toml")
    assert done.returncode == 0
    (tmp_path / ".env").write_text("GATEWAY_KEYS=from-environment.toml\n")
    assert " a " in command(tmp_path, "keys", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list"], ["no keys file", "--keys", "GATEWAY_KEYS"]),
        (["list", "--keys", "none.toml"], ["none.toml", "no such file"]),
        (["list", "--keys", "broken.toml"], ["broken.toml", "key 'x'.tenant: missing"]),
        (["add", "--tenant", "a", "--keys", "broken.toml"], ["broken.toml", "key 'x'.tenant: missing"]),
        (["add", "--tenant", "a", "--keys", "no/keys.toml"], ["no/keys.toml", "No such file"]),
        (["revoke", "nobody", "--keys", "good.toml"], ["no key 'nobody'", "keys list"]),
        (["rotate", "gone", "--keys", "good.toml"], ["key 'gone' is revoked already"]),
    ],
)
def test_what_the_command_cannot_do_is_one_line(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "broken.toml").write_text('[[keys]]\nid = "x"\n')
    (tmp_path / "good.toml").write_text(f'[[keys]]\nid = "gone"\ntenant = "a"\nhash = "{"0" * 64}"\nrevoked = 2020-01-01\n')
    fails_with_one_line(command(tmp_path, "keys", *arguments), *words)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--rpm", "many", "'many' is not a whole number"),
        ("--tenant", "a b", "'a b' is not a name"),
        ("--budget", "5", "'5' is not a budget such as"),
        ("--expires", "soon", "'soon' is not a duration such as 30d, nor a time such as"),
        ("--priority", "urgent", "'urgent' is not one of interactive"),
    ],
)
def test_a_bad_option_is_named_with_what_it_should_be(path: Path, option: str, value: str, words: str) -> None:
    done = command(path.parent, "keys", "add", "--keys", "keys.toml", "--tenant", "a", option, value)
    assert done.returncode == 2
    assert option in done.stderr
    assert words in done.stderr
    assert not path.exists()


# --- the daemon


def test_the_sdk_gets_in_with_its_key_and_not_with_another(path: Path) -> None:
    key = add(path, "acme")
    with Running(path.parent, "--keys", str(path), "--log-format", "json") as gateway:
        with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE) as client:
            answer = client.chat.completions.with_raw_response.create(
                model="echo", messages=[{"role": "user", "content": "hello"}], extra_headers={"X-Request-ID": "mine"}
            )
            assert answer.parse().choices[0].message.content == "Echo: hello"
            assert [model.id for model in client.models.list()] == ["echo"]
        fields = gateway.access("mine")
        assert (fields["tenant"], fields["key"]) == ("acme", id_of(key))
        with OpenAI(base_url=f"{gateway.url}/v1", api_key=key[:-1] + "!", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
        assert ask(gateway, x_api_key=key)[0] == 200
        assert ask(gateway)[1]["error"]["code"] == "missing_api_key"
        assert gateway.get("/healthz")[0] == 200
        assert gateway.get("/readyz")[0] == 200
        assert gateway.get("/metrics")[0] == 401
        assert "nobody is asked" not in gateway.lines()


def test_the_backend_does_not_see_the_callers_key(path: Path) -> None:
    key = add(path, "acme")

    def script(connection: Connection, _: Request) -> None:
        connection.answer(completion())

    with backend(script) as server, Running(path.parent, "--keys", str(path), BACKEND_URL=server.url) as gateway:
        assert ask(gateway, key, HELLO | {"model": "m"})[0] == 200
        assert ask(gateway, body=HELLO | {"model": "m"}, x_api_key=key)[0] == 200
        assert all(key.encode() not in bytes(connection.received) for connection in server.connections)


def test_keys_come_and_go_while_the_gateway_runs(path: Path) -> None:
    ada, bob = add(path, "acme"), add(path, "acme")
    with Running(path.parent, "--keys", str(path)) as gateway:
        assert (status(gateway, ada), status(gateway, bob)) == (200, 200)
        keys(path, "revoke", id_of(ada))
        wait_for(lambda: status(gateway, ada) == 401)
        assert status(gateway, bob) == 200
        eve = add(path, "acme")
        wait_for(lambda: status(gateway, eve) == 200)
        good = path.read_text()
        path.write_text(good + "[[keys]]\n")
        wait_for(lambda: "the keys of before stay" in gateway.lines())
        time.sleep(2.5)
        assert gateway.lines().count("the keys of before stay") == 1
        assert status(gateway, bob) == 200
        path.unlink()
        wait_for(lambda: "no such file" in gateway.lines())
        assert status(gateway, bob) == 200
        path.write_text(good)
        keys(path, "revoke", id_of(bob))
        wait_for(lambda: status(gateway, bob) == 401)
        assert status(gateway, eve) == 200


def test_a_rotated_key_overlaps_with_the_new_one(path: Path) -> None:
    old = add(path, "acme", "--rpm", "60", "--models", "echo")
    new = keys(path, "rotate", id_of(old), "--overlap", "24h")
    with Running(path.parent, "--keys", str(path)) as gateway:
        assert (status(gateway, old), status(gateway, new)) == (200, 200)
        newest = keys(path, "rotate", id_of(new), "--overlap", "0")
        wait_for(lambda: status(gateway, newest) == 200)
        assert (status(gateway, old), status(gateway, new)) == (200, 401)
    rows = {row["id"]: row for row in json.loads(keys(path, "list", "--json"))}
    assert rows[id_of(newest)]["account"] == id_of(old)
    assert (rows[id_of(newest)]["rpm"], rows[id_of(newest)]["models"]) == (60, ["echo"])
    assert rows[id_of(new)]["state"] == "expired"
    assert "expires" in rows[id_of(old)]


def test_admin_routes_want_an_admins_key(path: Path) -> None:
    ada, root = add(path, "acme"), add(path, "ops", "--admin")
    with Running(path.parent, "--keys", str(path), "--host", "0.0.0.0") as gateway:
        for place, body in (("/metrics", None), ("/admin/explain", HELLO)):
            assert ask(gateway, None, body, place)[0] == 401
            assert ask(gateway, ada, body, place)[1]["error"]["code"] == "admin_required"
            assert ask(gateway, root, body, place)[0] == 200


# --- tokens


class Issuer:
    """Serves a JWK set until it is stopped; on the same port again when it is started again."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.served = 0
        self.port = 0
        self.start()

    def start(self) -> None:
        issuer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.served += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(issuer.body)))
                self.end_headers()
                self.wfile.write(issuer.body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", self.port), Answer)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.05))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer(jwk_set(jwk("RS256", kid="1")))
    yield made
    made.stop()


def fresh(kind: str, kid: str | None = None, sub: str = "ada") -> str:
    """A token of now."""
    return token(kind, kid, exp=time.time() + 600, sub=sub).decode()


TRUST = {"GATEWAY_JWT_ISSUER": "https://issuer", "GATEWAY_JWT_AUDIENCE": "gateway"}


def test_an_issuer_changes_its_keys_and_goes_away(tmp_path: Path, issuer: Issuer) -> None:
    url = f"http://127.0.0.1:{issuer.port}/jwks"
    with Running(tmp_path, GATEWAY_JWT_JWKS_URL=url, **TRUST) as gateway:
        assert status(gateway, fresh("RS256", "1")) == 200
        issuer.body = jwk_set(jwk("ES256", kid="2"))
        remembered = fresh("RS256", "1")
        assert status(gateway, remembered) == 200
        wait_for(lambda: status(gateway, fresh("ES256", "2")) == 200)
        assert status(gateway, remembered) == 401
        assert issuer.served <= 3
        issuer.stop()
        assert status(gateway, fresh("ES256", "2", "bob")) == 200
        assert status(gateway, fresh("RS256", "3")) == 401
        issuer.start()
        assert status(gateway, fresh("ES256", "2", "eve")) == 200


def test_an_issuer_that_is_not_there_at_the_start_is_no_fault_of_the_callers(tmp_path: Path, issuer: Issuer) -> None:
    issuer.stop()
    url = f"http://127.0.0.1:{issuer.port}/jwks"
    with Running(tmp_path, GATEWAY_JWT_JWKS_URL=url, **TRUST) as gateway:
        assert ask(gateway, fresh("RS256", "1"))[1]["error"]["code"] == "no_signing_keys"
        assert status(gateway, "nonsense") == 401
        issuer.start()
        wait_for(lambda: status(gateway, fresh("RS256", "1")) == 200)


@pytest.mark.parametrize("kind", ["HS256", "RS256", "ES256", "EdDSA"])
def test_a_key_of_our_own_verifies_tokens_beside_api_keys(path: Path, kind: str) -> None:
    key = add(path, "acme")
    environment = {"GATEWAY_JWT_KEY": SECRET} if kind == "HS256" else {"GATEWAY_JWT_KEY_FILE": "public.pem"}
    if kind != "HS256":
        path.with_name("public.pem").write_bytes(pem(kind))
    with Running(path.parent, GATEWAY_KEYS="keys.toml", **environment, **TRUST) as gateway:
        good = fresh(kind)
        assert (status(gateway, good), status(gateway, key), status(gateway, good + "x")) == (200, 200, 401)


# --- the start


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_gateway_does_not_listen_for_the_world_unless_told_so(tmp_path: Path, host: str) -> None:
    fails_with_one_line(twistd(tmp_path, "-n", "inference-gateway", "--port", "0", "--host", host), host, "--insecure-open")
    with Running(tmp_path, "--host", host, "--insecure-open") as gateway:
        assert gateway.get("/v1/models")[0] == 200
    with Running(tmp_path, "--host", host, GATEWAY_INSECURE_OPEN="yes") as gateway:
        assert gateway.lines().count("nobody is asked for a key") == 1


def test_an_open_gateway_says_so_once(tmp_path: Path) -> None:
    with Running(tmp_path) as gateway:
        assert gateway.get("/v1/models")[0] == 200
        assert gateway.lines().count("nobody is asked for a key") == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GATEWAY_KEYS": "none.toml"}, ["GATEWAY_KEYS", "none.toml", "no such file", "keys add"]),
        ({"GATEWAY_KEYS": "broken.toml"}, ["GATEWAY_KEYS", "broken.toml", "key 'x'.tenant: missing"]),
        ({"GATEWAY_KEYS": "k", "GATEWAY_FORWARD_AUTHORIZATION": "on"}, ["GATEWAY_FORWARD_AUTHORIZATION", "GATEWAY_KEYS"]),
        ({"GATEWAY_JWT_KEY": "short"}, ["GATEWAY_JWT_KEY", "at least 32"]),
        (
            {"GATEWAY_JWT_KEY": "x" * 32, "GATEWAY_JWT_KEY_FILE": "p"},
            ["_KEY and GATEWAY_JWT_KEY_FILE", "one of them"],
        ),
        ({"GATEWAY_JWT_KEY_FILE": "none.pem"}, ["GATEWAY_JWT_KEY_FILE", "none.pem", "No such file"]),
        ({"GATEWAY_JWT_KEY_FILE": "broken.toml"}, ["GATEWAY_JWT_KEY_FILE", "broken.toml", "neither a public key"]),
        ({"GATEWAY_JWT_JWKS_URL": "https://issuer/jwks"}, ["GATEWAY_JWT_ISSUER", "GATEWAY_JWT_AUDIENCE"]),
        ({"GATEWAY_JWT_JWKS_URL": "http://issuer/jwks"}, ["GATEWAY_JWT_JWKS_URL", "https"]),
        ({"GATEWAY_JWT_KEY": "x" * 32, "GATEWAY_JWT_ALGORITHMS": "RS256"}, ["GATEWAY_JWT_KEY", "GATEWAY_JWT_ALGORITHMS"]),
        ({"GATEWAY_JWT_ALGORITHMS": "none"}, ["GATEWAY_JWT_ALGORITHMS", "RS256"]),
        ({"GATEWAY_JWT_CLAIMS": "root=admin"}, ["GATEWAY_JWT_CLAIMS", "tenant"]),
    ],
)
def test_settings_that_cannot_be_are_one_line_and_status_1(
    tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    (tmp_path / "broken.toml").write_text('[[keys]]\nid = "x"\n')
    fails_with_one_line(twistd(tmp_path, "-n", "inference-gateway", "--port", "0", **environment), *words)


def test_without_pyjwt_a_token_setting_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "jwt.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = twistd(tmp_path, "-n", "inference-gateway", "--port", "0", GATEWAY_JWT_KEY="x" * 32, PYTHONPATH=path)
    fails_with_one_line(done, "PyJWT", "inference-gateway[jwt]")
