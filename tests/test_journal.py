from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.journal import Journal, JournalFull

LIMIT = 1024 * 1024


def all_of(journal: Journal) -> list[bytes]:
    """Deliver what there is."""
    found = []
    while lines := journal.chunk():
        found += lines
        journal.delivered()
    return found


def test_what_is_appended_is_delivered_once_and_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", LIMIT)
    journal.append([b"1", b"2"])
    assert journal.chunk() == [b"1", b"2"]
    journal.append([b"3"])
    assert journal.chunk() == [b"1", b"2"]  # not delivered yet
    assert all_of(journal) == [b"1", b"2", b"3"]
    assert journal.chunk() == []
    assert journal.waiting == 0
    journal.close()


def test_what_was_not_delivered_is_there_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", LIMIT)
    journal.append([b"1"])
    assert journal.chunk() == [b"1"]
    journal.append([b"2"])
    journal.close()
    again = Journal(tmp_path / "j", LIMIT)
    again.append([b"3"])
    assert sorted(all_of(again)) == [b"1", b"2", b"3"]
    again.close()


@pytest.mark.parametrize("left", [b"", b"4", b"4\n5", b"45\n\0\0"])
def test_the_cut_line_of_a_killed_process_is_not_joined_to_the_next(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "j.0").write_bytes(left)
    journal = Journal(tmp_path / "j", LIMIT)
    journal.append([b"6"])
    assert all_of(journal) == [*left.split(b"\n")[:-1], b"6"]
    journal.close()


def test_a_full_journal_says_so_and_has_room_again_once_delivered(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", 10)
    journal.append([b"1234567"])
    with pytest.raises(JournalFull):
        journal.append([b"12"])
    journal.append([b"1"])
    assert all_of(journal) == [b"1234567", b"1"]
    journal.append([b"123456789"])
    journal.close()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j", LIMIT)
    journal.append([b"1"])
    write, calls = os.pwrite, iter(range(10))

    def half(file: int, text: bytes, place: int) -> int:
        if next(calls):
            raise OSError(28, "No space left on device")
        return write(file, text[:3], place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", half)
        with pytest.raises(OSError, match="No space"):
            journal.append([b"22222"])
    journal.append([b"3"])
    assert all_of(journal) == [b"1", b"3"]
    journal.close()


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", LIMIT)
    with pytest.raises(BlockingIOError):
        Journal(tmp_path / "j", LIMIT)
    journal.close()
    Journal(tmp_path / "j", LIMIT).close()


def test_long_files_come_in_pieces_of_whole_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", LIMIT)
    sent = [b"%06d" % number + b"x" * 300 for number in range(2000)]
    journal.append(sent)
    first = journal.chunk()
    assert 0 < len(first) < 2000
    assert all_of(journal) == sent
    journal.close()


STEPS = st.lists(st.sampled_from(["append", "deliver", "look", "reopen"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_nothing_is_lost_whatever_the_order(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path, LIMIT)
    sent: list[bytes] = []
    seen: set[bytes] = set()
    for step in steps:
        if step == "append":
            sent.append(b"%d" % len(sent))
            journal.append(sent[-1:])
        elif step == "reopen":
            journal.close()
            journal = Journal(path, LIMIT)
        elif (lines := journal.chunk()) and step == "deliver":
            seen.update(lines)
            journal.delivered()
    seen.update(all_of(journal))
    assert seen == set(sent)
    journal.close()
