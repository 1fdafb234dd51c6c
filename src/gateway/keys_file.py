"""The file of API keys: read, changed by one process at a time, and watched for what others change."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from .core.api_keys import ApiKey, parse_keys
from .core.readers import SettingsError

POLL_SECONDS: Final = 1.0
MAX_FILE: Final = 16 * 1024 * 1024
NEW_MODE: Final = 0o600

_log: Final = Logger("gateway.keys")


def read_text(path: Path) -> str:
    """The file's text; empty if there is none yet. Raises `SettingsError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
        if len(raw) > MAX_FILE:
            raise SettingsError(f"{path}: is larger than {MAX_FILE} bytes")
        return raw.decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingsError(f"{path}: cannot be read: {_why(problem)}") from None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file that must be there. Raises `SettingsError`."""
    if not path.exists():
        raise SettingsError(f"{path}: there is no such file; `inference-gateway keys add` makes one")
    return parse_keys(str(path), read_text(path))


class Change:
    """A change of the file under way: ``text`` as it stands, `write` what is to stand there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.text = read_text(path)
        self.keys = parse_keys(str(path), self.text)

    def write(self, text: str) -> tuple[ApiKey, ...]:
        """Put the text in the file's place in one step, if its keys can be read; they are returned."""
        keys = parse_keys(str(self._path), text)
        try:
            _replace(self._path, text.encode("utf-8"))
        except OSError as problem:
            raise SettingsError(f"{self._path}: cannot be written: {_why(problem)}") from None
        return keys


@contextmanager
def changing(path: Path) -> Iterator[Change]:
    """A `Change` that no other process makes one beside. Raises `SettingsError`.

    The lock is on a file of its own, since each change puts another file in the place of the one with the keys.
    """
    path = path.resolve()  # of a link, the file that it means
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, NEW_MODE)
    except OSError as problem:
        raise SettingsError(f"{path}: cannot be locked: {_why(problem)}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Change(path)
    finally:
        os.close(lock)


def _replace(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also after a crash. Mode and owner stay; a new file is its owner's alone."""
    before = path.stat() if path.exists() else None
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if before is not None:
                with suppress(PermissionError):  # who is not root writes files of its own
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(before.st_mode) if before is not None else NEW_MODE)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _why(problem: Exception) -> str:
    return problem.strerror or str(problem) if isinstance(problem, OSError) else str(problem)


class KeysFile(Service):
    """Reads the keys again whenever the file has changed, and tells ``use`` of them: all, or none if one is wrong.

    ``in_thread`` runs a function beside the reactor, since a file of thousands of keys takes a while to parse.
    """

    def __init__(
        self,
        path: Path,
        clock: IReactorTime,
        use: Callable[[Sequence[ApiKey]], object],
        in_thread: Callable[[Callable[[], Any]], Deferred[Any]],
    ) -> None:
        self._path = path.absolute()  # a daemon changes its directory
        self._clock = clock
        self._use = use
        self._in_thread = in_thread
        self._seen = self._look()
        self._timer: IDelayedCall | None = None
        self._reading: Deferred[Any] | None = None
        use(read_keys(self._path))

    def startService(self) -> None:
        super().startService()
        self._timer = self._clock.callLater(POLL_SECONDS, self._poll)

    def stopService(self) -> None:
        super().stopService()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reading is not None:
            self._reading.cancel()

    def _look(self) -> tuple[int, ...] | None:
        """What is different after every change; None if the file cannot be looked at."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def _poll(self) -> None:
        self._timer = None
        seen = self._look()
        if seen == self._seen:
            self._again()
            return
        self._seen = seen
        self._reading = self._in_thread(lambda: read_keys(self._path))
        self._reading.addCallbacks(self._read, self._failed)
        self._reading.addErrback(lambda failure: _log.failure("a bug in reading the keys file", failure))
        self._reading.addBoth(lambda _: self._again())

    def _again(self) -> None:
        self._reading = None
        if self.running:
            self._timer = self._clock.callLater(POLL_SECONDS, self._poll)

    def _read(self, keys: Sequence[ApiKey]) -> None:
        self._use(keys)
        _log.info("{path}: read again, keys: {count}", path=str(self._path), count=len(keys))

    def _failed(self, failure: Failure) -> None:
        """Said once: the next look is only at a change."""
        if failure.check(CancelledError) is None:
            failure.trap(SettingsError)
            _log.error("{problem}; the keys of before stay", problem=failure.getErrorMessage())
