"""The usage ledger in PostgreSQL, which several gateways may share. Needs psycopg, the extra ``postgres``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import psycopg

from .core.ledger import POSTGRESQL, array
from .database import DatabaseAway, UnreadableLines, schema_after

CONNECT_SECONDS: Final = 5
SILENCE_SECONDS: Final = 10
STATEMENT_SECONDS: Final = 30
"""How long a server may take to be connected to, to acknowledge what was sent, and to do a statement of ours."""

FETCHED: Final = 1000
"""Rows of a report that are in memory at a time."""

_LOCK: Final = 0x6C6564676572
"""Whoever makes the tables holds this, so that several gateways may start at once."""


def is_url(url: str) -> bool:
    """psycopg understands it."""
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        return False
    return True


class PostgreSQL:
    """A `Database`; ``url`` is one of libpq, password and all."""

    def __init__(self, url: str, *, reads: bool = False) -> None:
        self._url = url
        self._reads = reads
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None

    def insert(self, lines: list[bytes]) -> None:
        with self._translated():
            text = array(lines)
            connection = self._opened()
            with connection.transaction():
                connection.execute(POSTGRESQL.insert, [text])

    def delete(self, before: float, most: int) -> int:
        with self._translated():
            connection = self._opened()
            with connection.transaction():
                return connection.execute(POSTGRESQL.delete, [before, most]).rowcount

    def rows(self, query: str, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        with self._translated():
            connection = self._opened()
            with connection.transaction(), connection.cursor("usage") as cursor:
                cursor.itersize = FETCHED
                cursor.execute(query, values)
                yield from cursor

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (psycopg.DataError, UnicodeDecodeError):
            raise UnreadableLines from None
        except psycopg.Error as problem:
            self.close()
            raise DatabaseAway(str(problem).partition("\n")[0]) from None

    def _opened(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _open(self) -> psycopg.Connection[tuple[Any, ...]]:
        connection = psycopg.connect(
            self._url,
            autocommit=True,
            application_name="inference-gateway",
            connect_timeout=CONNECT_SECONDS,
            tcp_user_timeout=SILENCE_SECONDS * 1000,
            keepalives_idle=SILENCE_SECONDS,
        )
        if not self._reads:
            try:
                connection.execute(f"set statement_timeout = '{STATEMENT_SECONDS}s'")
                self._migrate(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    @staticmethod
    def _migrate(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        with connection.transaction():
            connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
            connection.execute("create table if not exists usage_schema (version integer not null)")
            found = connection.execute("select max(version) from usage_schema").fetchone()
            for number, sql in schema_after((found and found[0]) or 0, POSTGRESQL.schema):
                connection.execute(sql)
                connection.execute("insert into usage_schema values (%s)", [number])
