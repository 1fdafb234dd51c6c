from __future__ import annotations

from typing import Any

from gateway.core.changes import LIVE, changes, picture, taken_over
from gateway.core.settings import Settings, Source, resolve

SALT = b"0123456789abcdef"


def settings(**values: Any) -> Settings:
    return resolve([Source("gateway.toml", "file", values)])


def told(before: Settings, after: Settings) -> list[str]:
    return [str(change) for change in changes(picture(before, SALT), picture(after, SALT))]


BACKENDS = [{"url": "http://a:1", "name": "a"}, {"url": "http://b:1", "name": "b", "slots": 4}]


def test_the_same_settings_have_no_changes() -> None:
    assert told(settings(backends=BACKENDS), settings(backends=BACKENDS)) == []


def test_each_value_that_differs_is_told_with_its_place() -> None:
    before = settings(backends=BACKENDS, models={"m": {"fallbacks": ["n"]}}, grace="30s")
    after = settings(
        backends=[{"url": "http://b:1", "name": "b", "slots": 8}, {"url": "http://c:1", "name": "c"}],
        models={"n": {"backend_model": "o"}},
        prices={"m": {"prompt": 1.5}},
        grace="10s",
    )
    assert told(before, after) == [
        "backends.a: taken away",
        "backends.b.slots: 4 -> 8",
        "backends.c: new",
        "grace: 30.0 -> 10.0",
        "models.m: taken away",
        "models.n: new",
        "prices.m: new",
    ]


def test_a_secret_is_seen_to_change_and_never_shown() -> None:
    before, after = settings(jwt_key="a" * 32), settings(jwt_key="b" * 32)
    (change,) = changes(picture(before, SALT), picture(after, SALT))
    assert change.name == "jwt_key"
    assert "aaaa" not in str(change)
    assert "bbbb" not in str(change)
    assert told(before, settings(jwt_key="a" * 32)) == []


def test_a_backends_key_is_a_secret_too() -> None:
    def with_key(key: str) -> Settings:
        sources = [
            Source("environment", "env", {"A_KEY": key}),
            Source("file", "file", {"backends": [{"url": "http://a:1", "api_key_env": "A_KEY"}]}),
        ]
        return resolve(sources)

    (told_of,) = told(with_key("sk-one"), with_key("sk-two"))
    assert told_of.startswith("backends.a:1.api_key: secret ")
    assert "sk-" not in told_of


def test_pictures_with_different_salts_have_no_fingerprint_in_common() -> None:
    made = settings(jwt_key="a" * 32)
    assert picture(made, b"0" * 16)["jwt_key"] != picture(made, b"1" * 16)["jwt_key"]


def test_what_a_reload_takes_over_is_taken_over_and_the_rest_waits() -> None:
    before = settings(backends=BACKENDS, port=8080, grace="30s")
    after = settings(backends=BACKENDS[:1], port=9090, grace="10s", log_format="json")
    held = taken_over(before, after)
    assert (held.backends, held.grace) == (after.backends, 10.0)
    assert (held.port, held.log_format) == (8080, "text")
    left = changes(picture(held, SALT), picture(after, SALT))
    assert [(change.name, change.live) for change in left] == [("log_format", False), ("port", False)]


def test_what_is_taken_over_is_a_setting() -> None:
    assert set(Settings.__dataclass_fields__) >= LIVE
