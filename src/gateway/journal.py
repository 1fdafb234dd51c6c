"""Rows of the ledger on their way to the database: two files of lines, one being written while the other is read.

What is appended is synced, and stays until it was delivered; both files are empty most of the time. Any thread may use it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from threading import Lock
from typing import Final

CHUNK: Final = 256 * 1024
"""Bytes that are delivered at a time; a line is far shorter."""


class JournalFull(OSError):
    """The journal holds as many bytes as it may."""


class Journal:
    """At most ``limit`` bytes of lines in ``path`` with ``.0`` and ``.1`` behind it. Raises OSError, also if another process
    uses it."""

    def __init__(self, path: Path, limit: int) -> None:
        self._limit = limit
        self._lock = Lock()
        self._files = [os.open(f"{path}.{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640) for number in (0, 1)]
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise
        self._sizes = [os.fstat(file).st_size for file in self._files]
        self._sync_directory(path.absolute().parent)
        for file in self._files:
            self._cut(file)
        self._written, self._read = self._files
        self._at = self._next = 0

    @staticmethod
    def _sync_directory(path: Path) -> None:
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @property
    def waiting(self) -> int:
        """Bytes in the files, delivered or not."""
        return sum(self._sizes)

    def append(self, lines: list[bytes]) -> None:
        """They are on the disk when this returns; raises OSError if they are not, and nothing has changed."""
        text = b"\n".join(lines) + b"\n"
        with self._lock:
            if self.waiting + len(text) > self._limit:
                raise JournalFull(f"{self.waiting} bytes wait in the journal")
            file, size = self._written, self._size(self._written)
            try:
                self._write(file, text, size)
            except OSError:
                os.ftruncate(file, size)
                raise
            self._resize(file, size + len(text))

    @staticmethod
    def _write(file: int, text: bytes, place: int) -> None:
        rest = memoryview(text)
        while rest:
            written = os.pwrite(file, rest, place)
            rest, place = rest[written:], place + written
        os.fdatasync(file)

    def chunk(self) -> list[bytes]:
        """The oldest lines that were not delivered; none if all were. The same again until `delivered` is called."""
        with self._lock:
            if self._at >= self._size(self._read) and not self._swap():
                return []
            file = self._read
            there = min(CHUNK, self._size(file) - self._at)
        text = os.pread(file, there, self._at)
        text = text[: text.rfind(b"\n") + 1] or text
        self._next = self._at + len(text)
        return text.split(b"\n")[:-1] if text.endswith(b"\n") else [text]

    def delivered(self) -> None:
        """The lines of the last `chunk` are no longer needed."""
        self._at = self._next

    def _swap(self) -> bool:
        """All of one file is delivered: it becomes the one that is written, and the other is read. False: both are empty."""
        if self._size(self._read):
            os.ftruncate(self._read, 0)
            self._resize(self._read, 0)
        self._at = 0
        if not self._size(self._written):
            return False
        self._written, self._read = self._read, self._written
        return True

    def _size(self, file: int) -> int:
        return self._sizes[self._files.index(file)]

    def _resize(self, file: int, size: int) -> None:
        self._sizes[self._files.index(file)] = size

    def _cut(self, file: int) -> None:
        """A process that was killed may have left a part of a line at the end, which nobody was told is written."""
        size = self._size(file)
        tail = os.pread(file, CHUNK, max(size - CHUNK, 0))
        whole = size - (len(tail) - tail.rfind(b"\n") - 1)
        if whole < size:
            os.ftruncate(file, whole)
            self._resize(file, whole)

    def close(self) -> None:
        with self._lock:
            for file in self._files:
                os.close(file)


def has_lines(path: Path) -> bool:
    """There is such a journal, with something in it."""
    files = [Path(f"{path}.{number}") for number in (0, 1)]
    return any(file.is_file() and file.stat().st_size for file in files)
