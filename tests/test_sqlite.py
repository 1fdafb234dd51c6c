from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gateway import sqlite
from gateway.core.ledger import encode
from gateway.database import DatabaseAway, UnreadableLines
from gateway.sqlite import SQLite

from .core.test_usage_report import START, row


def ids(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [id for (id,) in connection.execute("select request_id from usage order by request_id")]


def test_rows_are_there_for_others_as_soon_as_they_are_inserted(tmp_path: Path) -> None:
    database = SQLite(tmp_path / "u")
    database.insert([])
    assert ids(tmp_path / "u") == []
    database.insert([encode(row(1)), encode(row(2))])
    database.insert([encode(row(2)), encode(row(3))])
    assert ids(tmp_path / "u") == ["id-1", "id-2", "id-3"]
    assert (tmp_path / "u").stat().st_mode & 0o007 == 0
    database.close()


def test_columns_have_the_values_of_the_row(tmp_path: Path) -> None:
    database = SQLite(tmp_path / "u")
    database.insert([encode(row(1, model="\u00e9 \U0001f600 ' \"", estimated=True, first_token_seconds=0.1, cost=None))])
    query = "select model, estimated, first_token_seconds, cost, started from usage where tenant = :tenant"
    assert list(database.rows(query, {"tenant": "acme"})) == [("\u00e9 \U0001f600 ' \"", 1, 0.1, None, START)]
    database.close()


def test_lines_that_are_no_rows_change_nothing(tmp_path: Path) -> None:
    database = SQLite(tmp_path / "u")
    for broken in (encode(row(2))[:-5], b"\xff"):
        with pytest.raises(UnreadableLines):
            database.insert([encode(row(1)), broken])
    assert ids(tmp_path / "u") == []
    database.close()


def test_a_locked_file_is_away_until_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LOCKED_SECONDS", 0.01)
    database = SQLite(tmp_path / "u")
    database.insert([])
    with closing(sqlite3.connect(tmp_path / "u", isolation_level=None)) as other:
        other.execute("begin exclusive")
        with pytest.raises(DatabaseAway, match="locked"):
            database.insert([encode(row(1))])
        other.execute("rollback")
    database.insert([encode(row(1))])
    assert ids(tmp_path / "u") == ["id-1"]
    database.close()


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    database = SQLite(tmp_path / "u")
    database.insert([encode(row(1))])
    (tmp_path / "u").rename(tmp_path / "old")
    with pytest.raises(DatabaseAway):
        database.insert([encode(row(2))])
    database.insert([encode(row(2))])
    assert ids(tmp_path / "u") == ["id-2"]
    database.close()


def test_what_is_no_database_is_away_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "u").write_text("something else entirely, which nobody may touch" * 100)
    database = SQLite(tmp_path / "u")
    with pytest.raises(DatabaseAway, match="not a database"):
        database.insert([])
    assert (tmp_path / "u").read_text().startswith("something")
    with pytest.raises(DatabaseAway):
        SQLite(tmp_path / "no" / "u").insert([])


def test_the_oldest_are_deleted_a_few_at_a_time(tmp_path: Path) -> None:
    database = SQLite(tmp_path / "u")
    database.insert([encode(row(number, started=START + number)) for number in range(10)])
    assert database.delete(START + 5, 3) == 3
    assert ids(tmp_path / "u") == [f"id-{number}" for number in range(3, 10)]
    assert database.delete(START + 5, 3) == 2
    assert database.delete(START + 5, 3) == 0
    database.close()


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    SQLite(tmp_path / "u").insert([encode(row(1))])
    reader = SQLite(tmp_path / "u", reads=True)
    assert list(reader.rows("select request_id from usage", {})) == [("id-1",)]
    with pytest.raises(DatabaseAway, match="readonly"):
        reader.insert([encode(row(2))])
    reader.close()
