from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gateway.log_file import LogFile


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    LogFile(path, 1000, 3)("after\n")
    assert path.read_text() == "before\nafter\n"


def test_a_full_file_is_put_aside_and_as_many_as_asked_for_are_kept(tmp_path: Path) -> None:
    write = LogFile(tmp_path / "log", 10, 2)
    for number in range(4):
        write(f"{number}" * 11)
    write("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "log": "new",
        "log.1": "3" * 11,
        "log.2": "2" * 11,
    }


def test_several_writers_put_a_full_file_aside_once(tmp_path: Path) -> None:
    first, second = LogFile(tmp_path / "log", 10, 5), LogFile(tmp_path / "log", 10, 5)
    first("a" * 6)
    second("b" * 6)  # full: it begins a new one
    first.rotate()  # as it would if it had been at it at the same moment
    first("c")
    second("d")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log": "cd", "log.1": "a" * 6 + "b" * 6}


def test_what_somebody_else_puts_aside_is_soon_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("gateway.log_file.time.monotonic", lambda: now)
    write = LogFile(tmp_path / "log", 1000, 5)
    write("one\n")
    (tmp_path / "log").rename(tmp_path / "log-of-yesterday")
    now = 2.0
    write("two\n")
    assert (tmp_path / "log").read_text() == "two\n"
    (tmp_path / "log").rename(tmp_path / "log-of-today")
    write.rotate()  # as logrotate asks for
    write("three\n")
    assert (tmp_path / "log").read_text() == "three\n"
    assert (tmp_path / "log-of-today").read_text() == "two\n"


def test_a_file_that_cannot_be_put_aside_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = LogFile(tmp_path / "log", 3, 1)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    write("one\n")
    write("two\n")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_each_file_has_the_mode_of_the_umask_at_the_start(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write = LogFile(tmp_path / "log", 3, 1)
    finally:
        os.umask(before)
    write("full")
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o640
