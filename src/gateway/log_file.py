"""Where log lines go: standard output, or a file of which old ones are kept. Several processes may write one file."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from twisted.logger import Logger

LOOK_SECONDS: Final = 1.0
"""How long at most lines go to a file that another process has put aside."""

AGAIN_SECONDS: Final = 60.0
"""Until a file that could not be put aside is tried again."""

_log: Final = Logger("gateway.logs")


class StandardOutput:
    """The process's own; twistd soon puts a file that logs in its place."""

    def __init__(self) -> None:
        self._file = sys.stdout

    def __call__(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()


class LogFile:
    """A log file that begins anew at ``size`` bytes, and when told to; ``count`` old ones are kept, as ``path.1`` and so on.

    Each has the mode that the umask at the start gives it: a daemon's own is 077. Raises OSError at the start; later, what
    cannot be written is lost.
    """

    def __init__(self, path: Path, size: int, count: int) -> None:
        self.path = path.absolute()
        umask = os.umask(0)
        os.umask(umask)
        self._mode = 0o666 & ~umask
        self._size = size
        self._count = count
        self._look_at = self._rotate_at = 0.0
        self._file = self._open()

    def __call__(self, line: str) -> None:
        """One write for all of it: what several processes append is not mixed up."""
        with suppress(OSError):
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + LOOK_SECONDS
                self.reopen()
            os.write(self._file, line.encode("utf-8"))
            if os.lseek(self._file, 0, os.SEEK_CUR) >= self._size and now >= self._rotate_at:
                self._rotate_at = now + AGAIN_SECONDS  # what `rotate` has to say comes here again
                self.rotate()

    def rotate(self) -> None:
        """Begin anew, unless another process or logrotate just has."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if self._is_there():
                self._put_aside()
        except OSError as problem:
            _log.warn("the log file {path} cannot be put aside: {why}", path=str(self.path), why=problem.strerror)
        else:
            self._rotate_at = 0.0
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self.reopen()

    def reopen(self) -> None:
        """Write to what is there under this name, after somebody has put the file aside."""
        if not self._is_there():
            with suppress(OSError):
                file = self._open()
                os.close(self._file)
                self._file = file

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, self._mode)

    def _is_there(self) -> bool:
        try:
            found, own = self.path.stat(), os.fstat(self._file)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)

    def _put_aside(self) -> None:
        """The file to ``.1``, what was there to ``.2``, and so on; the last is gone."""
        for number in range(self._count - 1, 0, -1):
            with suppress(FileNotFoundError):
                self._old(number).replace(self._old(number + 1))
        if self._count:
            self.path.replace(self._old(1))
        else:
            self.path.unlink()

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
