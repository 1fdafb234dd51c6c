from __future__ import annotations

from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from gateway.core.readers import SettingsError
from gateway.watched import POLL_SECONDS, Poll, Reading


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


class Thread:
    """Runs what it is given when it is told to."""

    def __init__(self) -> None:
        self.running: list[tuple[Any, Deferred[Any]]] = []
        self.seen: list[object] = []
        self.content: object = "one"
        self.reading = Reading(self.take, self.read, self.seen.append, self.refused)

    def take(self, call: Any) -> Deferred[Any]:
        ended: Deferred[Any] = Deferred()
        self.running.append((call, ended))
        return ended

    def read(self) -> object:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content

    def refused(self, failure: Failure) -> None:
        failure.trap(SettingsError)
        self.seen.append(failure.getErrorMessage())

    def run(self) -> None:
        """What runs now comes to its end."""
        call, ended = self.running.pop(0)
        try:
            ended.callback(call())
        except SettingsError:
            ended.errback(Failure())


def test_what_changes_while_it_is_read_is_read_once_more() -> None:
    thread = Thread()
    for _ in range(3):
        thread.reading()
    assert len(thread.running) == 1
    thread.run()
    thread.content = "two"
    thread.run()
    assert thread.seen == ["one", "two"]
    assert not thread.running


def test_a_refusal_does_not_end_the_reading_of_what_comes() -> None:
    thread = Thread()
    thread.content = SettingsError("wrong")
    thread.reading()
    thread.run()
    thread.content = "right"
    thread.reading()
    thread.run()
    assert thread.seen == ["wrong", "right"]


def test_once_stopped_nobody_is_told_and_nothing_is_read_again() -> None:
    thread = Thread()
    thread.reading()
    thread.reading()
    thread.reading.stop()
    thread.run()  # the thread itself cannot be stopped
    assert thread.seen == []
    assert not thread.running
