"""Files that are read again whenever one of them has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .core.readers import SettingsError

POLL_SECONDS: Final = 0.5

Content = TypeVar("Content")
InThread = Callable[[Callable[[], Any]], Deferred[Any]]

_log: Final = Logger("gateway.files")


class Poll(Service):
    """Calls ``changed`` soon after one of the files has changed, has come or has gone: when two looks in a row see the same, so
    that a file is not read while it is being written. They need not be there."""

    def __init__(self, paths: Sequence[Path], clock: IReactorTime, changed: Callable[[], object]) -> None:
        self.paths = [path.absolute() for path in paths]  # a daemon changes its directory
        self._clock = clock
        self._changed = changed
        self._used = self._seen = self._look()
        self._timer: IDelayedCall | None = None

    def startService(self) -> None:
        super().startService()
        self._timer = self._clock.callLater(POLL_SECONDS, self._poll)

    def stopService(self) -> None:
        super().stopService()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        self._timer = self._clock.callLater(POLL_SECONDS, self._poll)
        before, self._seen = self._seen, self._look()
        if self._seen == before != self._used:
            self._used = before
            self._changed()

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_look(path) for path in self.paths]


class Reading(Generic[Content]):
    """Has ``read`` run beside the reactor, as it may take a while; once more if it is called while that is under way.

    ``use`` is given what was read. If either raises, ``refused`` is told, which traps what it expects. ``begun`` and ``done``
    are called before and after each time.
    """

    def __init__(
        self,
        in_thread: InThread,
        read: Callable[[], Content],
        use: Callable[[Content], object],
        refused: Callable[[Failure], object],
        begun: Callable[[], object] = lambda: None,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        self._in_thread = in_thread
        self._read = read
        self._use = use
        self._refused = refused
        self._begun = begun
        self._done = done
        self._running: Deferred[Any] | None = None
        self._again = False

    def __call__(self) -> None:
        if self._running is not None:
            self._again = True
            return
        self._begun()
        self._running = self._in_thread(self._read)
        self._running.addCallback(self._use).addErrback(self._refused)
        self._running.addErrback(self._failed)
        self._running.addBoth(self._ended)

    def stop(self) -> None:
        """Forget what is being read."""
        self._again = False
        if self._running is not None:
            self._running.cancel()

    @staticmethod
    def _failed(failure: Failure) -> None:
        if failure.check(CancelledError) is None:
            _log.failure("a bug in reading files", failure)

    def _ended(self, _: object) -> None:
        self._running = None
        self._done()
        if self._again:
            self._again = False
            self()


class Watched(Poll, Generic[Content]):
    """Tells ``use`` of what ``read`` makes of the files: at once, and after every change of one of them. If ``read`` raises
    `SettingsError`, what was before stays, and the log says so; the first time it is the caller who is told.

    ``in_thread`` runs a function beside the reactor. ``told`` makes of what was read what the log says of it; ``what`` is a
    word for it, in the plural.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        clock: IReactorTime,
        read: Callable[[], Content],
        use: Callable[[Content], object],
        in_thread: InThread,
        told: Callable[[Content], str],
        what: str,
    ) -> None:
        self._reading = Reading(in_thread, read, self._was_read, self._refused)
        super().__init__(paths, clock, self._reading)
        self._use = use
        self._told = told
        self._what = what
        use(read())

    def stopService(self) -> None:
        super().stopService()
        self._reading.stop()

    def _was_read(self, content: Content) -> None:
        self._use(content)
        _log.info("{path}: read again, {what}", path=", ".join(map(str, self.paths)), what=self._told(content))

    def _refused(self, failure: Failure) -> None:
        """Said once: the next look is only at a change."""
        failure.trap(SettingsError)
        _log.error("{problem}; the {what} of before stay", problem=failure.getErrorMessage(), what=self._what)


def _look(path: Path) -> tuple[int, ...] | None:
    """What is different after every change; None if the file cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
