from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.core.ledger import POSTGRESQL, SQLITE, Row, array, encode
from gateway.core.usage_report import GROUPS, LOOKED_AT, lines, report

SCHEMA = Path(__file__).parents[2] / "src/gateway/sql/sqlite-1.sql"
DAY = 86400.0
START = 1_767_225_600.0  # 2026-01-01


def row(number: int, **more: Any) -> Row:
    values: dict[str, Any] = dict.fromkeys(("key", "served_model", "route", "backend", "code", "fault", "session"), "")
    values |= dict.fromkeys(("attempts", "cached_tokens", "reasoning_tokens", "received_bytes", "sent_bytes"), 0)
    values |= {"queue_seconds": 0.0, "first_token_seconds": None, "total_seconds": 1.0, "estimated": False, "stream": False}
    values |= {"request_id": f"id-{number}", "started": START, "tenant": "acme", "model": "m", "status": 200}
    return Row(**(values | {"prompt_tokens": 10, "completion_tokens": 5, "cost": 100} | more))


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA.read_text())
    yield connection
    connection.close()


def asked(database: sqlite3.Connection, by: list[str], **filters: Any) -> list[dict[str, Any]]:
    query, values, columns = report(SQLITE, by, **filters)
    return [dict(zip(columns, found, strict=True)) for found in database.execute(query, values)]


def fill(database: sqlite3.Connection, *rows: Row) -> None:
    database.execute(SQLITE.insert, [array([encode(one) for one in rows])])


def test_rows_are_summed_up_by_what_is_asked_for(database: sqlite3.Connection) -> None:
    fill(
        database,
        row(1),
        row(2, estimated=True, cached_tokens=4, reasoning_tokens=2),
        row(3, code="queue_full", status=429, prompt_tokens=0, completion_tokens=0, cost=None),
        row(4, tenant="other"),
        row(5, started=START + DAY),
    )
    found = asked(database, ["tenant", "day"])
    assert [(one["tenant"], one["day"], one["requests"]) for one in found] == [
        ("acme", "2026-01-01", 3),
        ("acme", "2026-01-02", 1),
        ("other", "2026-01-01", 1),
    ]
    sums = ("failed", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "estimated", "cost")
    assert [found[0][name] for name in sums] == [1, 20, 10, 4, 2, 1, 200]


def test_the_same_request_is_one_row_and_the_same_id_at_another_time_another(database: sqlite3.Connection) -> None:
    for _ in range(3):
        fill(database, row(1), row(1, started=START + 1e-6))
    assert asked(database, [])[0]["requests"] == 2


def test_filters_say_whose_and_when(database: sqlite3.Connection) -> None:
    fill(
        database,
        *(row(number, started=START + number, tenant=f"t{number % 2}", model=f"m{number % 3}") for number in range(12)),
    )
    assert asked(database, [], since=START + 3, until=START + 5)[0]["requests"] == 2
    assert asked(database, [], tenant="t1", model="m0")[0]["requests"] == 2
    assert asked(database, [], tenant="' or '1'='1")[0]["requests"] == 0


def test_every_group_can_be_asked_for(database: sqlite3.Connection) -> None:
    fill(database, row(1))
    (found,) = asked(database, list(GROUPS))
    assert (found["month"], found["day"], found["hour"]) == ("2026-01", "2026-01-01", "2026-01-01 00:00")


def test_other_databases_are_asked_in_their_own_words() -> None:
    asked = report(POSTGRESQL, ["hour"], since=1.0)
    assert "at time zone 'UTC'" in asked.query
    assert "started >= %(since)s" in asked.query
    assert asked.values == {"since": 1.0}


def test_a_table_is_for_people() -> None:
    found = list(lines(["tenant", "requests", "cost"], [("acme", 12, 1_500_000), ("", 3, 0)], "table"))
    assert found == [
        "tenant  requests      cost\n",
        "acme          12  1.500000\n",
        "-              3  0.000000\n",
    ]


def test_csv_and_json_are_for_programs() -> None:
    rows = [('a "b", c', 12, 1_500_000)]
    text = "".join(lines(["tenant", "requests", "cost"], rows, "csv"))
    assert list(csv.reader(io.StringIO(text))) == [["tenant", "requests", "cost"], ['a "b", c', "12", "1.5"]]
    (line,) = lines(["tenant", "requests", "cost"], rows, "json")
    assert json.loads(line) == {"tenant": 'a "b", c', "requests": 12, "cost": 1.5}


def test_a_hostile_name_moves_no_cursor_and_is_no_formula() -> None:
    rows = [("=1+1", 1, 0), ("\x1b[2J", 1, 0)]
    assert "\x1b" not in "".join(lines(["model", "requests", "cost"], rows, "table"))
    assert "".join(lines(["model", "requests", "cost"], rows, "csv")).splitlines()[1] == "'=1+1,1,0.0"


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_lines_come_as_rows_come(format: Any) -> None:
    taken = 0

    def rows() -> Iterator[tuple[str, int, int]]:
        nonlocal taken
        while True:
            taken += 1
            yield ("acme", taken, 0)

    made = lines(["tenant", "requests", "cost"], rows(), format)
    for _ in range(3 * LOOKED_AT):
        next(made)
    assert taken <= 3 * LOOKED_AT + 1
