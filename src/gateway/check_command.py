"""``inference-gateway check``: whether the gateway would start with its settings, and what a reload would change."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Final

import msgspec

from .command import Options
from .core.changes import Change, Picture, changes, picture
from .core.readers import SettingsError
from .remote import ask


class _Held(msgspec.Struct):
    generation: int
    salt: str
    settings: Picture


def add_parser(commands: Any) -> None:
    """The command's part of the command line."""
    text = "whether the gateway would start with the settings that it finds here, and what would change"
    parser = commands.add_parser("check", help=text, description=text)
    parser.add_argument("--diff", action="store_true", help="compare them with those of a running gateway")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="where that is; default: %(default)s")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="as for twistd inference-gateway: -- --config FILE")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Say so, or raise `SettingsError` or `NotTold`."""
    from .parts import check  # noqa: PLC0415 - this imports klein, which most commands can do without
    from .process import StartError  # noqa: PLC0415

    options = Options()
    options.parseOptions(given.options)
    try:
        check(options.settings)
    except StartError as problem:
        raise SettingsError(str(problem)) from None
    if not given.diff:
        sys.stdout.write("settings: in order\n")
        return
    held = ask(given.url, "/admin/settings", os.environ.get("GATEWAY_ADMIN_KEY", ""), _Held)
    found = changes(held.settings, picture(options.settings, bytes.fromhex(held.salt)))
    sys.stdout.write("".join(lines(held.generation, found)))


def lines(generation: int, found: list[Change]) -> list[str]:
    """For people: one for each change."""
    if not found:
        return [f"settings: in order, and those of generation {generation} that holds\n"]
    width: Final = len("at a restart")
    when = {True: "at a reload", False: "at a restart"}
    return [f"{when[change.live]:<{width}}  {change}\n" for change in sorted(found, key=lambda change: not change.live)]
