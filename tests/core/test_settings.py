from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.readers import SettingsError
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
    ],
)
def test_a_bad_value_or_an_unknown_key_is_named_with_where_it_stands(source: Source, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([source])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_secret_is_never_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve([env(GATEWAY_BACKEND_API_KEY="sk-secret\x00")])
    assert "sk-secret" not in str(caught.value)
    assert "backend-api-key" not in {name for name, _ in option_rows()}


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
