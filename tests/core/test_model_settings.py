from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.errors import GatewayError
from gateway.core.model_settings import EXAMPLE, KEYS, MAX_FALLBACKS, ModelSettings, listed, read_tables
from gateway.core.ranges import Ranges
from gateway.core.readers import SettingsError
from gateway.core.settings import Settings, Source, resolve


def file(models: Any, *served: str) -> Source:
    backends = [{"url": "http://a:1", "models": list(served)}] if served else [{"url": "http://a:1"}]
    return Source("gateway.toml", "file", {"models": models, "backends": backends})


def read(models: Any, *served: str) -> Settings:
    return resolve([file(models, *served)])


def test_without_tables_there_are_none() -> None:
    assert resolve([]).models == {}


def test_a_table_with_everything() -> None:
    found = read(tomllib.loads(EXAMPLE)["models"]).models
    fast = found["fast"]
    assert (fast.backend_model, fast.fallbacks, fast.ranges) == ("qwen3-8b", ("llama-3-70b",), Ranges())
    assert {name: json.loads(bytes(value)) for name, value in fast.defaults.items()} == {"temperature": 0.2, "max_tokens": 1024}
    assert found["llama-3-70b"].ranges == Ranges(max_tokens=4096)
    assert found["llama-3-70b"].backend_model == "llama-3-70b"


def test_every_key_is_documented() -> None:
    assert [name for name, _, _ in KEYS] == ["backend_model", "fallbacks", "defaults", "ranges"]


def test_ranges_are_read() -> None:
    ranges = {"max_tokens": 10, "context_length": 20, "max_n": 1, "allow_logprobs": False}
    assert read({"m": {"ranges": ranges}}).models["m"].ranges == Ranges(10, 20, 1, False)


def test_fallbacks_are_followed_to_the_end() -> None:
    models = {"a": {"fallbacks": ["b", "c"]}, "b": {"fallbacks": ["d"]}, "c": {"fallbacks": ["d", "e"]}}
    found = read(models).models
    assert found["a"].fallbacks == ("b", "d", "c", "e")
    assert found["c"].fallbacks == ("d", "e")


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (7, "gateway.toml: models: not at most 1000 tables, each headed [models.NAME]"),
        ({"a": 7}, "gateway.toml: models.a: 7 is not a table"),
        ({"a b": {}}, "gateway.toml: models: 'a b' is not the id of a model"),
        (
            {"a": {"alias": "b"}},
            "gateway.toml: models.a: unknown key 'alias'; known are backend_model, fallbacks, defaults, ranges",
        ),
        ({"a": {"backend_model": ""}}, "gateway.toml: models.a.backend_model: '' is not the id of a model"),
        ({"a": {"fallbacks": "b"}}, "gateway.toml: models.a.fallbacks: 'b' is not a list of at most 16 models"),
        ({"a": {"fallbacks": ["b", "b"]}}, "gateway.toml: models.a.fallbacks: ['b', 'b'] is not a list"),
        ({"a": {"fallbacks": [7]}}, "gateway.toml: models.a.fallbacks: [7] is not the id of a model"),
        ({"a": {"fallbacks": ["a"]}}, "gateway.toml: models.a.fallbacks: goes round in a circle: a -> a; take one of them out"),
        ({"a": {"fallbacks": ["b"]}, "b": {"fallbacks": ["a"]}}, "goes round in a circle: a -> b -> a"),
        ({"a": {"defaults": 7}}, "gateway.toml: models.a.defaults: 7 is not a table"),
        ({"a": {"defaults": {"model": "x"}}}, "gateway.toml: models.a.defaults: 'model' cannot have a default"),
        ({"a": {"defaults": {"x": float("inf")}}}, "gateway.toml: models.a.defaults.x: inf has no counterpart in JSON"),
        ({"a": {"ranges": {"max": 7}}}, "gateway.toml: models.a.ranges: unknown key 'max'; known are max_tokens"),
        ({"a": {"ranges": {"max_n": 0}}}, "gateway.toml: models.a.ranges.max_n: 0 is not a whole number from 1 to 1000"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(models: Any, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(models)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("table", "key"), [({"backend_model": "n"}, "backend_model"), ({"backend_model": "m", "fallbacks": ["n"]}, "fallbacks")]
)
def test_a_model_that_no_backend_can_serve_is_an_error_where_all_have_been_told(table: Any, key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read({"fast": table}, "m")
    assert str(caught.value) == f"gateway.toml: models.fast.{key}: no backend serves 'n'; they serve m"
    assert read({"fast": table}, "m", "n").models
    assert read({"fast": table}).models  # a backend that tells by itself may have any


def test_long_chains_are_refused_however_they_branch() -> None:
    models = {f"m{n}": {"fallbacks": [f"m{n + 1}", f"m{n + 2}"]} for n in range(MAX_FALLBACKS + 2)}
    with pytest.raises(SettingsError) as caught:
        read(models)
    assert "leads to more than 16 models" in str(caught.value)


# --- requests


def one(**table: Any) -> ModelSettings:
    return read_tables("f", {"fast": table})["fast"]


def test_an_alias_changes_the_model_and_every_other_field_keeps_its_bytes() -> None:
    body = b'{ "model" : "fast", "x": [1.0,  2e0 ], "messages": []}'
    assert one(backend_model="big").applied(body) == b'{"model":"big","x":[1.0,  2e0 ],"messages":[]}'


def test_nothing_to_change_is_the_very_same_body() -> None:
    body = b'{"model":"fast", "temperature": 1}'
    assert one(defaults={"temperature": 0}).applied(body) is body


def test_defaults_are_for_what_the_request_does_not_set() -> None:
    alias = one(defaults={"temperature": 0.5, "stop": ["END"], "top_k": 5})
    body = json.loads(alias.applied(b'{"model":"fast","temperature":1,"top_k":null}'))
    assert body == {"model": "fast", "temperature": 1, "top_k": None, "stop": ["END"]}


@pytest.mark.parametrize("given", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("default", ["max_tokens", "max_completion_tokens"])
def test_the_two_bounds_of_an_answer_are_one(given: str, default: str) -> None:
    alias = one(defaults={default: 5})
    assert json.loads(alias.applied(json.dumps({"model": "fast", given: 7}).encode())) == {"model": "fast", given: 7}


def test_a_name_that_is_no_text_is_the_callers_mistake() -> None:
    with pytest.raises(GatewayError) as caught:
        one(backend_model="big").applied(b'{"model":"fast","\xff":1}')
    assert caught.value.code == "invalid_json"


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.integers(-(2**53), 2**53) | st.text() | st.lists(st.booleans())))
def test_all_that_a_request_says_arrives(fields: dict[str, Any]) -> None:
    asked = {"temperature": 0, **fields, "model": "fast"}
    assert json.loads(one(backend_model="big", defaults={"temperature": 1}).applied(json.dumps(asked).encode())) == {
        **asked,
        "model": "big",
    }


# --- the list


def test_aliases_are_listed_with_what_is_behind_them() -> None:
    entries = [{"id": "big", "object": "model", "created": 7, "owned_by": "vllm", "max_model_len": 9, "aliases": ["x"]}]
    models = read_tables("f", {"fast": {"backend_model": "big"}, "big": {}, "gone": {"backend_model": "none"}})
    assert listed(models, entries) == [
        {"id": "fast", "object": "model", "created": 7, "owned_by": "gateway", "max_model_len": 9, "root": "big"},
        {"id": "gone", "object": "model", "created": 0, "owned_by": "gateway", "root": "none"},
    ]
