"""Which database and which journal the settings of the usage ledger mean."""

from __future__ import annotations

from pathlib import Path

from .core.readers import SettingsError
from .database import Database
from .journal import Journal


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


def journal_at(place: str, file: str | None, limit: int) -> Journal:
    """The journal, ours alone from now on. Raises `SettingsError`."""
    path = Path(file or ("usage.journal" if "://" in place else f"{place}.journal"))
    try:
        return Journal(path, limit)
    except BlockingIOError:
        raise SettingsError(f"another gateway writes the usage ledger's journal {path} (GATEWAY_LEDGER_JOURNAL_FILE)") from None
    except OSError as problem:
        raise SettingsError(f"cannot write the usage ledger's journal {path}: {problem.strerror}") from None
