"""Reports on the usage ledger: the query that sums its rows up by what one wants to know, and lines to show the answer.

Lines come as rows come, so that millions of them need no memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final, Literal, NamedTuple

import msgspec

from .ledger import Dialect

MILLION: Final = 1_000_000
LOOKED_AT: Final = 1000
"""Rows by which a table's columns get their widths; a longer cell in a later row stands out."""

_NAMES: Final = ("tenant", "key", "model", "served_model", "backend", "route", "status", "code", "session")
_PERIODS: Final = {"month": "%Y-%m", "day": "%Y-%m-%d", "hour": "%Y-%m-%d %H:00"}
_POSTGRESQL: Final = {"month": "YYYY-MM", "day": "YYYY-MM-DD", "hour": 'YYYY-MM-DD HH24":00"'}

GROUPS: Final = (*_NAMES, *_PERIODS)
"""What one may group by; periods are in UTC."""

_SUMS: Final = {
    "requests": "count(*)",
    "failed": "sum(case when code <> '' then 1 else 0 end)",
    "prompt_tokens": "sum(prompt_tokens)",
    "completion_tokens": "sum(completion_tokens)",
    "cached_tokens": "sum(cached_tokens)",
    "reasoning_tokens": "sum(reasoning_tokens)",
    "estimated": "sum(case when estimated then 1 else 0 end)",
    "cost": "coalesce(sum(cost), 0)",
}

Format = Literal["table", "csv", "json"]


class Report(NamedTuple):
    """A query, its named values, and the columns of its answer; ``cost`` comes in millionths."""

    query: str
    values: Mapping[str, Any]
    columns: tuple[str, ...]


def report(
    dialect: Dialect,
    by: Sequence[str],
    *,
    since: float | None = None,
    until: float | None = None,
    tenant: str | None = None,
    model: str | None = None,
) -> Report:
    """Sums by each of ``by``, of `GROUPS`, over the requests that were started in [since, until) (Unix seconds)."""
    filters: list[tuple[str, str, Any]] = [
        ("started >= ", "since", since),
        ("started < ", "until", until),
        ("tenant = ", "tenant", tenant),
        ("model = ", "model", model),
    ]
    given = [(text + dialect.named.format(name), name, value) for text, name, value in filters if value is not None]
    where = " where " + " and ".join(text for text, _, _ in given) if given else ""
    selected = [_group(dialect, name) for name in by] + [f"cast({sum} as bigint)" for sum in _SUMS.values()]
    places = ", ".join(str(place + 1) for place in range(len(by)))
    order = f" group by {places} order by {places}" if by else ""
    query = f"select {', '.join(selected)} from usage{where}{order}"  # noqa: S608 - names of ours alone
    return Report(query, {name: value for _, name, value in given}, (*by, *_SUMS))


def _group(dialect: Dialect, name: str) -> str:
    if name not in _PERIODS:
        return name
    if dialect.schema == "sqlite":
        return f"strftime('{_PERIODS[name]}', started, 'unixepoch')"
    return f"to_char(to_timestamp(started) at time zone 'UTC', '{_POSTGRESQL[name]}')"


def lines(columns: Sequence[str], rows: Iterable[Sequence[Any]], format: Format) -> Iterator[str]:
    """The rows as lines with their newlines: a table for people, CSV with a head, or one JSON object a line."""
    money = columns.index("cost")
    filled = ((*row[:money], (row[money] or 0) / MILLION, *row[money + 1 :]) for row in rows)
    return _FORMATS[format](columns, filled)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    for row in chain([columns], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([_safe(cell) for cell in row])
        yield line.getvalue()


def _safe(cell: Any) -> Any:
    """Names come from callers, and spreadsheets take what begins like this for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _json(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    for row in rows:
        yield msgspec.json.encode(dict(zip(columns, row, strict=True))).decode("utf-8") + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    cells = ([_shown(cell) for cell in row] for row in rows)
    first = [list(columns), *islice(cells, LOOKED_AT)]
    widths = [max(len(row[place]) for row in first) for place in range(len(columns))]
    left = [name in GROUPS for name in columns]
    for row in chain(first, cells):
        parts = (
            cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in zip(row, widths, left, strict=True)
        )
        yield "  ".join(parts).rstrip() + "\n"


def _shown(cell: Any) -> str:
    """On a terminal, where a name could move the cursor."""
    if isinstance(cell, float):
        return f"{cell:.6f}"
    text = "-" if cell in (None, "") else str(cell)
    return text if text.isprintable() else ascii(text)


_FORMATS: Final[dict[Format, Callable[[Sequence[str], Iterable[Sequence[Any]]], Iterator[str]]]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
}
