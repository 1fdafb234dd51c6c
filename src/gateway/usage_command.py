"""The command ``inference-gateway usage``: what the ledger says, by tenant, model, day and more."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from .command import settings_of
from .core.ledger import POSTGRESQL, SQLITE
from .core.readers import SettingsError, seconds
from .core.settings import Source
from .core.usage_report import GROUPS, lines, report
from .database import DatabaseAway
from .ledger_place import database_at

_AGES: Final = 100 * 365 * 86400.0


def add_parser(commands: Any) -> None:
    """Add the command to argparse's."""
    help = "what the usage ledger says: requests, tokens and cost"
    parser: argparse.ArgumentParser = commands.add_parser("usage", help=help, description=help)
    names = ",".join(GROUPS)
    parser.add_argument("--by", type=_groups, default=["tenant", "model", "day"], metavar="NAMES", help=f"of {names}")
    parser.add_argument("--since", type=_moment, metavar="WHEN", help="2026-01-31, 2026-01-31T12:00, or an age: 7d, 12h")
    parser.add_argument("--until", type=_moment, metavar="WHEN", help="the same; up to then, not including it")
    parser.add_argument("--tenant", metavar="NAME", help="of this tenant alone")
    parser.add_argument("--model", metavar="NAME", help="of requests for this model alone")
    parser.add_argument("--ledger", metavar="PATH|URL", help="the ledger; default: the setting GATEWAY_LEDGER")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="json has an object on each line")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Write the report to standard output. Raises `SettingsError`, also if the ledger cannot be read."""
    place = given.ledger or settings_of(Source("command line", "option", {})).ledger
    if not place:
        raise SettingsError("no usage ledger: give --ledger PATH or URL, or set GATEWAY_LEDGER")
    dialect = POSTGRESQL if "://" in place else SQLITE
    asked = report(dialect, given.by, since=given.since, until=given.until, tenant=given.tenant, model=given.model)
    database = database_at(place, reads=True)
    try:
        sys.stdout.writelines(lines(asked.columns, database.rows(asked.query, asked.values), given.format))
        sys.stdout.flush()
    except DatabaseAway as problem:
        raise SettingsError(f"the usage ledger cannot be read: {problem}") from None
    except BrokenPipeError:  # who reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        database.close()


def _groups(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in GROUPS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of {', '.join(GROUPS)}, each once")
    return names


def _moment(value: str) -> float:
    """Unix seconds of a moment, in UTC unless it says otherwise, or of an age."""
    if value.endswith("d") and value[:-1].isdigit():
        return time.time() - int(value[:-1]) * 86400.0
    readings: tuple[Callable[[str], float], ...] = (_date, lambda text: time.time() - float(seconds(0, _AGES)(text)))
    for read in readings:
        try:
            return read(value)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{value!r} is neither a moment such as 2026-01-31 nor an age such as 7d")


def _date(value: str) -> float:
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
