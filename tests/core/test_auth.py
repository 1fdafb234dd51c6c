from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import api_keys, auth
from gateway.core.auth import Auth, credentials
from gateway.core.errors import GatewayError
from gateway.core.principal import Principal

ID, KEY = api_keys.new_key(bytes(37))
RAW = KEY.encode()
Pairs = list[tuple[bytes, bytes]]


def read(*tables: dict[str, object]) -> tuple[api_keys.ApiKey, ...]:
    return api_keys.read_keys("k", {"keys": list(tables)})


def table(id: str = ID, key: str = KEY, **more: object) -> dict[str, object]:
    return {"id": id, "tenant": "acme", "hash": hashlib.sha256(key.encode()).hexdigest(), **more}


@pytest.fixture
def known() -> Auth:
    found = Auth()
    found.use_keys(read(table(), table("old", "gw-old", expires="2030-01-01"), table("gone", "gw-gone", revoked="2020-01-01")))
    return found


def identify(known: Auth, *pairs: tuple[bytes, bytes], now: float = 1_800_000_000.0) -> Principal:
    return known.identify(dict(pairs), pairs, now)


def refused(known: Auth, *pairs: tuple[bytes, bytes], now: float = 1_800_000_000.0) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        identify(known, *pairs, now=now)
    assert caught.value.headers() == [("WWW-Authenticate", "Bearer")]
    return caught.value


@pytest.mark.parametrize(
    "pairs",
    [
        [(b"authorization", b"Bearer " + RAW)],
        [(b"authorization", b"bearer " + RAW)],
        [(b"authorization", b"BEARER   " + RAW)],
        [(b"x-api-key", RAW)],
        [(b"x-api-key", RAW), (b"authorization", b"Bearer " + RAW)],
        [(b"accept", b"a"), (b"accept", b"b"), (b"x-api-key", RAW)],
        [(b"authorization", b""), (b"x-api-key", RAW)],
    ],
)
def test_a_key_is_known_by_either_header(known: Auth, pairs: Pairs) -> None:
    assert identify(known, *pairs).id == ID


@pytest.mark.parametrize(
    "pairs",
    [[], [(b"authorization", b"")], [(b"authorization", b"Bearer")], [(b"x-api-key", b"")], [(b"cookie", b"key=" + RAW)]],
)
def test_without_a_key_it_is_missing(known: Auth, pairs: Pairs) -> None:
    assert refused(known, *pairs).code == "missing_api_key"


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ([(b"x-api-key", b"gw-other")], "no such key"),
        ([(b"x-api-key", RAW + b"x")], "no such key"),
        ([(b"x-api-key", RAW[:-1])], "no such key"),
        ([(b"x-api-key", RAW.upper())], "no such key"),
        ([(b"x-api-key", RAW + b"\x00")], "no such key"),
        ([(b"x-api-key", b"Bearer " + RAW)], "no such key"),
        ([(b"x-api-key", hashlib.sha256(RAW).hexdigest().encode())], "no such key"),
        ([(b"x-api-key", b"gw-gone")], "gone has expired or was revoked"),
        ([(b"authorization", b"Bearer " + RAW + b" x")], "no such key"),
        ([(b"authorization", b"Bearer\t" + RAW)], "another scheme"),
        ([(b"authorization", b"Bearer" + RAW)], "another scheme"),
        ([(b"authorization", b"Basic " + RAW)], "another scheme"),
        ([(b"authorization", RAW)], "another scheme"),
        ([(b"authorization", b"Bearer " + RAW), (b"authorization", b"Bearer " + RAW)], "more than once"),
        ([(b"x-api-key", RAW), (b"x-api-key", RAW)], "more than once"),
        ([(b"authorization", b"Bearer " + RAW), (b"x-api-key", b"gw-old")], "differ"),
        ([(b"x-api-key", b"a.b.c")], "no such key"),
    ],
)
def test_whatever_is_wrong_with_a_key_it_looks_alike_to_its_sender(known: Auth, pairs: Pairs, why: str) -> None:
    error = refused(known, *pairs)
    assert why in error.detail
    assert error.body() == auth.invalid("").body()
    assert not any(value in error.detail.encode() for _, value in pairs if len(value) > 4)


def test_a_key_is_valid_until_it_expires(known: Auth) -> None:
    ends = api_keys.moment("2030-01-01").timestamp()
    assert identify(known, (b"x-api-key", b"gw-old"), now=ends - 1).id == "old"
    assert refused(known, (b"x-api-key", b"gw-old"), now=ends).detail == "old has expired or was revoked"


def test_new_keys_take_the_place_of_the_old_ones_at_once(known: Auth) -> None:
    known.use_keys(read(table("b", "gw-b")))
    assert refused(known, (b"x-api-key", RAW)).detail == "no such key"
    assert identify(known, (b"x-api-key", b"gw-b")).id == "b"


@given(st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"accept"]), st.binary(max_size=60)), max_size=4))
def test_any_headers_are_credentials_or_refused(pairs: Pairs) -> None:
    try:
        found = credentials(dict(pairs), pairs)
    except GatewayError as error:
        assert error.status == 401
    else:
        assert any(found and value.endswith(found) for name, value in pairs if name != b"accept")
        assert sum(name == b"authorization" for name, _ in pairs) < 2
