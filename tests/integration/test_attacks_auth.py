"""Ways round authentication, each tried against the real daemon: none gets in, and none leaves a secret behind."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jwt
import pytest

from gateway.core import auth
from gateway.core.api_keys import read_keys
from gateway.core.auth import Auth
from gateway.core.errors import GatewayError

from ..core.test_jwt_tokens import GOOD, jwk, pem, private
from ..test_cost import calls
from .asking import rest
from .keys import HELLO, add, ask, id_of
from .processes import Running, wait_for

BODY = json.dumps(HELLO).encode()


class Target(NamedTuple):
    """A gateway that takes keys and tokens signed by one RSA key, with everything that must not show."""

    gateway: Running
    key: str
    root: str
    token: str

    def raw(self, *headers: bytes, method: bytes = b"POST", target: bytes = b"/v1/chat/completions") -> tuple[int, bytes]:
        """Status and body of a request with exactly these header lines."""
        lines = [b"%b %b HTTP/1.1" % (method, target), b"Host: g", b"Connection: close", *headers]
        if method == b"POST":
            lines.append(b"Content-Length: %d" % len(BODY))
        with self.gateway.connect() as client:
            with suppress(ConnectionError):  # refused before it was all sent
                client.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + (BODY if method == b"POST" else b""))
            answer = rest(client)
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), body

    def bearer(self, token: bytes | str) -> tuple[int, bytes]:
        sent = token.encode() if isinstance(token, str) else token
        return self.raw(b"Authorization: Bearer " + sent)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("attacked")
    path = directory / "keys.toml"
    key, root = add(path, "acme"), add(path, "ops", "--admin")
    (directory / "public.pem").write_bytes(pem("RS256"))
    trust = {"GATEWAY_JWT_ISSUER": "https://issuer", "GATEWAY_JWT_AUDIENCE": "gateway", "GATEWAY_JWT_KEY_FILE": "public.pem"}
    with Running(directory, GATEWAY_KEYS="keys.toml", **trust) as gateway:
        found = Target(gateway, key, root, made())
        assert found.bearer(key)[0] == 200
        assert found.bearer(found.token)[0] == 200
        yield found


def claims(**changes: Any) -> dict[str, Any]:
    given = GOOD | {"exp": time.time() + 600} | changes
    return {name: value for name, value in given.items() if value is not None}


def made(algorithm: str = "RS256", key: Any = None, header: dict[str, Any] | None = None, **changes: Any) -> str:
    """A token; good, if nothing is changed."""
    payload = json.dumps(claims(**changes)).encode()
    return jwt.PyJWS().encode(payload, private("RS256") if key is None else key, algorithm, header)


def by_hand(header: dict[str, Any], sign: bytes | None = None, **changes: Any) -> str:
    """A token that no library would make: signed with HMAC by any secret, or not at all."""
    parts = [jwt.utils.base64url_encode(json.dumps(part).encode()) for part in (header, claims(**changes))]
    signed = b"" if sign is None else hmac.digest(sign, b".".join(parts), "sha256")
    return b".".join([*parts, jwt.utils.base64url_encode(signed)]).decode()


KIDS = [
    "../../../../dev/null",
    "/dev/null",
    "public.pem",
    "file:///dev/null",
    "' OR 1=1 --",
    "http://127.0.0.1:1/jwks",
    "\x00",
    "",
]

TOKENS: dict[str, Callable[[], str]] = {
    "no algorithm": lambda: by_hand({"typ": "JWT"}),
    **{f"alg {name}": partial(by_hand, {"alg": name}) for name in ("none", "None", "NONE", "nOnE", "", " none")},
    "alg none with a signature": lambda: by_hand({"alg": "none"}, b"x"),
    "alg is a list": lambda: by_hand({"alg": ["RS256", "none"]}),
    "alg is null": lambda: by_hand({"alg": None}),
    "HMAC with the public key": lambda: by_hand({"alg": "HS256"}, pem("RS256")),
    "HMAC with the public key without its last newline": lambda: by_hand({"alg": "HS256"}, pem("RS256").strip()),
    "HMAC with the public key as RS256": lambda: by_hand({"alg": "RS256"}, pem("RS256")),
    "HMAC with an empty secret": lambda: by_hand({"alg": "HS256"}, b""),
    **{f"kid {kid!r}": partial(by_hand, {"alg": "HS256", "kid": kid}, b"") for kid in KIDS},
    "kid is a list": lambda: by_hand({"alg": "RS256", "kid": ["1"]}),
    "another key": lambda: made(key=private("RS256 other")),
    "a key of its own in the header": lambda: made(key=private("RS256 other"), header={"jwk": jwk("RS256 other")}),
    "a URL of its own for keys": lambda: made(
        key=private("RS256 other"), header={"jku": "http://127.0.0.1:1/", "x5u": "http://x"}
    ),
    "a key of another kind": lambda: made("ES256", private("ES256")),
    "the wrong RSA padding": lambda: made("PS256"),
    "a longer hash": lambda: made("RS512"),
    "an extension that must be understood": lambda: made(header={"crit": ["exp"], "exp": 1}),
    "no exp": lambda: made(exp=None),
    "exp is text": lambda: made(exp="9999999999"),
    "exp has no end": lambda: made(exp=1e300),
    "expired": lambda: made(exp=time.time() - 40),
    "not yet valid": lambda: made(nbf=time.time() + 60),
    "another audience": lambda: made(aud="gateway-staging"),
    "no audience": lambda: made(aud=None),
    "another issuer": lambda: made(iss="https://issuer.evil"),
    "no issuer": lambda: made(iss=None),
    "no signature": lambda: made().rpartition(".")[0] + ".",
    "no third part": lambda: made().rpartition(".")[0],
    "a fourth part": lambda: made() + ".AAAA",
    "another's payload": lambda: ".".join([made().split(".")[0], made(sub="root").split(".")[1], made().split(".")[2]]),
    "padding": lambda: made() + "==",
    "white space within": lambda: made().replace(".", " .", 1),
    "dots alone": lambda: "..",
    "a nested header": lambda: jwt.utils.base64url_encode(b'{"alg":' + b"[" * 5000).decode() + ".e30.AAAA",
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_forged_token_does_not_get_in(target: Target, name: str) -> None:
    status, body = target.bearer(TOKENS[name]())
    assert (status, body) == (401, auth.invalid("").body()), name


def test_the_token_that_the_forged_ones_are_made_of_gets_in(target: Target) -> None:
    assert target.bearer(made(nbf=time.time()))[0] == 200
    assert target.bearer(made(aud=["others", "gateway"]))[0] == 200


def lines_of(key: bytes) -> dict[str, tuple[int, list[bytes]]]:
    """Tricks with header lines, and the status each ends with."""
    bearer = b"Authorization: Bearer " + key
    return {
        "twice the same": (401, [bearer, bearer]),
        "first good, then bad": (401, [bearer, b"Authorization: Bearer x"]),
        "first bad, then good": (401, [b"Authorization: Bearer x", bearer]),
        "first empty, then good": (401, [b"Authorization:", bearer]),
        "in other case twice": (401, [bearer, b"AUTHORIZATION: Bearer x"]),
        "two that differ": (401, [bearer, b"x-api-key: x"]),
        "two keys with a comma": (401, [bearer + b", Bearer x"]),
        "folded": (400, [b"Authorization: Bearer", b" " + key]),
        "a space before the colon": (400, [b"Authorization : Bearer " + key]),
        "NUL behind it": (400, [bearer + b"\x00"]),
        "NUL in it": (400, [b"Authorization: Bearer gw-\x00" + key]),
        "a bare LF in it": (400, [b"Authorization: Bearer x\n" + bearer]),
        "a tab for a space": (401, [b"Authorization: Bearer\t" + key]),
        "as Basic": (401, [b"Authorization: Basic " + key]),
        "without a scheme": (401, [b"Authorization: " + key]),
        "in quotes": (401, [b'Authorization: Bearer "' + key + b'"']),
        "percent-encoded": (401, [b"Authorization: Bearer " + key.replace(b"-", b"%2D")]),
        "in another header": (401, [b"Proxy-Authorization: Bearer " + key]),
        "with underscores": (401, [b"x_api_key: " + key]),
        "in a cookie": (401, [b"Cookie: api_key=" + key]),
        "its hash": (401, [b"x-api-key: " + hashlib.sha256(key).hexdigest().encode()]),
        "its id": (401, [b"x-api-key: " + key.split(b"-")[1]]),
        "1 MiB": (431, [b"Authorization: Bearer " + b"x" * 2**20]),
        "1 MiB of spaces": (431, [b"Authorization: Bearer " + b" " * 2**20 + key]),
        "a scheme in lower case": (200, [b"authorization: bearer " + key]),
        "a scheme in upper case and spaces": (200, [b"AUTHORIZATION:   BEARER   " + key + b"  "]),
        "x-api-key": (200, [b"X-Api-Key: " + key]),
        "two that agree": (200, [bearer, b"x-api-key: " + key]),
    }


@pytest.mark.parametrize("name", lines_of(b"gw-id-secret"))
def test_a_trick_with_headers_ends_as_it_should(target: Target, name: str) -> None:
    expected, lines = lines_of(target.key.encode())[name]
    status, body = target.raw(*lines)
    assert status == expected, body
    assert target.key.encode() not in body


@pytest.mark.parametrize("name", ["key", "api_key", "api-key", "access_token", "token", "authorization", "x-api-key"])
def test_a_key_in_the_url_is_not_taken_and_not_logged(target: Target, name: str) -> None:
    status, body = target.raw(target=b"/v1/chat/completions?%b=%b" % (name.encode(), target.key.encode()))
    assert status == 401
    assert target.key.encode() not in body
    status, body = target.raw(target=b"http://user:%b@g/v1/chat/completions" % target.key.encode())
    assert status in (400, 401)
    assert target.key.encode() not in body


PATHS = [
    b"/healthz/../v1/models",
    b"/healthz%2f..%2fv1%2fmodels",
    b"/v1/models/",
    b"//v1/models",
    b"/V1/models",
    b"/v1/models?/healthz",
    b"/v1/models;/healthz",
    b"/v1/models%00",
    b"/v1/models/x",
    b"/metrics/",
    b"/metrics",
    b"/admin/../metrics",
    b"http://g/v1/models",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
def test_no_spelling_of_a_path_gets_by_without_a_key(target: Target, path: bytes, method: bytes) -> None:
    assert target.raw(method=method, target=path)[0] in (400, 401, 404, 405)


def test_a_look_up_takes_the_same_steps_however_much_of_a_key_is_right() -> None:
    """There is nothing to time: a guess is hashed before anything looks at it."""
    key = b"gw-aaaaaaaa-" + b"k" * 43
    known = Auth()
    known.use_keys(read_keys("k", {"keys": [{"id": "a", "tenant": "t", "hash": hashlib.sha256(key).hexdigest()}]}))

    def guess(right: int) -> int:
        sent = key[:right] + b"x" * (len(key) - right)

        def identify() -> None:
            with pytest.raises(GatewayError):
                known.identify({b"x-api-key": sent}, [(b"x-api-key", sent)], 0.0)

        return calls(identify)

    assert len({guess(right) for right in (0, 1, 12, 30, len(key) - 1)}) == 1
    assert all(len(stored) == 32 for stored in known._keys)


def test_after_all_of_this_no_secret_stands_anywhere(target: Target) -> None:
    """The log, the metrics in each form, the admin's pages and the answers hold no key, no token, and no hash."""
    secret = [target.key, target.root, target.token, made()]
    for sent in secret:
        target.bearer(sent)
        target.bearer(sent + "x")
        target.raw(b"x-api-key: " + sent.encode(), target=b"/v1/nope/" + sent.encode()[:8] + b"?k=" + sent.encode())
    pages = [
        ask(target.gateway, target.root, HELLO, "/admin/explain")[1],
        ask(target.gateway, target.root, None, "/metrics")[1],
    ]
    shown = [json.dumps(page) for page in pages]
    for accept in (b"text/plain", b"application/openmetrics-text"):
        status, body = target.raw(
            b"Accept: " + accept, b"x-api-key: " + target.root.encode(), method=b"GET", target=b"/metrics"
        )
        assert status == 200
        shown.append(body.decode())
    wait_for(lambda: target.gateway.lines().count("route=/metrics status=200") >= 3)
    shown.append(target.gateway.lines())
    assert f"key={id_of(target.key)}" in shown[-1]
    assert "key=jwt:ada" in shown[-1]
    for sent in secret:
        tail = sent.rpartition(".")[2] if "." in sent else sent.split("-", 2)[2]
        for text in shown:
            assert sent not in text
            assert tail[:20] not in text
            assert hashlib.sha256(sent.encode()).hexdigest()[:20] not in text
