"""API keys: what one looks like, and the TOML file that holds what each may do.

A key is ``gw-<id>-<secret>``: the prefix lets scanners for leaked secrets know it, the id (8 letters or digits) names it in
logs and lists, and the secret is 256 random bits in base64url. The file has only its SHA-256. Slow hashes (scrypt, Argon2)
make guessing dear where there are few guesses: people's passwords. Of 2**256 there are too many at any price (NIST SP
800-63B section 5.1.2.2 asks for no salt and no stretching from 112 bits on), and a fast hash can be looked up per request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Final, NamedTuple

import msgspec

from . import readers
from .principal import Budget, Limits, Principal
from .readers import Reader, SettingsError
from .tickets import PRIORITIES

ID_BYTES: Final = 5
SECRET_BYTES: Final = 32
MAX_KEYS: Final = 10_000
_HEADER: Final = re.compile(r"[ \t]*\[\[[ \t]*keys[ \t]*\]\]")


def new_key(random: bytes) -> tuple[str, str]:
    """(id, key) out of `ID_BYTES` + `SECRET_BYTES` random bytes."""
    id = base64.b32encode(random[:ID_BYTES]).decode("ascii").lower()
    secret = base64.urlsafe_b64encode(random[ID_BYTES:]).decode("ascii").rstrip("=")
    return id, f"gw-{id}-{secret}"


def digest(key: bytes) -> bytes:
    """What is stored of a key, and looked up."""
    return hashlib.sha256(key).digest()


# --- the fields of a [[keys]] table ------------------------------------------------------------


def key_id(value: Any) -> str:
    """The id of a key."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        raise ValueError("an id of letters, digits and _ . - (at most 64)")
    return value


def hash_of(value: Any) -> str:
    """SHA-256 in hexadecimal."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("the SHA-256 of a key: 64 hexadecimal digits in lower case")
    return value


def budget(value: Any) -> Budget:
    """An amount, its unit and its period."""
    found = re.fullmatch(
        r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(tokens|money) ?/ ?(day|month)", value if isinstance(value, str) else ""
    )
    if found is None or not float(found[1]):
        raise ValueError("a budget such as '1000000 tokens/day' or '25.50 money/month'")
    return msgspec.convert({"amount": float(found[1]), "unit": found[2], "period": found[3]}, Budget)


def budget_text(value: Budget) -> str:
    """A budget as the file has it."""
    amount = f"{value.amount:.6f}".rstrip("0").rstrip(".")
    return f"{amount} {value.unit}/{value.period}"


def moment(value: Any) -> datetime:
    """A point in time: with its offset from UTC, or a day, which begins at midnight UTC."""
    expected = "a time such as 2030-01-31T12:00:00Z, or a day such as 2030-01-31"
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip()) if "T" in value else date.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(expected) from None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(expected)
        try:
            return value.astimezone(UTC)
        except OverflowError:  # in the first or the last hours that there are
            raise ValueError(expected) from None
    if not isinstance(value, date):
        raise ValueError(expected)
    return datetime(value.year, value.month, value.day, tzinfo=UTC)


def boolean(value: Any) -> bool:
    """TOML's own true or false: a right is never given by a word that looks like it."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


class Field(NamedTuple):
    """One field of a ``[[keys]]`` table."""

    name: str
    read: Reader
    help: str


FIELDS: Final = (
    Field("id", key_id, "what the key is called in logs and lists; required"),
    Field("tenant", readers.name, "whose key it is, which fairness goes by; required"),
    Field("hash", hash_of, "SHA-256 of the whole key in hexadecimal; required"),
    Field("created", moment, "when it was made"),
    Field("models", readers.names, "the models it may ask for: names, or patterns with `*`, `?` and `[ab]`; default: all"),
    Field("rpm", readers.whole_number(1, 10**9), "requests per minute"),
    Field("tpm", readers.whole_number(1, 10**12), "tokens per minute, of prompts and answers"),
    Field("concurrency", readers.whole_number(1, 10**6), "requests at the same time"),
    Field("budget", budget, "tokens or money per day or month (UTC): `1000000 tokens/day`, `25.50 money/month`"),
    Field("priority", readers.choice(*PRIORITIES), "its most urgent priority: interactive (the default), default or batch"),
    Field("weight", readers.number(0.001, 1000), "its tenant's share of the work beside other tenants; default 1"),
    Field("admin", boolean, "`true`: it may use `/dashboard`, `/metrics` and the routes under `/admin`"),
    Field("expires", moment, "from when on it is no longer valid"),
    Field("revoked", moment, "since when it is not valid, whatever the rest says"),
    Field("account", key_id, "id of the key that it came in the place of: the limits of both are counted together"),
)
_FIELDS: Final = {field.name: field for field in FIELDS}


class ApiKey(msgspec.Struct, frozen=True):
    """One key of the file. ``values`` are its fields, read."""

    hash: bytes
    values: dict[str, Any]
    principal: Principal

    @property
    def id(self) -> str:
        return self.principal.id

    def state(self, now: float) -> str:
        """``active``, ``expired`` or ``revoked``, at ``now`` in Unix seconds."""
        if "revoked" in self.values:
            return "revoked"
        return "expired" if self.principal.expires <= now else "active"


def read_keys(where: str, found: Mapping[str, Any]) -> tuple[ApiKey, ...]:
    """The keys of a file's TOML. ``where`` names the file. Raises `SettingsError`, which names key, field and remedy."""
    unknown = next((name for name in found if name != "keys"), None)
    if unknown is not None:
        raise SettingsError(f"{where}: unknown setting '{unknown}'; a keys file has [[keys]] tables alone")
    tables = found.get("keys", [])
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables) or len(tables) > MAX_KEYS:
        raise SettingsError(f"{where}: keys: not at most {MAX_KEYS} tables, each headed [[keys]]")
    keys = tuple(_read_key(where, number, table) for number, table in enumerate(tables))
    _refuse_twice(where, "id", [key.id for key in keys], keys)
    _refuse_twice(where, "hash", [key.hash for key in keys], keys)
    return keys


def _read_key(where: str, number: int, table: Mapping[str, Any]) -> ApiKey:
    where = f"{where}: keys[{number}]" if "id" not in table else f"{where}: key {readers.shown(table['id'])}"
    for name in ("id", "tenant", "hash"):
        if name not in table:
            raise SettingsError(f"{where}.{name}: missing; `inference-gateway keys add` writes whole tables")
    values = {name: _read(where, name, value) for name, value in table.items()}
    return ApiKey(bytes.fromhex(values["hash"]), values, _principal(values))


def _read(where: str, name: str, value: Any) -> Any:
    if name not in _FIELDS:
        raise SettingsError(f"{where}: unknown field '{name}'; known are {', '.join(_FIELDS)}")
    try:
        return _FIELDS[name].read(value)
    except ValueError as error:
        what = "the value" if name == "hash" else readers.shown(value)  # where a key itself may stand by mistake
        raise SettingsError(f"{where}.{name}: {what} is not {error}") from None


def _principal(values: Mapping[str, Any]) -> Principal:
    get = values.get
    ends = -math.inf if "revoked" in values else get("expires")
    return Principal(
        key=get("account") or values["id"],
        id=values["id"],
        tenant=values["tenant"],
        models=get("models"),
        priority=PRIORITIES.index(get("priority", "interactive")),
        weight=get("weight", 1.0),
        limits=Limits(get("rpm"), get("tpm"), get("concurrency"), get("budget")),
        admin=get("admin", False),
        expires=ends.timestamp() if isinstance(ends, datetime) else math.inf if ends is None else ends,
    )


def _refuse_twice(where: str, name: str, values: Sequence[object], keys: Sequence[ApiKey]) -> None:
    seen: dict[object, str] = {}
    for value, key in zip(values, keys, strict=True):
        if value in seen:
            raise SettingsError(f"{where}: key '{key.id}'.{name}: that of key '{seen[value]}' too; take one of them away")
        seen[value] = key.id


def parse_keys(where: str, text: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text. Raises `SettingsError`."""
    return read_keys(where, readers.read_toml(where, text))


# --- changing the file's text --------------------------------------------------------------------


def with_key(text: str, values: Mapping[str, Any]) -> str:
    """The text with one more table at its end; everything that stands there stays as it is."""
    gap = "" if not text.strip() else "\n" if text.endswith("\n") else "\n\n"
    lines = [f"{name} = {_toml(value)}\n" for name, value in values.items()]
    return f"{text}{gap}[[keys]]\n{''.join(lines)}"


def with_field(text: str, number: int, name: str, value: Any) -> str:
    """The text with a field of table ``number`` set; all other lines stay. The caller reads it again: a text in which
    ``[[keys]]`` stands elsewhere than above a table would come out wrong."""
    lines = text.splitlines(keepends=True)
    heads = [place for place, line in enumerate(lines) if _HEADER.match(line)]
    start = heads[number] + 1
    end = heads[number + 1] if number + 1 < len(heads) else len(lines)
    assigns = re.compile(rf"[ \t]*{name}[ \t]*=")
    table = [line for line in lines[start:end] if not assigns.match(line)]
    head = lines[start - 1] if lines[start - 1].endswith("\n") else lines[start - 1] + "\n"
    return "".join([*lines[: start - 1], head, f"{name} = {_toml(value)}\n", *table, *lines[end:]])


def _toml(value: Any) -> str:
    """A value as TOML has it; JSON's strings are TOML's too."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, Budget):
        return _toml(budget_text(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def markdown_lines() -> Iterable[str]:
    """The table of fields in docs/security.md."""
    yield "| field | meaning |\n|---|---|\n"
    for field in FIELDS:
        yield f"| `{field.name}` | {field.help} |\n"
