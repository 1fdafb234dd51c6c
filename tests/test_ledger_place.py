from __future__ import annotations

from pathlib import Path

import pytest

from gateway.core.readers import SettingsError
from gateway.journal import Journal, JournalFull
from gateway.ledger_place import journal_at

LIMIT = 1024 * 1024


def left_at(path: Path, *lines: bytes) -> None:
    """A process that has the journal writes these lines, and is gone."""
    journal = Journal(path, LIMIT)
    journal.append(list(lines))
    journal.close()


def all_of(journal: Journal) -> list[bytes]:
    found = []
    while lines := journal.chunk():
        found += lines
        journal.delivered()
    return found


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_second_gateway_has_no_journal_unless_it_takes_the_firsts_place(tmp_path: Path) -> None:
    place = str(tmp_path / "usage.sqlite")
    first = journal_at(place, None, LIMIT)
    with pytest.raises(SettingsError, match="another gateway writes the usage ledger's journal"):
        journal_at(place, None, LIMIT)
    second, third = journal_at(place, None, LIMIT, spare=True), journal_at(place, None, LIMIT, spare=True)
    assert (tmp_path / "usage.sqlite.journal-1.0").exists()
    assert (tmp_path / "usage.sqlite.journal-2.0").exists()
    for journal in (first, second, third):
        journal.close()


@pytest.mark.parametrize("spare", [False, True])
def test_what_others_have_left_is_taken_over_once(tmp_path: Path, spare: bool) -> None:
    path = tmp_path / "j"
    left_at(path, b"1")
    left_at(tmp_path / "j-1", b"2", b"3")
    left_at(tmp_path / "j-7", b"4")
    busy = Journal(tmp_path / "j-2", LIMIT)
    busy.append([b"not ours"])
    before = open_files()
    journal = journal_at("usage.sqlite", str(path), LIMIT, spare=spare)
    assert open_files() == before + 2
    assert sorted(all_of(journal)) == [b"1", b"2", b"3", b"4"]
    assert all_of(busy) == [b"not ours"]
    for one in (journal, busy):
        one.close()
    again = journal_at("usage.sqlite", str(path), LIMIT)
    assert all_of(again) == []
    again.close()


def test_a_successor_leaves_alone_what_its_predecessor_still_writes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    old = journal_at("usage.sqlite", str(path), LIMIT)
    old.append([b"1"])
    new = journal_at("usage.sqlite", str(path), LIMIT, spare=True)
    old.append([b"2"])
    assert all_of(new) == []
    assert all_of(old) == [b"1", b"2"]
    old.append([b"3"])
    old.close()  # killed before it delivered that
    new.close()
    third = journal_at("usage.sqlite", str(path), LIMIT, spare=True)
    assert all_of(third) == [b"3"]
    third.close()


def test_what_has_no_room_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "j"
    left_at(tmp_path / "j-1", b"x" * 900)
    journal = journal_at("usage.sqlite", str(path), 500)
    assert journal.waiting == 0
    with pytest.raises(JournalFull):
        journal.append([b"x" * 900])
    journal.close()
    again = journal_at("usage.sqlite", str(path), LIMIT)
    assert all_of(again) == [b"x" * 900]
    again.close()


def test_a_directory_in_the_journals_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "j.0").mkdir()
    with pytest.raises(SettingsError, match=r"cannot write the usage ledger's journal .*j: Is a directory"):
        journal_at("usage.sqlite", str(tmp_path / "j"), LIMIT)


def test_a_journal_that_is_in_use_leaves_no_file_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", LIMIT)
    before = open_files()
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            Journal(tmp_path / "j", LIMIT)
    assert open_files() == before
    journal.close()
