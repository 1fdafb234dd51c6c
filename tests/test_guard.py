"""Who is let in where, from the client's side of the app; without sockets."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from gateway.core.api_keys import read_keys
from gateway.core.auth import Auth
from gateway.core.endpoints import CHAT
from gateway.core.jwt_tokens import Verifier, read_signers
from gateway.core.record import Record
from gateway.core.reports import Report
from gateway.echo import EchoBackend
from gateway.guard import Guard
from gateway.logs import AccessText, access_fields
from gateway.net.headers import RawHeaders

from .core.test_jwt_tokens import NOW, jwk, jwk_set, rules, token
from .fakes import ANSWER, HELLO, FakeResponse, Gateway, body_of, error_of, now_of
from .test_cost import calls

KEYS: dict[str, dict[str, Any]] = {
    "ada": {"models": ["m-*", "echo"], "priority": "default", "weight": 3, "tenant": "acme"},
    "root": {"admin": True},
    "late": {"expires": "2020-01-01"},
    "batch": {"priority": "batch"},
    "none": {"models": []},
}


def auth(verifier: Verifier | None = None) -> Auth:
    made = Auth(verifier)
    tables = [
        {"id": id, "tenant": "t", "hash": hashlib.sha256(f"gw-{id}".encode()).hexdigest()} | more for id, more in KEYS.items()
    ]
    made.use_keys(read_keys("keys", {"keys": tables}))
    return made


def guarded(backend: Any = None, **options: Any) -> Gateway:
    return Gateway(backend, guard=Guard(auth(), lambda: NOW, **options))


def serving(*models: str) -> Gateway:
    gateway = guarded()
    gateway.pool._reported("b", Report("openai", models=tuple({"id": id, "object": "model"} for id in models)))
    return gateway


def ask(gateway: Gateway, key: str, model: str = "m-1", **more: Any) -> Any:
    """The answer, of a backend that answers at once if it is asked."""
    headers = {name: more.pop(name) for name in ("x_gateway_priority",) if name in more}
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], **more}).encode()
    response = gateway.post(body, authorization=f"Bearer gw-{key}", **headers)
    if gateway.agent.waiting:
        gateway.agent.answer(FakeResponse(), ANSWER)
    return gateway.done(response)


def routes() -> list[tuple[str, str]]:
    """(method, path) of every route there is."""
    found = []
    for rule in Gateway().app.router.url_map.iter_rules():
        path = str(rule.rule).replace("<model:id>", "x").replace("<name>", "x")
        found += [(method, path) for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}]
    return found


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_but_four_asks_for_a_key_whatever_is_added(method: str, path: str) -> None:
    gateway = guarded(EchoBackend(Clock(), lambda: NOW))
    response = gateway.client.request(method, f"http://g{path}", data=HELLO if method == "POST" else b"")
    gateway.client.flush()
    answer = now_of(response)
    if path in ("/healthz", "/readyz", "/openapi.json", "/dashboard"):
        assert answer.code == 200
        return
    assert (answer.code, gateway.records[-1].code) == (401, "missing_api_key")
    assert answer.headers.getRawHeaders("www-authenticate") == ["Bearer"]
    assert not gateway.agent.requests


def test_who_sends_a_request_stands_in_its_record_and_log_line() -> None:
    gateway = guarded()
    assert ask(gateway, "ada").code == 200
    (record,) = gateway.records
    assert (record.tenant, record.key) == ("acme", "ada")
    assert " tenant=acme key=ada client=" in AccessText()(record)
    assert str(access_fields(record)) == AccessText()(record)
    assert ask(gateway, "nobody").code == 401
    assert (gateway.records[1].tenant, gateway.records[1].key, gateway.records[1].detail) == ("", "", "no such key")


def test_lines_of_several_callers_are_told_apart() -> None:
    gateway, text = guarded(), AccessText()
    for key in ("ada", "root", "ada"):
        ask(gateway, key)
    assert [text(record).partition(" key=")[2].split()[0] for record in gateway.records] == ["ada", "root", "ada"]


def test_the_body_is_not_read_before_its_sender_is_known() -> None:
    gateway = guarded()
    response = now_of(gateway.post(b"{"))
    assert error_of(gateway, response)["code"] == "missing_api_key"
    response = now_of(gateway.post(b"{", x_api_key="gw-ada"))
    assert error_of(gateway, response)["code"] == "invalid_json"


def test_a_key_is_for_its_models() -> None:
    gateway = guarded()
    assert ask(gateway, "ada", "m-1").code == 200
    response = ask(gateway, "ada", "gpt")
    error = error_of(gateway, response)
    assert (response.code, error["type"], error["code"], error["param"]) == (
        403,
        "permission_error",
        "model_not_allowed",
        "model",
    )
    assert gateway.records[1].fault == "policy"
    assert ask(gateway, "ada", "M-1").code == 403
    assert ask(gateway, "none", "m-1").code == 403
    assert ask(gateway, "root", "gpt").code == 200
    assert len(gateway.agent.requests) == 2


def test_a_request_without_a_model_is_not_a_way_round() -> None:
    gateway = guarded()
    response = now_of(gateway.post(HELLO, x_api_key="gw-ada"))
    assert (response.code, error_of(gateway, response)["code"]) == (403, "model_not_allowed")


def test_models_that_a_key_may_not_use_are_not_there() -> None:
    gateway = serving("m-1", "gpt")

    def ids(key: str) -> list[str]:
        listing = body_of(gateway, now_of(gateway.get("/v1/models", x_api_key=f"gw-{key}")))
        return [model["id"] for model in json.loads(listing)["data"]]

    assert (ids("ada"), ids("root"), ids("none")) == (["m-1"], ["m-1", "gpt"], [])
    assert now_of(gateway.get("/v1/models/m-1", x_api_key="gw-ada")).code == 200
    response = now_of(gateway.get("/v1/models/gpt", x_api_key="gw-ada"))
    assert (response.code, error_of(gateway, response)["code"]) == (404, "model_not_found")


def test_models_that_only_the_backend_tells_are_left_out_too() -> None:
    gateway = guarded()
    response = gateway.get("/v1/models", x_api_key="gw-ada")
    gateway.agent.answer(FakeResponse(), b'{"object":"list","data":[{"id":"m-1"},{"id":"gpt"}]}')
    assert [model["id"] for model in json.loads(body_of(gateway, gateway.done(response)))["data"]] == ["m-1"]


@pytest.mark.parametrize(
    ("key", "header", "place"),
    [("ada", "interactive", 1), ("ada", None, 1), ("ada", "batch", 2), ("root", "interactive", 0), ("batch", "interactive", 2)],
)
def test_the_ticket_is_its_tenants_and_no_more_urgent_than_the_key(
    key: str, header: str | None, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, tickets = guarded(), []
    lease = gateway.dispatcher.lease
    monkeypatch.setattr(gateway.dispatcher, "lease", lambda ticket: tickets.append(ticket) or lease(ticket))  # type: ignore[func-returns-value]
    ask(gateway, key, **({"x_gateway_priority": header} if header else {}))
    assert tickets[0].priority == place
    assert (tickets[0].tenant, tickets[0].weight) == (("acme", 3.0) if key == "ada" else ("t", 1.0))


@pytest.mark.parametrize("path", ["/metrics", "/admin/explain", "/admin/backends/b"])
def test_admin_routes_are_for_admins(path: str) -> None:
    gateway = guarded()
    method = "GET" if path == "/metrics" else "POST"
    body = {"/admin/explain": HELLO, "/admin/backends/b": b'{"draining": false}'}.get(path, b"")

    def code(key: str) -> int:
        response = gateway.client.request(method, f"http://g{path}", data=body, headers={"x-api-key": f"gw-{key}"})
        gateway.client.flush()
        return int(now_of(response).code)

    assert (code("ada"), code("root"), code("late")) == (403, 200, 401)


def test_metrics_may_be_open() -> None:
    gateway = guarded(metrics_open=True)
    assert now_of(gateway.get("/metrics")).code == 200
    assert now_of(gateway.get("/v1/models")).code == 401


def test_without_a_guard_nobody_is_asked() -> None:
    gateway = Gateway(EchoBackend(Clock(), lambda: NOW))
    assert now_of(gateway.post()).code == 200
    assert (gateway.records[0].tenant, gateway.records[0].key) == ("", "")
    assert "key=" not in AccessText()(gateway.records[0])


# --- a token whose key has to be fetched


class SlowJwks:
    """Signing keys that come when the test says so."""

    def __init__(self) -> None:
        self.fetched = False
        self.waiting: list[Deferred[None]] = []

    def refreshed(self) -> Deferred[None]:
        self.waiting.append(Deferred())
        return self.waiting[-1]


def by_jwks() -> tuple[Gateway, SlowJwks, Verifier]:
    jwks, verifier = SlowJwks(), Verifier(rules(claims={}))
    guard = Guard(auth(verifier), lambda: NOW, jwks=jwks)  # type: ignore[arg-type]
    return Gateway(EchoBackend(Clock(), lambda: NOW), guard=guard), jwks, verifier


def bearer(kid: str = "1") -> str:
    return f"Bearer {token('ES256', kid).decode()}"


def test_a_token_with_an_unknown_key_waits_for_the_fetch_and_then_goes_on() -> None:
    gateway, jwks, verifier = by_jwks()
    response = gateway.post(HELLO, authorization=bearer())
    assert not gateway.records
    verifier.signers = read_signers(jwk_set(jwk("ES256", kid="1")))
    jwks.waiting[0].callback(None)
    assert gateway.done(response).code == 200
    assert gateway.records[0].key == "jwt:ada"
    assert now_of(gateway.post(HELLO, authorization=bearer())).code == 200
    assert now_of(gateway.post(HELLO, x_api_key="gw-root")).code == 200
    assert len(jwks.waiting) == 1


@pytest.mark.parametrize(("fetched", "code"), [(True, (401, "invalid_api_key")), (False, (503, "no_signing_keys"))])
def test_a_key_that_no_fetch_brings_is_unknown_or_not_there_yet(fetched: bool, code: tuple[int, str]) -> None:
    gateway, jwks, _ = by_jwks()
    response = gateway.post(HELLO, authorization=bearer())
    jwks.fetched = fetched
    jwks.waiting[0].callback(None)
    answer = gateway.done(response)
    assert (answer.code, error_of(gateway, answer)["code"]) == code
    assert gateway.records[0].fault == ("caller" if fetched else "gateway")


def test_a_bad_token_waits_for_nothing() -> None:
    gateway, jwks, verifier = by_jwks()
    verifier.signers = read_signers(jwk_set(jwk("ES256", kid="1")))
    answer = now_of(gateway.post(HELLO, authorization=bearer()[:-4] + "AAAA"))
    assert (answer.code, jwks.waiting) == (401, [])
    assert gateway.records[0].route == CHAT.path


# --- what it costs


ADMIT_CALLS = 12


@pytest.mark.parametrize("kind", ["key", "token"])
def test_who_is_known_is_known_within_a_few_calls(kind: str) -> None:
    verifier = Verifier(rules(), read_signers(jwk_set(jwk("ES256", kid="1"))))
    guard = Guard(auth(verifier), lambda: NOW)
    sent = b"gw-root" if kind == "key" else token("ES256", "1")

    class Asking:
        requestHeaders = RawHeaders([(b"host", b"g"), (b"authorization", b"Bearer " + sent)])

    def admit() -> None:
        assert guard.admit(Asking(), Record("1", "POST", CHAT.path, 0.0)) is None  # type: ignore[arg-type]

    admit()
    assert calls(admit) <= ADMIT_CALLS


# --- which model it is


def test_a_model_spelt_in_another_case_beside_the_one_that_is_allowed_is_refused() -> None:
    gateway = guarded()
    body = b'{"Model":"secret","model":"m-1",' + HELLO[1:]
    answer = now_of(gateway.post(body, authorization="Bearer gw-ada"))
    assert (answer.code, error_of(gateway, answer)["param"]) == (400, "Model")
    assert not gateway.agent.requests
