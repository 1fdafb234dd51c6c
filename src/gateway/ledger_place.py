"""Which database and which journal the settings of the usage ledger mean."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from twisted.logger import Logger

from .core.readers import SettingsError
from .database import Database
from .journal import Journal, has_lines

MOST_JOURNALS: Final = 512
"""Twice as many as there may be workers: for a while there are those who go, and those who come."""

_log: Final = Logger("gateway.ledger")


def database_at(place: str, *, reads: bool = False) -> Database:
    """The database of GATEWAY_LEDGER; with ``reads`` it is only looked at. Raises `SettingsError`."""
    if "://" not in place:
        from .sqlite import SQLite  # noqa: PLC0415 - so much for those who want it

        _check(Path(place), there=reads)
        return SQLite(Path(place), reads=reads)
    try:
        from .postgresql import PostgreSQL, is_url  # noqa: PLC0415 - an optional part
    except ImportError:
        raise SettingsError("GATEWAY_LEDGER: PostgreSQL needs psycopg: pip install 'inference-gateway[postgres]'") from None
    if not is_url(place):
        raise SettingsError("GATEWAY_LEDGER: not a URL of PostgreSQL as psycopg knows them")
    return PostgreSQL(place, reads=reads)


def _check(path: Path, *, there: bool) -> None:
    if there and not path.is_file():
        raise SettingsError(f"there is no usage ledger at {path}")
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"GATEWAY_LEDGER: there is no directory {path.absolute().parent}")


def journal_at(place: str, file: str | None, limit: int, *, spare: bool = False) -> Journal:
    """The journal, ours alone from now on; ``spare``: where another process has it, one with a number behind its name. What
    processes that are gone have left in others is in it then. Raises `SettingsError`."""
    path = Path(file or ("usage.journal" if "://" in place else f"{place}.journal"))
    paths = [path, *(path.with_name(f"{path.name}-{number}") for number in range(1, MOST_JOURNALS))]
    for one in paths if spare else paths[:1]:
        try:
            journal = Journal(one, limit)
        except BlockingIOError:
            continue
        except OSError as problem:
            raise SettingsError(f"cannot write the usage ledger's journal {one}: {problem.strerror}") from None
        for other in paths:
            if other != one and has_lines(other):
                _adopt(journal, other, limit)
        return journal
    raise SettingsError(f"another gateway writes the usage ledger's journal {path} (GATEWAY_LEDGER_JOURNAL_FILE)")


def _adopt(journal: Journal, path: Path, limit: int) -> None:
    """As far as there is room; somebody may be at it."""
    try:
        other = Journal(path, limit)
    except OSError:
        return
    try:
        while lines := other.chunk():
            journal.append(lines)
            other.delivered()
    except OSError as problem:
        _log.warn("rows stay in the journal {path}: {why}", path=str(path), why=problem.strerror or str(problem))
    finally:
        other.close()
