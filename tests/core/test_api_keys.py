from __future__ import annotations

import hashlib
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import api_keys
from gateway.core.api_keys import new_key, parse_keys, read_keys, with_field, with_key
from gateway.core.principal import Budget, Limits, Principal
from gateway.core.readers import SettingsError

HASH = hashlib.sha256(b"gw-a-secret").hexdigest()
OTHER = hashlib.sha256(b"gw-b-secret").hexdigest()
LEAST = {"id": "a", "tenant": "acme", "hash": HASH}
NOON = datetime(2030, 1, 31, 12, tzinfo=UTC)


def read(*tables: dict[str, Any]) -> tuple[api_keys.ApiKey, ...]:
    return read_keys("keys.toml", {"keys": list(tables)})


def test_a_key_has_a_prefix_an_id_and_all_of_its_random_bits() -> None:
    id, key = new_key(bytes(range(37)))
    assert re.fullmatch(r"gw-[a-z2-7]{8}-[A-Za-z0-9_-]{43}", key)
    assert key.startswith(f"gw-{id}-")
    assert len({new_key(bytes(place) + b"\x01" + bytes(36 - place))[1] for place in range(37)}) == 37


def test_what_a_key_does_not_say_is_not_limited() -> None:
    (key,) = read(LEAST)
    assert key.hash == bytes.fromhex(HASH)
    assert key.principal == Principal(key="a", id="a", tenant="acme")
    assert key.principal.may_use("anything")
    assert key.principal.expires == math.inf


def test_a_key_says_what_it_may() -> None:
    more = {"models": ["m-*", "gpt"], "rpm": 60, "tpm": 1000, "concurrency": 2, "budget": "2.5 money/day", "priority": "batch"}
    (key,) = read(LEAST | more | {"weight": 2, "admin": True, "expires": NOON, "account": "old", "created": NOON})
    assert key.principal == Principal(
        key="old",
        id="a",
        tenant="acme",
        models=("m-*", "gpt"),
        priority=2,
        weight=2.0,
        limits=Limits(60, 1000, 2, Budget(2.5, "money", "day")),
        admin=True,
        expires=NOON.timestamp(),
    )
    assert [key.state(NOON.timestamp() + late) for late in (-1, 0)] == ["active", "expired"]


def test_a_revoked_key_has_ended_long_ago_whatever_else_it_says() -> None:
    (key,) = read(LEAST | {"expires": NOON, "revoked": NOON})
    assert key.principal.expires == -math.inf
    assert key.state(0.0) == "revoked"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"id": "a", "tenant": "t"}, "keys.toml: key 'a'.hash: missing; `inference-gateway keys add` writes"),
        ({"tenant": "t"}, "keys.toml: keys[0].id: missing"),
        (LEAST | {"rmp": 1}, "keys.toml: key 'a': unknown field 'rmp'; known are id, tenant"),
        (LEAST | {"rpm": 0}, "key 'a'.rpm: 0 is not a whole number from 1"),
        (LEAST | {"rpm": True}, "key 'a'.rpm: True is not a whole number"),
        (LEAST | {"id": "a b"}, "key 'a b'.id: 'a b' is not an id of letters"),
        (LEAST | {"tenant": "a b"}, "key 'a'.tenant: 'a b' is not a name"),
        (LEAST | {"budget": "much"}, "key 'a'.budget: 'much' is not a budget such as"),
        (LEAST | {"budget": "0 tokens/day"}, "is not a budget such as"),
        (LEAST | {"priority": "urgent"}, "key 'a'.priority: 'urgent' is not one of interactive, default, batch"),
        (LEAST | {"admin": "true"}, "key 'a'.admin: 'true' is not true or false"),
        (LEAST | {"expires": datetime(2030, 1, 1)}, "is not a time such as"),
        (LEAST | {"expires": "soon"}, "key 'a'.expires: 'soon' is not a time such as"),
        (LEAST | {"models": "m"}, "key 'a'.models: 'm' is not a list of at most"),
    ],
)
def test_what_is_wrong_with_a_key_is_named_by_file_key_and_field(table: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(table)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_in_the_place_of_its_hash_is_not_shown() -> None:
    with pytest.raises(SettingsError, match="the value is not the SHA-256 of a key") as caught:
        read(LEAST | {"hash": "gw-a-secret"})
    assert "secret" not in str(caught.value)


def test_ids_and_hashes_are_unique() -> None:
    with pytest.raises(SettingsError, match=r"key 'a'.id: that of key 'a' too; take one of them away"):
        read(LEAST, LEAST | {"hash": OTHER})
    with pytest.raises(SettingsError, match=r"key 'b'.hash: that of key 'a' too"):
        read(LEAST, LEAST | {"id": "b"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[keys]\n", "keys.toml: is not TOML: "),
        ("key = 1\n", "keys.toml: unknown setting 'key'"),
        ("keys = 1\n", "keys.toml: keys: not at most 10000 tables"),
    ],
)
def test_a_file_that_is_none_is_named(text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_keys("keys.toml", text)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["2030-01-31T12:00:00Z", "2030-01-31T13:00:00+01:00"])
def test_a_moment_has_its_place_on_earth(text: str) -> None:
    assert api_keys.moment(text) == NOON
    assert api_keys.moment("2030-01-31") == datetime(2030, 1, 31, tzinfo=UTC)


BY_HAND = f"""\
# The keys of our house.
[[keys]]
id = "a"   # Ada's
tenant = "acme"
hash = "{HASH}"
expires = 2030-01-01

  [[ keys ]]
  id = "b"
  tenant = "acme"
  hash = "{OTHER}"
"""


def test_a_change_leaves_everything_else_as_it_stands() -> None:
    changed = with_field(BY_HAND, 0, "expires", NOON)
    assert changed == BY_HAND.replace("expires = 2030-01-01\n", "").replace(
        "[[keys]]\n", "[[keys]]\nexpires = 2030-01-31T12:00:00Z\n", 1
    )
    assert with_field(BY_HAND, 1, "revoked", NOON) == BY_HAND.replace(
        "[[ keys ]]\n", "[[ keys ]]\nrevoked = 2030-01-31T12:00:00Z\n"
    )
    assert with_key(BY_HAND, {"id": "c"}) == BY_HAND + '\n[[keys]]\nid = "c"\n'
    assert with_key(BY_HAND.rstrip("\n"), {"id": "c"}) == BY_HAND + '\n[[keys]]\nid = "c"\n'
    assert with_key("", {"id": "c"}) == '[[keys]]\nid = "c"\n'


names = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip()) and text.isprintable()
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "models": st.lists(names.map(str.strip), max_size=3, unique=True),
                "rpm": st.integers(1, 10**9),
                "weight": st.floats(0.001, 1000, allow_nan=False).map(lambda weight: round(weight, 6)),
                "budget": st.builds(Budget, st.integers(1, 10**9).map(float), st.sampled_from(["tokens", "money"])),
                "admin": st.booleans(),
                "expires": st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(
                    lambda when: when.replace(microsecond=0, tzinfo=UTC)
                ),
            },
        ),
        max_size=4,
    ),
    st.data(),
)
def test_what_is_written_is_what_is_read(tables: list[dict[str, Any]], data: st.DataObject) -> None:
    text = ""
    expected = []
    for number, table in enumerate(tables):
        values = {"id": f"k{number}", "tenant": "t", "hash": hashlib.sha256(str(number).encode()).hexdigest()} | table
        text = with_key(text, values)
        expected.append(values | ({"models": tuple(values["models"])} if "models" in values else {}))
    if tables:
        number = data.draw(st.integers(0, len(tables) - 1))
        text = with_field(text, number, "expires", NOON)
        expected[number]["expires"] = NOON
    assert [key.values for key in parse_keys("keys.toml", text)] == expected


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_any_value_of_any_field_is_read_or_named(value: Any) -> None:
    for field in api_keys.FIELDS:
        try:
            read(LEAST | {field.name: value})
        except SettingsError as error:
            assert f".{field.name}: " in str(error)


def test_the_text_of_a_budget_is_read_back() -> None:
    for budget in (Budget(100000, "tokens", "day"), Budget(0.000001, "money", "month"), Budget(1e15 - 1)):
        assert api_keys.budget(api_keys.budget_text(budget)) == budget


def test_the_documentation_has_every_field() -> None:
    assert "".join(api_keys.markdown_lines()) in (Path(__file__).parents[2] / "docs/security.md").read_text()
