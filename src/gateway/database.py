"""Where the usage ledger's rows go. SQLite is in `gateway.sqlite`, PostgreSQL in `gateway.postgresql`.

A database is opened when it is first used, and again after it has failed. One thread at a time uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, Final, Protocol

_FILES: Final = resources.files("gateway") / "sql"


class DatabaseAway(Exception):
    """The database cannot do it now; the text says why, and no password."""


class UnreadableLines(Exception):
    """The database does not understand the lines."""


class Database(Protocol):
    """Every method raises `DatabaseAway`."""

    def insert(self, lines: list[bytes]) -> None:
        """Add the rows that are not there yet; all are on the disk when this returns, or none. Raises `UnreadableLines` too."""

    def delete(self, before: float, most: int) -> int:
        """Delete the oldest rows that were started before this Unix second; how many there were."""

    def rows(self, query: str, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
        """The answer to a query, as it comes."""

    def close(self) -> None: ...


def schema_after(version: int, dialect: str) -> list[tuple[int, str]]:
    """(number, SQL) of each step that brings a database of this version up to date."""
    found = []
    while (path := _FILES / f"{dialect}-{version + 1}.sql").is_file():
        version += 1
        found.append((version, path.read_text("utf-8")))
    return found
