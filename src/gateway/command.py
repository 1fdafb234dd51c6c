"""What twistd loads: the command line, and the step from settings to a running gateway."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from dotenv.parser import parse_stream
from twisted.python import usage

from . import __version__
from .core.readers import SettingsError, read_toml
from .core.settings import Settings, Source, option_rows, resolve, switches
from .net.reactor import install as install_reactor

if TYPE_CHECKING:
    from twisted.application.service import Service


DOTENV: Final = ".env"
HERE: Final = Path()
FILES: Final = ("keys", "jwt_key_file", "tls_cert", "tls_key", "tls_client_ca")


def die(problem: object) -> NoReturn:
    """One line and exit status 1, before there is a daemon that could not be asked."""
    sys.exit(f"inference-gateway: {problem}")


_SWITCHES: Final = frozenset(f"--{name}" for name in switches())


class Options(usage.Options):
    """The command line of ``twistd inference-gateway``, made from the settings table."""

    synopsis = "[options]"
    longdesc = "Settings may also stand in a TOML file (--config), .env, or the environment: see docs/configuration.md."
    optParameters: ClassVar = [[name, None, None, help] for name, help in option_rows()]
    settings: Settings
    arguments: Sequence[str] = ()
    """As they were given."""
    _places: Mapping[str, Any] = {}

    def opt_version(self) -> NoReturn:
        """Print the version and exit."""
        sys.stdout.write(f"inference-gateway {__version__}\n")
        sys.exit(0)

    def parseOptions(self, options: list[str] | None = None) -> None:
        self.arguments = tuple(sys.argv[1:] if options is None else options)
        try:
            super().parseOptions(_with_values(self.arguments))
        except usage.UsageError as problem:
            die(f"{str(problem).rstrip('.')}; --help lists the options")

    def parseArgs(self, *arguments: str) -> None:
        """There are only options."""
        if arguments:
            raise usage.UsageError(f"unknown argument '{arguments[0]}'")

    def postOptions(self) -> None:
        """Put the sources together; a problem with any of them ends the start."""
        self._directory = Path.cwd()
        try:
            self.settings = self.read()
        except SettingsError as problem:
            die(problem)

    def read(self) -> Settings:
        """What the sources say by now. Raises `SettingsError`."""
        given = {name.replace("-", "_"): value for name, value in self.items() if value is not None}
        settings = settings_of(Source("command line", "option", given), self._directory)
        return dataclasses.replace(settings, **self._absolute(settings), **self._places)

    def _absolute(self, settings: Settings) -> dict[str, Any]:
        """Paths of files that are read again, where twistd is told to leave the directory (``--rundir``)."""
        if self.parent is None or self.parent.get("rundir", ".") == ".":
            return {}
        found = {name: getattr(settings, name) for name in FILES}
        return {name: str(self._directory / path) for name, path in found.items() if path}

    def stand_at(self, places: Mapping[str, Any]) -> None:
        """These settings are as somebody else has made them, whatever the sources say."""
        self._places = places
        self.settings = dataclasses.replace(self.settings, **places)

    def files(self) -> list[Path]:
        """Those that the settings come from, whether they are there or not."""
        config = self.settings.config
        return [self._directory / name for name in (DOTENV, config) if name]


def settings_of(option: Source, directory: Path = HERE) -> Settings:
    """The settings from all the sources there are, of which ``option`` comes last; relative paths of files that have some begin
    at the directory. Raises `SettingsError`."""
    env = [Source(DOTENV, "dotenv", _dotenv(directory / DOTENV)), Source("environment", "env", os.environ)]
    # Where the file is, is told by the other sources; what it says is overruled by them.
    config = resolve([*env, option], partial=True).config
    files = [Source(config, "file", _toml(directory / config))] if config else []
    return resolve([*files, *env, option])


def _with_values(options: Sequence[str]) -> list[str]:
    """A switch that stands alone means true."""
    found: list[str] = []
    for place, option in enumerate(options):
        found.append(option)
        alone = place + 1 == len(options) or options[place + 1].startswith("--")
        if alone and option in _SWITCHES:
            found.append("true")
    return found


def _dotenv(path: Path) -> dict[str, str | None]:
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingsError(f"{path}: cannot be read: {problem}") from None
    for line in lines:
        if line.error:
            raise SettingsError(f"{path}: line {line.original.line} is not NAME=value")
    return {line.key: line.value for line in lines if line.key is not None}


def _toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise SettingsError(f"{path}: cannot be read: {problem}") from None
    return read_toml(str(path), text)


def makeService(options: Options) -> Service:
    """Everything that can fail at the start fails here: twistd has not become a daemon yet."""
    install_reactor()
    from .process import StartError  # noqa: PLC0415 - these import klein, which brings a reactor along
    from .service import make_gateway  # noqa: PLC0415

    try:
        return make_gateway(options, {} if options.parent is None else options.parent)
    except StartError as problem:
        die(problem)
