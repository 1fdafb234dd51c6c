from __future__ import annotations

from pathlib import Path

from twisted.internet.task import Clock

from gateway.watched import POLL_SECONDS, Poll


def test_a_file_that_is_being_written_is_left_alone_until_it_is_whole(tmp_path: Path) -> None:
    path, clock, seen = tmp_path / "f", Clock(), list[str]()
    path.write_text("one")
    poll = Poll([path], clock, lambda: seen.append(path.read_text()))
    poll.startService()
    path.write_text("")  # as a shell's > does, before it writes
    clock.advance(POLL_SECONDS)
    path.write_text("tw")
    clock.advance(POLL_SECONDS)
    path.write_text("two, and more")
    clock.pump([POLL_SECONDS] * 5)
    assert seen == ["two, and more"]
    poll.stopService()
    assert not clock.getDelayedCalls()


def test_files_that_come_and_go_are_changes_too(tmp_path: Path) -> None:
    path, clock, seen = tmp_path / "f", Clock(), list[bool]()
    poll = Poll([tmp_path / "never", path], clock, lambda: seen.append(path.exists()))
    poll.startService()
    path.write_text("one")
    clock.pump([POLL_SECONDS] * 3)
    path.unlink()
    clock.pump([POLL_SECONDS] * 3)
    assert seen == [True, False]
    poll.stopService()
