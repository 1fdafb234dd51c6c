from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pytest
from twisted.internet.task import Clock

from gateway import delivery, ledger
from gateway.core.ledger import Row, encode
from gateway.core.record import Record
from gateway.core.usage import Usage
from gateway.database import DatabaseAway, UnreadableLines
from gateway.delivery import FEW, OFTEN, Delivery
from gateway.journal import Journal
from gateway.ledger import GATHERED, Ledger
from gateway.sqlite import SQLite

from .core.test_usage_report import row

ROUTE = "/v1/chat/completions"
UNIX = 1_700_000_000.0


class Memory:
    """A database that is away when a test wants it to be."""

    def __init__(self) -> None:
        self.lines: dict[bytes, None] = {}
        self.away = False
        self.asked = 0
        self.old = 0
        self.closed = Event()

    def insert(self, lines: list[bytes]) -> None:
        self.asked += 1
        self._check()
        try:
            for line in lines:
                msgspec.json.decode(line)
        except msgspec.DecodeError:
            raise UnreadableLines from None
        self.lines |= dict.fromkeys(lines)

    def delete(self, before: float, most: int) -> int:
        self._check()
        deleted = min(self.old, most)
        self.old -= deleted
        return deleted

    def rows(self, query: str, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        raise NotImplementedError

    def _check(self) -> None:
        if self.away:
            raise DatabaseAway("it is away")

    def close(self) -> None:
        self.closed.set()

    def ids(self) -> list[str]:
        return [msgspec.json.decode(line, type=Row).request_id for line in self.lines]


class Threadless(Clock):
    """A reactor of which there is but a clock; what other threads ask of it is done there and then."""

    def callFromThread(self, what: Any, *args: Any) -> None:
        what(*args)


class Parts:
    """A ledger whose threads do their work when a test says so."""

    def __init__(self, directory: Path, flush: float = 1.0, keep: float = 0.0, limit: int = 2**20) -> None:
        self.clock = Threadless()
        self.database = Memory()
        self.journal = Journal(directory / "j", limit)
        self.said: list[str] = []
        self.delivery = Delivery(self.database, self.journal, keep, self.unix, self.said.append)
        self.ledger = Ledger(self.delivery, self.clock, self.unix, flush=flush, routes=[ROUTE], prices={})

    def unix(self) -> float:
        return UNIX + self.clock.seconds()

    def record(self, id: str = "id", **more: Any) -> None:
        now = self.clock.seconds()
        self.ledger(msgspec.structs.replace(Record(id, "POST", ROUTE, now, ended=now), **more))

    def append(self) -> None:
        """What the journal's thread does with what it was given."""
        if batches := self.given():
            self.delivery.append(batches)

    def given(self) -> list[list[bytes]]:
        found = []
        while not self.delivery._batches.empty():
            batch = self.delivery._batches.get()
            assert batch is not None
            found.append(batch)
        return found

    def metric(self, name: str, **labels: str) -> float:
        (value,) = (
            sample.value
            for family in self.ledger.collect()
            for sample in family.samples
            if (sample.name, sample.labels) == (name, labels)
        )
        return value

    def rows_total(self) -> tuple[float, float, float]:
        name = "gateway_ledger_rows_total"
        journaled, written, lost = (self.metric(name, outcome=outcome) for outcome in ("journaled", "written", "lost"))
        return journaled, written, lost


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    yield made
    made.journal.close()


# --- on the reactor's thread


def test_only_admitted_requests_for_inference_have_a_row(parts: Parts) -> None:
    for number, code in enumerate(["", "invalid_json", "queue_full", "client_cancelled", "backend_error", "draining"]):
        parts.record(str(number), code=code)
    for more in ({"code": "missing_api_key"}, {"code": "invalid_api_key"}, {"route": "/metrics"}, {"route": "other"}):
        parts.record("no", **more)
    parts.clock.advance(1)
    parts.append()
    parts.delivery.deliver()
    assert parts.database.ids() == ["0", "1", "2", "3", "4", "5"]


def test_rows_are_handed_on_when_the_first_has_waited_for_the_flush_interval(parts: Parts) -> None:
    parts.record("1")
    parts.clock.advance(0.9)
    parts.record("2")
    assert parts.given() == []
    parts.clock.advance(0.1)
    assert [len(lines) for lines in parts.given()] == [2]
    parts.clock.advance(10)
    assert parts.given() == []


def test_without_an_interval_rows_are_handed_on_in_the_next_turn(tmp_path: Path) -> None:
    parts = Parts(tmp_path, flush=0.0)
    parts.record("1")
    parts.record("2")
    parts.clock.advance(0)
    assert [len(lines) for lines in parts.given()] == [2]
    parts.journal.close()


def test_many_rows_do_not_wait(parts: Parts) -> None:
    for number in range(GATHERED):
        parts.record(str(number))
    assert [len(lines) for lines in parts.given()] == [GATHERED]
    assert not parts.clock.getDelayedCalls()


def test_rows_beyond_the_bound_are_lost_and_counted(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MOST", 3)
    for number in range(5):
        parts.record(str(number))
    assert parts.metric("gateway_ledger_buffered") == 3
    assert parts.rows_total() == (0, 0, 2)
    parts.clock.advance(1)
    parts.append()
    parts.record("again")
    assert parts.metric("gateway_ledger_buffered") == 1


def test_times_are_those_of_the_wall_clock_even_when_it_is_set(parts: Parts) -> None:
    parts.clock.advance(5)
    parts.record("1")
    parts.clock.advance(1)
    parts.ledger._unix = lambda: parts.unix() + 3600
    parts.record("2")
    parts.clock.advance(1)
    parts.append()
    parts.delivery.deliver()
    started = [msgspec.json.decode(line, type=Row).started for line in parts.database.lines]
    assert started == [UNIX + 5, UNIX + 3606]


def test_the_lag_is_the_age_of_the_oldest_row_that_the_database_lacks(parts: Parts) -> None:
    def lag() -> float:
        return parts.metric("gateway_ledger_lag_seconds")

    assert lag() == 0
    parts.clock.advance(100)
    parts.record("1")
    parts.clock.advance(1)
    assert lag() == 1
    parts.append()
    assert lag() == 1
    parts.record("2")
    parts.clock.advance(1)
    parts.delivery.deliver()  # has only seen the first
    assert lag() == 1
    parts.append()
    parts.delivery.deliver()
    parts.clock.advance(50)
    assert lag() == 0


# --- on the threads


def test_while_the_database_is_away_rows_wait_in_the_journal(parts: Parts) -> None:
    parts.database.away = True
    for number in range(3):
        parts.record(str(number))
        parts.clock.advance(1)
        parts.append()
        with pytest.raises(DatabaseAway):
            parts.delivery.deliver()
    assert parts.rows_total() == (3, 0, 0)
    assert parts.metric("gateway_ledger_buffered") == 0
    assert parts.metric("gateway_ledger_journal_bytes") > 300
    parts.database.away = False
    parts.delivery.deliver()
    assert parts.database.ids() == ["0", "1", "2"]
    assert parts.metric("gateway_ledger_journal_bytes") == 0
    assert parts.rows_total() == (3, 3, 0)
    assert [line.partition(":")[0] for line in parts.said] == [
        "the usage ledger's database is away",
        "the usage ledger's database is back, and has all rows",
    ]


def test_a_journal_that_cannot_be_read_now_is_read_later(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.record("1")
    parts.clock.advance(1)
    parts.append()

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", fail)
        with pytest.raises(DatabaseAway):
            parts.delivery.deliver()
    assert "Input/output error" in parts.said[0]
    parts.delivery.deliver()
    assert parts.database.ids() == ["1"]


def test_a_new_process_delivers_what_the_one_before_has_left(tmp_path: Path) -> None:
    before = Parts(tmp_path)
    before.record("1")
    before.clock.advance(1)
    before.append()
    before.journal.close()
    with (tmp_path / "j.1").open("ab") as file:
        file.write(encode(row(2))[:40])
    after = Parts(tmp_path)
    after.delivery.deliver()
    assert after.database.ids() == ["1"]
    after.journal.close()


def test_lines_that_are_no_rows_hold_up_no_others(tmp_path: Path) -> None:
    (tmp_path / "j.0").write_bytes(b"\n".join([encode(row(1)), b'["half', encode(row(2)), b""]))
    parts = Parts(tmp_path)
    parts.delivery.deliver()
    assert parts.database.ids() == ["id-1", "id-2"]
    assert parts.rows_total() == (0, 2, 1)
    assert parts.said == ["the usage ledger's journal had 1 lines that are no rows"]
    parts.journal.close()


def test_rows_that_a_database_misunderstands_are_not_thrown_away(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(lines: list[bytes]) -> None:
        if lines:
            raise UnreadableLines

    parts.record("1")
    parts.clock.advance(1)
    parts.append()
    with monkeypatch.context() as patched:
        patched.setattr(parts.database, "insert", refuse)
        with pytest.raises(DatabaseAway):
            parts.delivery.deliver()
    parts.delivery.deliver()
    assert parts.database.ids() == ["1"]


def test_when_the_journal_is_full_rows_go_to_the_database_from_memory(tmp_path: Path) -> None:
    parts = Parts(tmp_path, limit=200)
    parts.database.away = True
    for id in ("1", "2", "3"):
        parts.record(id)
        parts.clock.advance(1)
        parts.append()
    assert parts.metric("gateway_ledger_buffered") == 2
    assert len(parts.said) == 1
    assert "cannot be written" in parts.said[0]
    parts.database.away = False
    for _ in range(2):
        parts.delivery.deliver()
    assert parts.database.ids() == ["1", "2", "3"]
    assert parts.metric("gateway_ledger_buffered") == 0
    assert parts.rows_total() == (1, 3, 0)
    parts.journal.close()


def test_rows_that_the_journal_takes_while_the_database_does_are_settled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(tmp_path, limit=10)
    parts.record("1")
    parts.clock.advance(1)
    parts.append()
    insert = parts.database.insert

    def meanwhile(lines: list[bytes]) -> None:
        if lines:
            monkeypatch.undo()
            parts.journal._limit = 6000
            parts.record("2")
            parts.clock.advance(1)
            parts.append()
        insert(lines)

    monkeypatch.setattr(parts.database, "insert", meanwhile)
    parts.delivery.deliver()
    assert parts.metric("gateway_ledger_buffered") == 0
    parts.delivery.deliver()
    assert sorted(parts.database.ids()) == ["1", "2"]
    parts.journal.close()


def test_a_journal_that_has_room_again_takes_what_did_not_fit(tmp_path: Path) -> None:
    parts = Parts(tmp_path, limit=400)
    parts.database.away = True
    for id in ("1", "2", "3", "4"):
        parts.record(id)
        parts.clock.advance(1)
        parts.append()
    assert parts.metric("gateway_ledger_buffered") > 0
    parts.journal._limit = 6000
    parts.record("5")
    parts.clock.advance(1)
    parts.append()
    assert parts.metric("gateway_ledger_buffered") == 0
    parts.database.away = False
    parts.delivery.deliver()
    assert parts.database.ids() == ["1", "2", "3", "4", "5"]
    parts.journal.close()


def test_old_rows_are_deleted_a_few_at_a_time_and_seldom(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keep=86400.0)
    parts.database.old = 2 * FEW + 5
    parts.delivery.deliver()
    assert parts.database.old == 0
    parts.database.old = 5
    parts.delivery.deliver()
    assert parts.database.old == 5
    parts.clock.advance(OFTEN)
    parts.delivery.deliver()
    assert parts.database.old == 0
    parts.journal.close()


def test_new_rows_do_not_wait_for_old_ones_to_be_deleted(tmp_path: Path) -> None:
    parts = Parts(tmp_path, keep=86400.0)
    parts.database.old = 3 * FEW
    parts.record("1")
    parts.clock.advance(1)
    parts.append()  # this is news
    parts.delivery.deliver()
    assert parts.database.old == 2 * FEW
    parts.journal.close()


def test_with_its_threads_it_stops_when_all_rows_are_in_the_database(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.delivery._database = SQLite(tmp_path / "u")
    ended = Event()
    parts.delivery.start()
    for number in range(100):
        parts.record(str(number), usage=Usage(1, 2))
    parts.ledger.flush()
    parts.delivery.stop(ended.set)
    assert ended.wait(30)
    reader = SQLite(tmp_path / "u", reads=True)
    assert list(reader.rows("select count(*), sum(completion_tokens) from usage", {})) == [(100, 200)]
    reader.close()


def test_it_stops_without_a_database_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path)
    parts.database.away = True
    parts.delivery.start()
    parts.record("1")
    stopped = parts.ledger.stopService()
    assert parts.database.closed.wait(30)
    assert stopped.called or parts.clock.getDelayedCalls()
    again = Parts(tmp_path)
    again.delivery.deliver()
    assert again.database.ids() == ["1"]
    again.journal.close()


def test_a_database_that_hangs_is_not_waited_for_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path)
    go_on = Event()
    monkeypatch.setattr(parts.database, "insert", lambda lines: go_on.wait(30) and None)
    parts.delivery.start()
    parts.record("1")
    stopped = parts.ledger.stopService()
    parts.clock.advance(ledger.STOP_SECONDS)
    assert stopped.called
    go_on.set()
    assert parts.database.closed.wait(30)


def test_a_database_that_is_away_is_asked_ever_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path)
    waits: list[float] = []

    class Stopping:
        def is_set(self) -> bool:
            return len(waits) > 9

        def wait(self, seconds: float) -> None:
            waits.append(seconds)

    monkeypatch.setattr(parts.delivery, "_stopping", Stopping())
    parts.database.away = True
    parts.delivery._deliver_forever()
    assert waits[:3] == [0.25, 0.5, 1.0]
    assert max(waits) == delivery.PATIENCE[1]
