"""The usage ledger's row: what it says of a request, its line in the journal, and the SQL that takes lines into a database.

A line is a JSON array, its fields in the order of the columns. A database takes many of them as one parameter, so that all
of the work on them is its own, outside of Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, get_type_hints

import msgspec

from .errors import UNDECODABLE
from .prices import Prices, of_record
from .record import Record
from .usage import CHARACTERS, Usage

MAX_NAME: Final = 200
"""Characters of a name that a caller or a backend gives: they may be as long as a body."""

UNASKED: Final = frozenset(["missing_api_key", "invalid_api_key"])
"""Ends of requests that were not admitted: nobody is there whom they could be put down to."""

ABANDONED: Final = frozenset(["client_cancelled", "draining", "first_byte_timeout", "idle_timeout", "total_timeout"])
"""Ends that a backend did not choose, and that keep it from saying what it has used."""


class Row(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One request. Times are seconds, ``started`` Unix seconds; ``cost`` is millionths of money, None without prices."""

    request_id: str
    started: float
    tenant: str
    key: str
    model: str
    served_model: str
    route: str
    backend: str
    attempts: int
    status: int
    code: str
    fault: str
    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    estimated: bool
    received_bytes: int
    sent_bytes: int
    session: str
    stream: bool
    cost: int | None


COLUMNS: Final = Row.__struct_fields__
encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Row).decode


def row_of(record: Record, unix: float, prices: Prices) -> Row:
    """The row of a request that has ended; ``unix`` is what makes Unix seconds of its monotonic ones."""
    used, started, first_token = record.usage, record.started, record.first_token
    model, served, session = record.model, record.served_model, record.session
    if len(model) > MAX_NAME or "\0" in model:
        model = _name(model)
    if used.estimated or (record.code in ABANDONED and record.attempts):
        used = _estimate(used, record.received_bytes)
    return Row(
        record.request_id,
        started + unix,
        record.tenant,
        record.key,
        model,
        _name(served) if served else model,
        record.route,
        record.backend,
        record.attempts,
        record.status,
        record.code,
        record.fault or "",
        record.queued,
        None if first_token is None else first_token - started,
        record.ended - started,
        used.prompt_tokens,
        used.completion_tokens,
        used.cached_tokens,
        used.reasoning_tokens,
        used.estimated,
        record.received_bytes,
        record.sent_bytes,
        session and _name(session),
        record.stream,
        of_record(prices, record).of(used) if prices else None,
    )


def _estimate(used: Usage, size: int) -> Usage:
    """A backend that never said what it used has read the prompt all the same."""
    prompt = used.prompt_tokens or size // CHARACTERS + 1
    return Usage(prompt, used.completion_tokens, used.cached_tokens, estimated=True)


def _name(given: str) -> str:
    """Something that every database takes: PostgreSQL knows no NUL."""
    if len(given) <= MAX_NAME and "\0" not in given:
        return given
    return given[:MAX_NAME].replace("\0", "\ufffd")


def is_whole(line: bytes) -> bool:
    """The line is a row. The last one of a process that was killed may have been cut."""
    try:
        _decode(line)
    except UNDECODABLE:
        return False
    return b"\\u0000" not in line


def array(lines: Sequence[bytes]) -> str:
    """Lines as the one parameter of `Dialect.insert`."""
    return f"[{b','.join(lines).decode('utf-8')}]"


class Dialect(NamedTuple):
    """What a database is told. ``schema`` begins the names of its numbered files; ``insert`` has lines as its parameter, and
    leaves alone what is there already; ``delete`` has a time in Unix seconds and a number of rows; ``named`` is how a query
    names a value."""

    schema: str
    insert: str
    delete: str
    named: str


_POSTGRESQL_TYPES: Final = {"str": "text", "float": "double precision", "int": "bigint", "bool": "boolean"}


def _postgresql_values() -> str:
    hints = get_type_hints(Row)
    names = [str(getattr(hints[name], "__name__", hints[name])).removesuffix(" | None") for name in COLUMNS]
    return ", ".join(f"(value->>{place})::{_POSTGRESQL_TYPES[name]}" for place, name in enumerate(names))


_NAMES: Final = ", ".join(COLUMNS)
_VALUES: Final = ", ".join(f"json_extract(value, '$[{place}]')" for place in range(len(COLUMNS)))

# What is put together here are the names of columns.
SQLITE: Final = Dialect(
    "sqlite",
    f"insert or ignore into usage ({_NAMES}) select {_VALUES} from json_each(?)",  # noqa: S608
    "delete from usage where (started, request_id) in"
    " (select started, request_id from usage where started < ? order by started limit ?)",
    ":{}",
)
POSTGRESQL: Final = Dialect(
    "postgresql",
    f"insert into usage ({_NAMES}) select {_postgresql_values()}"  # noqa: S608
    " from json_array_elements(%s::json) as line(value) on conflict do nothing",
    "delete from usage where (started, request_id) in"
    " (select started, request_id from usage where started < %s order by started limit %s)",
    "%({})s",
)
