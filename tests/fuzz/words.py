"""Seams of what an operator writes, and of what headers say: settings, keys, tokens, traces, proxies."""

from __future__ import annotations

import base64
import io
import json
import warnings
from dataclasses import replace
from functools import cache
from typing import Any, Final

import jwt
import msgspec
from dotenv.parser import parse_stream

from gateway.core import forwarded, proxy_header, sources, trace_context
from gateway.core.api_keys import FIELDS, parse_keys
from gateway.core.auth_settings import ALGORITHMS, PARTS
from gateway.core.backend_settings import EXAMPLE, KEYS
from gateway.core.changes import changes, picture
from gateway.core.errors import GatewayError
from gateway.core.jwt_tokens import Rules, Verifier, read_signers, secret_signer
from gateway.core.readers import SettingsError, read_toml
from gateway.core.settings import TABLE, Settings, Source, resolve

from .seams import Seam, packed

SALT: Final = b"0123456789abcdef"
SHOWN: Final = 4096


def _resolved(*given: Source) -> Settings | None:
    """Settings, or an error of one line. They are the same as themselves, and can be told without what is secret."""
    try:
        found = resolve(given)
    except SettingsError as problem:
        _told(problem)
        return None
    told = picture(found, SALT)
    assert changes(told, picture(found, SALT)) == []
    text, harmless = json.dumps(told), json.dumps(picture(_without_secrets(found), SALT))
    for secret in _secrets(found):
        shown = json.dumps(secret)[1:-1]
        assert len(secret) < 8 or shown not in text or shown in harmless  # "127.0.0.1" is no good secret
    return found


def _without_secrets(found: Settings) -> Settings:
    backends = tuple(replace(one, api_key=None) for one in found.backends)
    blank: dict[str, Any] = {row.name: None for row in TABLE if row.secret}
    return replace(found, backends=backends, **blank)


def _told(problem: SettingsError) -> None:
    assert "\n" not in str(problem)
    assert len(str(problem)) <= SHOWN


def _secrets(found: Settings) -> list[str]:
    made = [getattr(found, row.name) for row in TABLE if row.secret] + [one.api_key for one in found.backends]
    passwords = [getattr(one, "password", None) for one in made]
    return [one for one in [*made, *passwords] if isinstance(one, str)]


def toml(data: bytes) -> None:
    """A file of settings."""
    try:
        values = read_toml("gateway.toml", data.decode("utf-8", "replace"))
    except SettingsError as problem:
        _told(problem)
        return
    _resolved(Source("gateway.toml", "file", values))


def dotenv(data: bytes) -> None:
    """A .env file; the same as the environment."""
    lines = list(parse_stream(io.StringIO(data.decode("utf-8", "replace"))))
    values = {line.key: line.value for line in lines if line.key is not None}
    _resolved(Source(".env", "dotenv", values))
    _resolved(Source("environment", "env", {name: value for name, value in values.items() if value is not None}))


def one_setting(data: bytes) -> None:
    """The first byte chooses a setting, the others are its value: in the environment, and as a secret beside it."""
    row = TABLE[data[0] % len(TABLE)] if data else TABLE[0]
    text = data[1:].decode("utf-8", "surrogateescape")  # as os.environ has it
    _resolved(Source("environment", "env", {row.env: text}))
    for reader in (row.read, *(key.read for key in KEYS)):
        try:
            reader(text)
        except ValueError as problem:
            assert len(str(problem)) <= SHOWN


def source(data: bytes) -> None:
    """A URL where backends are to be found reads the same once it was written."""
    try:
        url = sources.read_url(data.decode("utf-8", "replace"))
    except ValueError:
        return
    assert sources.read_url(sources.written(url)) == url


def keys(data: bytes) -> None:
    """A file of API keys."""
    try:
        parse_keys("keys.toml", data.decode("utf-8", "replace"))
    except SettingsError as problem:
        _told(problem)


NOW: Final = 1_800_000_000.0
SECRET: Final = "a-secret-of-32-characters-or-more"


@cache
def _verifier() -> Verifier:
    return Verifier(Rules(ALGORITHMS, None, None, 30.0, {part: part for part in PARTS}), [secret_signer(SECRET)])


def token(data: bytes) -> None:
    """A token is somebody's, or refused: the bytes as they are, as header and claims, and as claims with a good signature."""
    encoded = base64.urlsafe_b64encode(data).rstrip(b"=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signed = jwt.PyJWS().encode(data, SECRET, "HS256").encode()
        for one in (data, encoded + b"." + encoded + b".AAAA", signed):
            try:
                who = _verifier().verify(one, NOW)
            except GatewayError:
                continue
            assert one is signed
            assert who.expires > NOW
            assert who.weight > 0
            assert len(who.tenant) <= 256


def signers(data: bytes) -> None:
    """Keys are read, or told to be none."""
    try:
        found = read_signers(data)
    except ValueError:
        return
    assert found
    assert {one.algorithm for one in found} <= {"RS256", "ES256", "EdDSA"}


def trace(data: bytes) -> None:
    """A caller's trace goes on in headers that read the same; garbage counts as none."""
    parent, _, state = data.partition(b"\n")
    headers = [(b"traceparent", parent), *((b"tracestate", one) for one in state.split(b"\n"))]
    found = trace_context.Tracing(1.0, lambda bits: (1 << bits) - 2).begin(headers)
    assert found is not None
    read = trace_context.read(found.onward(headers, 0)) if found.sampled else None
    if read is not None:
        assert (read.trace_id, read.state) == (found.trace_id, found.state)
    assert len(found.state) <= trace_context.MAX_STATE
    found.answered(data)
    assert len(found.answer_id) + len(found.answer_model) <= 2 * trace_context.MAX_TEXT
    msgspec.json.encode(found)


@cache
def _proxies() -> forwarded.Proxies:
    return forwarded.Proxies(forwarded.networks("10.0.0.0/8, 2001:db8:1::/48, unix"))


def forwarded_for(data: bytes) -> None:
    """The client is an address, whatever X-Forwarded-For says; of who is no proxy of ours it is its own."""
    fields = data.split(b"\n")
    assert _proxies().client("198.51.100.1", fields) == "198.51.100.1"
    for peer in ("10.0.0.1", forwarded.UNIX):
        found = _proxies().client(peer, fields)
        assert found == peer or forwarded.address_of(found) is not None
        assert len(found) <= 45
    try:
        forwarded.Proxies(forwarded.networks(data.decode("utf-8", "replace")))
    except ValueError as problem:
        assert len(str(problem)) <= SHOWN


def proxy(data: bytes) -> None:
    """A PROXY header says the same however it is cut; one that has not ended is never longer than its bound."""
    outcomes = [_said(data, cut) for cut in range(len(data) + 1)]
    whole = _said(data, None)
    last = next((one for one in outcomes if one is not None), None)
    assert last == whole or (whole is None and last is None)
    if whole is None:
        assert len(data) < proxy_header.MAX_V2
    elif isinstance(whole, proxy_header.Told):
        assert whole.length <= len(data)
        assert not whole.host or forwarded.address_of(whole.host) is not None
        assert 0 <= whole.port < 65536


def _said(data: bytes, cut: int | None) -> proxy_header.Told | str | None:
    try:
        return proxy_header.read(data if cut is None else data[:cut])
    except ValueError:
        return "refused"


_HASH: Final = "0" * 64
_KEYS: Final = [
    f'[[keys]]\nid = "a"\ntenant = "t"\nhash = "{_HASH}"\n{name} = {value}\n'
    for name, value in (
        ("expires", "2030-01-31T12:00:00Z"),
        ("revoked", "2030-01-31"),
        ("budget", '"25.50 money/month"'),
        ("rpm", "7"),
        ("models", '["m*"]'),
    )
]
ODD_TOML: Final = [
    "0x" + "f" * 5000,
    "1" * 5000,
    "-1",
    "1e308",
    "nan",
    "inf",
    "true",
    '""',
    '"\\u0000"',
    "'x'",
    "[]",
    "[[[]]]",
    "{}",
    "{a.b.c = [1]}",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59",
    '"0001-01-01T00:00:00+23:59"',
    "2030-01-31T12:00:00",
    "12:00:00",
    "[" * 900 + "]" * 900,
    "[" * 5000 + "]" * 5000,
    "{a=" * 300 + "1" + "}" * 300,
]
"""What a value of TOML may be that nobody thinks of."""


def odd_files() -> list[bytes]:
    """Files of settings, each with one odd value."""
    heads = [(name, "") for name in [row.name for row in TABLE if row.in_file] + ["backends", "models", "prices", "unheard"]]
    heads += [(key.name, '[[backends]]\nname = "n"\n') for key in KEYS]
    heads += [(name, "[models.m]\n") for name in ("backend_model", "fallbacks", "defaults", "ranges", "defaults.temperature")]
    heads += [("max_tokens", "[models.m.ranges]\n"), ("prompt", "[prices.m]\n")]
    deep = {odd for odd in ODD_TOML if len(odd) > 1000}  # slow to read, and refused before any name is looked at
    made = [f"{head}{name} = {odd}\n" for name, head in heads for odd in ODD_TOML if odd not in deep]
    made += [f"port = {odd}\n" for odd in deep]
    made.append(f"[models.m.defaults.{'a.' * 5000}a]\nb = 1\n")
    made.append(f"{'a.' * 5000}a = 1\n")
    return [one.encode() for one in made]


def odd_keys() -> list[bytes]:
    """Files of keys, each with one odd value."""
    least = {"id": '"a"', "tenant": '"t"', "hash": f'"{_HASH}"'}
    tables = [{**least, field.name: odd} for field in FIELDS for odd in ODD_TOML if len(odd) < 1000]
    made = ["[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in table.items()) for table in tables]
    return [one.encode() for one in [*made, *(f"keys = {odd}\n" for odd in ODD_TOML)]]


_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_PROXY: Final = [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65535\r\nGET /",
    b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n",
    b"PROXY UNKNOWN whatever\r\n",
    _V2 + b"\x21\x11\x00\x0c" + bytes(range(12)) + b"GET",
    _V2 + b"\x21\x21\x00\x2a" + bytes(range(36)) + b"\x04\x00\x03abc",
    _V2 + b"\x20\x00\x00\x00",
    _V2 + b"\x21\x31\x00\xd8" + bytes(216),
]
_PARENT: Final = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_ENV: Final = "\n".join(f"{row.env}={row.default}" for row in TABLE if row.default)
_CLAIMS: Final[dict[str, Any]] = {"sub": "ada", "exp": NOW + 60, "nbf": NOW, **dict.fromkeys(PARTS, 1)}
_MODELS: Final = (
    '[models.m]\nfallbacks = ["n"]\ndefaults.temperature = 0.5\nranges.max_tokens = 5\n[prices."*"]\nprompt = 0.5\n'
)

SEAMS: Final = {
    "toml": Seam(toml, [EXAMPLE.replace("EXAMPLE_KEY", "X").encode(), _MODELS.encode(), b"port = 1\nkeys = 'k'\n"]),
    "dotenv": Seam(dotenv, [_ENV.encode(), b"GATEWAY_BACKEND_API_KEY='secret-key-0'\nBACKEND_URL=http://a,http://b\n"]),
    "setting": Seam(one_setting, [bytes([at]) + (row.default or "x").encode() for at, row in enumerate(TABLE)]),
    "source": Seam(source, [b"dns+http://models.example:80/v1", b"srv+https://_http._tcp.a.example/x", b"k8s+http://a.b:http"]),
    "keys": Seam(keys, [one.encode() for one in _KEYS]),
    "token": Seam(token, packed(_CLAIMS)),
    "signers": Seam(signers, packed({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43, "kid": "k"}]}, {"kty": "RSA"})),
    "trace": Seam(
        trace, [_PARENT + b"\na=1,b=2\nc=3", _PARENT + b"-more", b'{"id": "a", "model": "m", "response": {"id": "b"}}']
    ),
    "forwarded": Seam(
        forwarded_for, [b"198.51.100.7, 10.0.0.2:80\n[2001:db8::1]:443", b"10.0.0.0/8,unix", b"::ffff:192.0.2.1"]
    ),
    "proxy": Seam(proxy, _PROXY),
}
