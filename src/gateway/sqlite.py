"""The usage ledger in a file of SQLite. What one program writes, others may read at the same time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from .core.ledger import SQLITE, array
from .database import DatabaseAway, UnreadableLines, schema_after

LOCKED_SECONDS: Final = 1.0
"""How long a lock of somebody else is waited for."""

OTHERS_SECONDS: Final = 30.0
"""The same for whoever only reads."""


class SQLite:
    """A `Database`. A file that was moved away is made anew."""

    def __init__(self, path: Path, *, reads: bool = False) -> None:
        self._path = path.absolute()
        self._reads = reads
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    def insert(self, lines: list[bytes]) -> None:
        with self._transaction() as connection:
            connection.execute(SQLITE.insert, [array(lines)])

    def delete(self, before: float, most: int) -> int:
        with self._transaction() as connection:
            return connection.execute(SQLITE.delete, [before, most]).rowcount

    def rows(self, query: str, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        with self._translated():
            yield from self._opened().execute(query, dict(values))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._translated():
            connection = self._opened()
            connection.execute("begin immediate")
            try:
                yield connection
                connection.execute("commit")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("rollback")
                raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as problem:
            if isinstance(problem, UnicodeDecodeError) or "malformed JSON" in str(problem):
                raise UnreadableLines from None
            self.close()
            raise DatabaseAway(str(problem)) from None

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None and not self._reads and self._inode != self._path.stat().st_ino:
            self.close()
        if self._connection is None:
            self._connection = self._open()
            self._inode = self._path.stat().st_ino
        return self._connection

    def _open(self) -> sqlite3.Connection:
        if self._reads:
            return sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True, timeout=OTHERS_SECONDS)
        self._path.touch(0o640)  # who asked for what is not for everyone to read
        connection = sqlite3.connect(
            self._path, timeout=LOCKED_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=8
        )
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")  # one sync for each flush is cheap, and survives a loss of power
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _migrate(connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("pragma user_version").fetchone()
        for number, sql in schema_after(version, SQLITE.schema):
            connection.executescript(f"begin immediate; {sql} pragma user_version = {number}; commit")
