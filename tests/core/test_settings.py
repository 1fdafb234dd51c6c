from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.backend_settings import EXAMPLE, KEYS, BackendSettings
from gateway.core.prices import Price
from gateway.core.readers import RedisServer, SettingsError
from gateway.core.settings import TABLE, Settings, Source, env_example, markdown, option_rows, resolve

ROOT = Path(__file__).parents[2]


def env(**values: str) -> Source:
    return Source("environment", "env", values)


def option(**values: str) -> Source:
    return Source("command line", "option", values)


def file(**values: Any) -> Source:
    return Source("gateway.toml", "file", values)


def test_without_any_source_the_defaults_hold() -> None:
    settings = resolve([])
    assert settings == Settings()
    assert (settings.port, settings.backend_url, settings.max_body) == (8080, None, 32 * 1024 * 1024)
    assert (settings.connect_timeout, settings.first_byte_timeout, settings.total_timeout) == (5.0, 60.0, 0.0)


def test_a_later_source_wins() -> None:
    dotenv = Source(".env", "env", {"PORT": "2", "GATEWAY_GRACE": "2"})
    sources = [file(port=1, grace=1, idle_timeout=1), dotenv, env(PORT="3"), option(port="4")]
    settings = resolve(sources)
    assert (settings.port, settings.grace, settings.idle_timeout) == (4, 2.0, 1.0)
    assert resolve(sources[:3]).port == 3


def test_an_empty_value_is_as_good_as_none() -> None:
    assert resolve([env(BACKEND_URL="", PORT="")]) == Settings()
    assert resolve([env(PORT="5"), option(port="")]).port == 5


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (option(port="http"), "--port: 'http' is not a whole number from 0 to 65535"),
        (option(port="65536"), "--port: '65536' is not a whole number from 0 to 65535"),
        (env(PORT="-1"), "environment: PORT: '-1' is not a whole number"),
        (env(BACKEND_URL="localhost:8000"), "environment: BACKEND_URL: 'localhost:8000' is not a URL such as"),
        (env(BACKEND_URL="http://user:secret@host"), "without user"),
        (env(BACKEND_URL="http://host:99999"), "is not a URL such as"),
        (env(BACKEND_URL="http://host/?q=1"), "is not a URL such as"),
        (
            env(GATEWAY_BACKEND_KIND="vlm"),
            "GATEWAY_BACKEND_KIND: 'vlm' is not one of auto, llamacpp, vllm, sglang, ollama, tgi, openai",
        ),
        (option(max_body="32MB"), "--max-body: '32MB' is not a size from"),
        (option(grace="soon"), "--grace: 'soon' is not a duration"),
        (option(idle_timeout="0"), "--idle-timeout: '0' is not a duration from 0.01 s"),
        (option(host="not a host"), "--host: 'not a host' is not an IP address or a host name"),
        (file(port=True), "gateway.toml: port: True is not a whole number"),
        (file(port=[1]), "gateway.toml: port: [1] is not a whole number"),
        (file(stream_usage="maybe"), "gateway.toml: stream_usage: 'maybe' is not true or false"),
        (file(prot=1), "gateway.toml: unknown setting 'prot'; known are port, host"),
        (Source(".env", "dotenv", {"GATEWAY_GRCE": "5"}), ".env: unknown setting 'GATEWAY_GRCE'"),
        (file(config="x"), "gateway.toml: unknown setting 'config'"),
        (env(GATEWAY_LEDGER="mysql://u:p@h/d"), "GATEWAY_LEDGER: the value is not the path of an SQLite file, a URL such as"),
        (file(prices={"m": {"promt": 1}}), "gateway.toml: prices.'m': unknown key 'promt'"),
    ],
)
def test_a_bad_value_or_an_unknown_key_is_named_with_where_it_stands(source: Source, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([source])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ledger_is_kept_only_by_those_who_want_it() -> None:
    assert resolve([]).ledger is None
    assert not resolve([file(ledger="usage.sqlite"), env(GATEWAY_LEDGER="off")]).ledger
    assert resolve([env(GATEWAY_LEDGER="postgresql://u:p@h/d")]).ledger == "postgresql://u:p@h/d"


def test_a_secret_is_never_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([env(GATEWAY_BACKEND_API_KEY="sk-secret\x00")])
    assert "sk-secret" not in str(caught.value)
    assert "backend-api-key" not in {name for name, _ in option_rows()}


def test_a_redis_url_is_taken_apart_and_its_password_never_shown() -> None:
    server = resolve([env(GATEWAY_REDIS_URL="rediss://me:p%40ss-word@cache.example:6380/2")]).redis_url
    assert server == RedisServer(True, "cache.example", 6380, "me", "p@ss-word", 2)
    assert "p@ss-word" not in repr(server)
    assert resolve([env(GATEWAY_REDIS_URL="redis://127.0.0.1")]).redis_url == RedisServer(
        False, "127.0.0.1", 6379, None, None, 0
    )
    assert "redis-url" not in {name for name, _ in option_rows()}


@pytest.mark.parametrize(
    "url", ["http://h:6379", "redis://", "redis://:s3cret@h:99999", "redis://:s3cret@h/x", "redis://:s3cret@h?a=1", "h:6379"]
)
def test_a_bad_redis_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match="GATEWAY_REDIS_URL: the value is not a URL such as") as caught:
        resolve([env(GATEWAY_REDIS_URL=url)])
    assert "s3cret" not in str(caught.value)


def test_prices_are_tables_of_the_file() -> None:
    prices = resolve([Source("f.toml", "file", {"prices": {"m": {"prompt": 1.5}}})]).prices
    assert prices == {"m": Price(prompt=1.5)}


def test_names_that_are_somebody_elses_are_left_alone_in_the_environment() -> None:
    assert resolve([env(GATEWAY_PORT="tcp://10.0.0.1:80", GATEWAY_SERVICE_HOST="10.0.0.1", HOME="/")]) == Settings()


@pytest.mark.parametrize(
    ("text", "value"),
    [("30", 30.0), ("500ms", 0.5), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0), (" 5 s ", 5.0)],
)
def test_durations_carry_their_unit(text: str, value: float) -> None:
    assert resolve([option(grace=text)]).grace == value


@pytest.mark.parametrize(("text", "value"), [("2048", 2048), ("512KiB", 524288), ("1 MiB", 1048576), ("1.5GiB", 1610612736)])
def test_sizes_carry_their_unit(text: str, value: int) -> None:
    assert resolve([option(max_body=text)]).max_body == value


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("https://models.example/llm/v1/", "https://models.example/llm"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_base_url_is_brought_into_one_form(url: str, expected: str) -> None:
    assert resolve([env(BACKEND_URL=url)]).backend_url == (expected,)


@given(st.sampled_from([row for row in TABLE if not row.secret]), st.text() | st.integers() | st.floats() | st.booleans())
def test_any_value_is_taken_or_refused_in_one_line(row: Any, value: Any) -> None:
    try:
        resolve([Source("x", "option", {row.name: value})])
    except SettingsError as error:
        assert f"--{row.option}" in str(error)


@pytest.mark.parametrize("row", [row for row in TABLE if row.default], ids=lambda row: row.name)
def test_what_the_table_shows_as_default_is_the_default(row: Any) -> None:
    assert getattr(resolve([Source("x", "option", {row.name: row.default})]), row.name) == getattr(Settings(), row.name)


def test_the_files_made_from_the_table_are_up_to_date() -> None:
    assert (ROOT / ".env.example").read_text() == env_example(), "run make docs"
    assert (ROOT / "docs/configuration.md").read_text() == markdown(), "run make docs"


# --- backends


def backends(*tables: Any, **more: Any) -> Source:
    return file(backends=list(tables), **more)


A, B = {"url": "http://a:1"}, {"url": "http://b:2/v1", "name": "second"}


def test_several_urls_are_several_backends_alike() -> None:
    sources = [env(BACKEND_URL="http://a:1, http://b:2/v1,", GATEWAY_BACKEND_API_KEY="k", GATEWAY_IDLE_TIMEOUT="7")]
    found = resolve(sources).backends
    assert [(one.name, one.url, one.kind, one.api_key, one.idle_timeout) for one in found] == [
        ("a:1", "http://a:1", "auto", "k", 7.0),
        ("b:2", "http://b:2", "auto", "k", 7.0),
    ]
    assert "'k'" not in repr(found)
    assert resolve([]).backends == ()


def test_a_table_says_how_its_backend_differs() -> None:
    own = {"slots": 4, "device": "CPU", "cost_factor": 0.5, "weight": 2, "kind": "tgi", "models": ["m"], "api_key_env": "KEY"}
    own |= {"total_timeout": "1m", "connect_timeout": "500ms", "stream_usage": False}
    source = env(KEY="secret", GATEWAY_BACKEND_API_KEY="global", GATEWAY_FIRST_BYTE_TIMEOUT="9")
    first, second = resolve([backends(A | own, B), source]).backends
    assert first == BackendSettings(
        name="a:1",
        url="http://a:1",
        kind="tgi",
        models=("m",),
        weight=2.0,
        slots=4,
        device="cpu",
        cost_factor=0.5,
        api_key="secret",
        stream_usage=False,
        connect_timeout=0.5,
        first_byte_timeout=9.0,
        total_timeout=60.0,
    )
    assert (second.name, second.url, second.api_key, second.slots) == ("second", "http://b:2", "global", None)


def test_the_last_source_that_names_backends_names_them_all() -> None:
    assert [one.name for one in resolve([backends(A, B), env(BACKEND_URL="http://c:3")]).backends] == ["c:3"]
    assert [one.name for one in resolve([backends(A, B), env(BACKEND_URL="")]).backends] == ["a:1", "second"]
    last = resolve([env(BACKEND_URL="http://c:3"), backends(A)])
    assert (last.backend_url, [one.name for one in last.backends]) == (None, ["a:1"])


def test_backends_under_one_host_are_told_apart_by_their_paths() -> None:
    found = resolve([env(BACKEND_URL="http://h/a,http://h/b,http://i/c")]).backends
    assert [one.name for one in found] == ["h/a", "h/b", "i"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (backends(A, {"url": "b"}), "gateway.toml: backends[1].url: 'b' is not a URL such as"),
        (backends({"name": "x"}), "gateway.toml: backends[0].url: missing; give the base URL"),
        (backends(A, B | {"slot": 1}), "gateway.toml: backends[1]: unknown key 'slot'; known are url, name"),
        (backends(A | {"slots": 0}), "backends[0].slots: 0 is not a whole number from 1"),
        (backends(A | {"weight": "heavy"}), "backends[0].weight: 'heavy' is not a number from 0.001"),
        (backends(A | {"kind": "vlm"}), "backends[0].kind: 'vlm' is not one of auto, llamacpp"),
        (backends(A | {"name": "a b"}), "backends[0].name: 'a b' is not a name of letters"),
        (backends(A | {"device": "big gpu"}), "backends[0].device: 'big gpu' is not a word"),
        (backends(A | {"models": "m"}), "backends[0].models: 'm' is not a list of at most"),
        (backends(A | {"models": ["m", 1]}), "backends[0].models: ['m', 1] is not a list of at most"),
        (backends(A | {"api_key_env": "MY KEY"}), "backends[0].api_key_env: 'MY KEY' is not the name of"),
        (backends(A | {"api_key_env": "NOT_SET"}), "backends[0].api_key_env: the variable NOT_SET is not set"),
        (backends(A, {"url": "http://a:1/v1/"}), "backends[1].url: 'http://a:1' is that of backends[0] too"),
        (backends(A | {"name": "x"}, B | {"name": "x"}), "backends[1].name: 'x' is that of backends[0] too"),
        (backends(A, backend_url="http://b:2"), "gateway.toml: backend_url and [[backends]] both name backends"),
        (file(backends={"url": "x"}), "gateway.toml: backends: not at most 256 tables, each headed [[backends]]"),
        (file(backends=["http://a:1"]), "gateway.toml: backends: not at most 256 tables"),
        (env(BACKEND_URL="http://a:1,http://a:1/v1"), "of which each stands there once"),
        (env(BACKEND_URL="http://a:1,b"), "environment: BACKEND_URL: 'http://a:1,b' is not a URL such as"),
    ],
)
def test_what_is_wrong_with_a_backend_is_named_by_its_path(source: Source, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([source])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_key_in_a_variable_is_never_shown() -> None:
    with pytest.raises(SettingsError, match=r"backends\[0\].api_key_env: the value of KEY is not a key") as caught:
        resolve([backends(A | {"api_key_env": "KEY"}), env(KEY="sk secret")])
    assert "secret" not in str(caught.value)


def test_the_example_in_the_documentation_is_right() -> None:
    found = resolve([Source("x", "file", tomllib.loads(EXAMPLE)), env(EXAMPLE_KEY="k")]).backends
    assert [(one.name, one.device) for one in found] == [("a100", "gpu"), ("127.0.0.1:8080", "cpu"), ("models.example", "gpu")]
    assert {key.name for key in KEYS} == {field.name for field in dataclasses.fields(BackendSettings)} - {
        "api_key",
        "address",
    } | {"api_key_env"}
