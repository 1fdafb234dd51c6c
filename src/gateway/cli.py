"""The command ``inference-gateway``: what an operator does beside the running gateway."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from . import __version__, check_command, top, usage_command
from .command import die, settings_of
from .core import api_keys, readers
from .core.api_keys import ApiKey, new_key, with_field, with_key
from .core.principal import Budget
from .core.readers import Reader, SettingsError
from .core.settings import Source
from .keys_file import Change, changing, read_keys
from .remote import NotTold

_TEN_YEARS: Final = 3650 * 86400.0
_LIMITS: Final = ("models", "rpm", "tpm", "concurrency", "budget", "priority", "weight")
_CARRIED: Final = ("tenant", *_LIMITS, "admin", "expires")
"""What a rotated key keeps."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. What goes wrong is one line, and exit status 1."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except (SettingsError, NotTold) as problem:
        die(problem)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inference-gateway", description="What an operator does beside the running gateway.")
    parser.add_argument("--version", action="version", version=f"inference-gateway {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    keys = commands.add_parser("keys", help="add, list, revoke and rotate API keys")
    _add_keys_commands(keys.add_subparsers(required=True, metavar="COMMAND"))
    check_command.add_parser(commands)
    usage_command.add_parser(commands)
    watch = "watch a running gateway; where it asks for a key, GATEWAY_ADMIN_KEY is one with admin"
    watching = commands.add_parser("top", help=watch, description=watch)
    watching.add_argument("--url", default="http://127.0.0.1:8080", help="where the gateway is; default: %(default)s")
    watching.add_argument("--once", action="store_true", help="print how things are, and end")
    watching.set_defaults(run=_top)
    return parser


def _top(given: argparse.Namespace) -> None:
    top.run(given.url, os.environ.get("GATEWAY_ADMIN_KEY", ""), once=given.once)


def _add_keys_commands(commands: Any) -> None:
    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
        parser.add_argument("--keys", metavar="FILE", help="the keys file; default: the setting GATEWAY_KEYS")
        parser.set_defaults(run=run)
        return parser

    add = command("add", _add, "make a key, and print it: it is shown this once")
    for name, metavar in (("tenant", "NAME"), *((name, name.upper()) for name in _LIMITS)):
        field = next(field for field in api_keys.FIELDS if field.name == name)
        kind = _listed if name == "models" else _checked(field.read)
        add.add_argument(f"--{name}", metavar=metavar, type=kind, required=name == "tenant", help=field.help.replace("`", "'"))
    add.add_argument("--expires", metavar="WHEN", type=_until, help="after 30d, say, or on a day: 2030-01-31")
    add.add_argument("--admin", action="store_true", help="it may use /dashboard, /metrics and the routes under /admin")
    listing = command("list", _list, "the keys there are; none is shown")
    listing.add_argument("--json", action="store_true", help="as JSON")
    revoke = command("revoke", _revoke, "make a key invalid at once")
    rotate = command("rotate", _rotate, "make a key in the place of another, with its rights and limits, and print it")
    for parser in (revoke, rotate):
        parser.add_argument("id", metavar="ID", help="see `inference-gateway keys list`")
    overlap = _checked(readers.seconds(0, _TEN_YEARS))
    rotate.add_argument("--overlap", metavar="TIME", type=overlap, default=86400.0, help="how long both are valid; default 24h")


def _checked(read: Reader) -> Callable[[str], str]:
    """For argparse: the value as it was given, if it can be read."""

    def check(value: str) -> Any:
        try:
            found = read(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{readers.shown(value)} is not {error}") from None
        return found if isinstance(found, int | float) else value

    return check


def _listed(value: str) -> list[str]:
    return [one.strip() for one in value.split(",") if one.strip()]


def _until(value: str) -> datetime:
    """A duration from now on, or a moment."""
    try:
        lasts = readers.seconds(1, _TEN_YEARS)(value)
    except ValueError:
        pass
    else:
        return datetime.fromtimestamp(time.time() + lasts, UTC)
    try:
        return api_keys.moment(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{readers.shown(value)} is not a duration such as 30d, nor {error}") from None


# --- keys ----------------------------------------------------------------------------------------


def _path(given: argparse.Namespace) -> Path:
    path = given.keys or settings_of(Source("command line", "option", {})).keys
    if not path:
        raise SettingsError("no keys file: give --keys FILE, or set GATEWAY_KEYS")
    return Path(path)


def _now() -> datetime:
    return datetime.fromtimestamp(int(time.time()), UTC)


def _add(given: argparse.Namespace) -> None:
    names = ("tenant", *_LIMITS, "expires")
    values = {name: value for name in names if (value := getattr(given, name)) is not None}
    with changing(_path(given)) as change:
        _say(*_make(change, change.text, values | ({"admin": True} if given.admin else {})))


def _make(change: Change, text: str, values: dict[str, Any]) -> tuple[ApiKey, str]:
    """Write a key with these values behind ``text``; the key as it is listed, and itself."""
    id, key = new_key(secrets.token_bytes(api_keys.ID_BYTES + api_keys.SECRET_BYTES))
    hashed = api_keys.digest(key.encode("ascii")).hex()
    made = {"id": id, "tenant": values["tenant"], "hash": hashed, "created": _now()} | values
    return change.write(with_key(text, made))[-1], key


def _say(made: ApiKey, key: str) -> None:
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"key {made.id} of {made.principal.tenant}: shown this once, and stored nowhere\n")


def _found(change: Change, id: str) -> int:
    for number, key in enumerate(change.keys):
        if key.id == id:
            if key.state(time.time()) != "active":
                raise SettingsError(f"key '{id}' is {key.state(time.time())} already")
            return number
    raise SettingsError(f"there is no key '{readers.shown(id)[1:-1]}'; `inference-gateway keys list` shows those there are")


def _changed(change: Change, number: int, name: str, value: datetime) -> str:
    """The text with a field of one key set, and everything else as it was."""
    text = with_field(change.text, number, name, value)
    before = [key.values for key in change.keys]
    before[number] = before[number] | {name: value}
    if [key.values for key in api_keys.parse_keys("the changed file", text)] != before:
        raise SettingsError(f"{name} of key '{change.keys[number].id}' cannot be set by this command: edit the file")
    return text


def _revoke(given: argparse.Namespace) -> None:
    with changing(_path(given)) as change:
        change.write(_changed(change, _found(change, given.id), "revoked", _now()))


def _rotate(given: argparse.Namespace) -> None:
    with changing(_path(given)) as change:
        number = _found(change, given.id)
        old = change.keys[number]
        ends = datetime.fromtimestamp(int(time.time() + given.overlap), UTC)
        expires = old.values.get("expires")
        text = change.text if expires and expires <= ends else _changed(change, number, "expires", ends)
        kept = {name: old.values[name] for name in _CARRIED if name in old.values}
        _say(*_make(change, text, kept | {"account": old.principal.key}))


def _list(given: argparse.Namespace) -> None:
    rows = [_row(key, time.time()) for key in read_keys(_path(given))]
    if given.json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        sys.stdout.writelines(_table(rows))


def _row(key: ApiKey, now: float) -> dict[str, Any]:
    """What may be shown of a key."""
    shown = {name: _plain(value) for name, value in key.values.items() if name != "hash"}
    return {"id": key.id, "tenant": key.principal.tenant, "state": key.state(now)} | shown


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Budget):
        return api_keys.budget_text(value)
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else value


_COLUMNS: Final = ("id", "tenant", "state", "expires", "limits", "models")


def _table(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(_COLUMNS))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    limits = [f"{name}={row[name]}" for name in ("rpm", "tpm", "concurrency", "budget", "priority", "weight") if name in row]
    limits += ["admin"] if row.get("admin") else []
    expires = str(row.get("revoked") or row.get("expires") or "never")
    return (row["id"], row["tenant"], row["state"], expires, " ".join(limits) or "none", ",".join(row.get("models", ["*"])))


if __name__ == "__main__":
    main()
