"""Every setting, in one table: the fields of `Settings`.

The table makes the command line's options and their help, `.env.example` and
docs/configuration.md; `resolve` puts the sources together. Reading files is the shell's work.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

MAX_TEXT: Final = 4096


class SettingsError(ValueError):
    """A setting is wrong; the text names it, where it came from, and what would be right."""


# --- readers: what a value may look like ---------------------------------------------------------
# Each takes a string, or a number or boolean as TOML has them, and raises ValueError with what is expected.

Reader = Callable[[Any], Any]


def text(value: Any) -> str:
    """Printable text without white space around it."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"a printable text of at most {MAX_TEXT} characters")
    return value.strip()


def key(value: Any) -> str:
    """A key as it may stand in a header."""
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,1024}", value.strip()):
        raise ValueError("a key of printable ASCII characters without spaces")
    return value.strip()


def whole_number(low: int, high: int) -> Reader:
    """A whole number from ``low`` to ``high``."""

    def read(value: Any) -> int:
        expected = f"a whole number from {low} to {high}"
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value).strip()):
            raise ValueError(expected)
        number = int(value)
        if not low <= number <= high:
            raise ValueError(expected)
        return number

    return read


def _quantity(value: Any, units: Mapping[str, float], expected: str) -> float:
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)", "" if isinstance(value, bool) else str(value).strip())
    if found is None or found[2].lower() not in units:
        raise ValueError(expected)
    return float(found[1]) * units[found[2].lower()]


def seconds(low: float, high: float = 86400.0) -> Reader:
    """Seconds, or a number with ms, s, m or h."""
    expected = f"a duration from {low:g} s to {high:g} s, such as 30, 500ms or 2m"

    def read(value: Any) -> float:
        found = _quantity(value, {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600}, expected)
        if not low <= found <= high:
            raise ValueError(expected)
        return found

    return read


def size(low: int, high: int = 2**40) -> Reader:
    """Bytes, or a number with KiB, MiB or GiB."""
    expected = f"a size from {low} to {high} bytes, such as 1048576, 512KiB or 32MiB"

    def read(value: Any) -> int:
        found = int(_quantity(value, {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}, expected))
        if not low <= found <= high:
            raise ValueError(expected)
        return found

    return read


def switch(value: Any) -> bool:
    """True or false, in the usual words."""
    word = str(value).strip().lower()
    if word in ("1", "true", "on", "yes"):
        return True
    if word in ("0", "false", "off", "no"):
        return False
    raise ValueError("true or false")


def choice(*words: str) -> Reader:
    """One of these words."""

    def read(value: Any) -> str:
        word = str(value).strip().lower()
        if word not in words:
            raise ValueError("one of " + ", ".join(words))
        return word

    return read


def host(value: Any) -> str:
    """An IP address or a host name."""
    name = text(value)
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        if re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", name):
            return name
    raise ValueError("an IP address or a host name")


def backend_url(value: Any) -> str:
    """A base URL without its trailing slash; a trailing ``/v1``, as SDKs want it, is taken off."""
    expected = "a URL such as http://127.0.0.1:8000, without user, query or fragment"
    url = text(value)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(expected) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(expected)
    if parts.username is not None or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise ValueError(expected)
    host(parts.hostname)
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


# --- the table ---------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    env: str
    read: Reader
    default: str
    help: str
    secret: bool
    in_file: bool

    @property
    def option(self) -> str:
        return self.name.replace("_", "-")


def _row(default: str, env: str, read: Reader, help: str, *, secret: bool = False, in_file: bool = True) -> Any:
    metadata = {"env": env, "read": read, "default": default, "help": help, "secret": secret, "in_file": in_file}
    return dataclasses.field(default=read(default) if default else None, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the gateway is told. Durations are seconds, sizes bytes."""

    config: str | None = _row("", "GATEWAY_CONFIG", text, "TOML file with settings, named as in this table", in_file=False)
    port: int = _row("8080", "PORT", whole_number(0, 65535), "TCP port to listen on; 0 takes a free one")
    host: str = _row("127.0.0.1", "GATEWAY_HOST", host, "address to listen on; 0.0.0.0 or :: for all")
    backend_url: str | None = _row(
        "", "BACKEND_URL", backend_url, "base URL of the model server; without one, requests are echoed"
    )
    backend_kind: Literal["auto", "llamacpp", "openai"] = _row(
        "auto",
        "GATEWAY_BACKEND_KIND",
        choice("auto", "llamacpp", "openai"),
        "what the backend is: llamacpp, or any other OpenAI-compatible server; auto asks it",
    )
    backend_api_key: str | None = _row(
        "", "GATEWAY_BACKEND_API_KEY", key, "key sent to the backend as a Bearer token", secret=True
    )
    forward_authorization: bool = _row(
        "false", "GATEWAY_FORWARD_AUTHORIZATION", switch, "pass the client's Authorization and X-Api-Key on to the backend"
    )
    stream_usage: bool = _row(
        "true",
        "GATEWAY_STREAM_USAGE",
        switch,
        "ask the backend for the token counts of every stream; a client that did not ask does not see them",
    )
    max_body: int = _row("32MiB", "GATEWAY_MAX_BODY", size(1024, 2**32), "largest request body")
    max_answer: int = _row("64MiB", "GATEWAY_MAX_ANSWER", size(1024, 2**32), "largest answer of a backend that is not a stream")
    max_connections: int = _row(
        "16384", "GATEWAY_MAX_CONNECTIONS", whole_number(1, 1048576), "most client connections at a time"
    )
    connect_timeout: float = _row(
        "5s", "GATEWAY_CONNECT_TIMEOUT", seconds(0.01), "longest wait for a connection to the backend"
    )
    first_byte_timeout: float = _row(
        "60s", "GATEWAY_FIRST_BYTE_TIMEOUT", seconds(0.01), "longest wait for the first byte of the backend's answer"
    )
    idle_timeout: float = _row(
        "60s",
        "GATEWAY_IDLE_TIMEOUT",
        seconds(0.01),
        "longest silence within an answer, of the backend or of a client that does not read",
    )
    total_timeout: float = _row("0s", "GATEWAY_TOTAL_TIMEOUT", seconds(0), "longest time for a whole answer; 0 is no limit")
    client_timeout: float = _row(
        "60s",
        "GATEWAY_CLIENT_TIMEOUT",
        seconds(0.01),
        "longest silence of a client that sends a request, or between its requests",
    )
    probe_interval: float = _row(
        "2s", "GATEWAY_PROBE_INTERVAL", seconds(0.05), "time between two looks at the backend's health"
    )
    grace: float = _row("30s", "GATEWAY_GRACE", seconds(0), "time that requests in flight get to finish when the gateway stops")
    log_format: Literal["text", "json"] = _row(
        "text", "GATEWAY_LOG_FORMAT", choice("text", "json"), "log lines for people, or JSON"
    )
    log_file_size: int = _row("100MiB", "GATEWAY_LOG_FILE_SIZE", size(65536), "size at which the file of --logfile is rotated")
    log_files: int = _row("10", "GATEWAY_LOG_FILES", whole_number(1, 1000), "how many rotated log files are kept")


TABLE: Final[tuple[Setting, ...]] = tuple(
    Setting(
        field.name,
        field.metadata["env"],
        field.metadata["read"],
        field.metadata["default"],
        field.metadata["help"],
        field.metadata["secret"],
        field.metadata["in_file"],
    )
    for field in dataclasses.fields(Settings)
)
_BY_NAME: Final = {row.name: row for row in TABLE}
_BY_ENV: Final = {row.env: row for row in TABLE}


# --- sources -----------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where values came from. ``style`` is how it names a setting; see the functions below."""

    where: str
    style: Literal["file", "dotenv", "env", "option"]
    values: Mapping[str, Any]


def resolve(sources: Sequence[Source]) -> Settings:
    """The settings from these sources, of which a later one wins. Raises `SettingsError`.

    Names that nobody knows are an error in a file; in the environment they are somebody else's. (Kubernetes
    sets GATEWAY_PORT and the like beside a service called gateway.)
    """
    found: dict[str, Any] = {}
    for source in sources:
        for name, value in source.values.items():
            row = _row_of(source, name)
            if row is not None and value is not None and value != "":
                found[row.name] = _read(source, name, row, value)
    return Settings(**found)


def _row_of(source: Source, name: str) -> Setting | None:
    if source.style == "option":
        return _BY_NAME[name]
    if source.style in ("env", "dotenv"):
        if source.style == "dotenv" and name.startswith("GATEWAY_") and name not in _BY_ENV:
            raise SettingsError(f"{source.where}: unknown setting '{name}'; .env.example lists those there are")
        return _BY_ENV.get(name)
    row = _BY_NAME.get(name)
    if row is None or not row.in_file:
        known = ", ".join(row.name for row in TABLE if row.in_file)
        raise SettingsError(f"{source.where}: unknown setting '{name}'; known are {known}")
    return row


def _read(source: Source, name: str, row: Setting, value: Any) -> Any:
    try:
        return row.read(value)
    except ValueError as error:
        shown = "the value" if row.secret else repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        label = f"--{row.option}" if source.style == "option" else f"{source.where}: {name}"
        raise SettingsError(f"{label}: {shown} is not {error}") from None


# --- what the table makes ------------------------------------------------------------------------


def option_rows() -> list[tuple[str, str]]:
    """(option without dashes, help) of each setting that may stand on a command line; a secret may not."""
    return [(row.option, f"{row.help} [{_hint(row)}]") for row in TABLE if not row.secret]


def _hint(row: Setting) -> str:
    return f"{row.env}, default {row.default}" if row.default else row.env


def env_example() -> str:
    """The text of `.env.example`."""
    return "".join(_env_lines())


def _env_lines() -> Iterator[str]:
    yield "# Settings of the inference gateway; copy to .env and take the # off what you change.\n"
    yield "# The order, of which the last wins: default, TOML file (--config), .env, environment, command line.\n"
    for row in TABLE:
        yield f"\n# {row.help[:1].upper()}{row.help[1:]}.\n# {row.env}={row.default}\n"


def markdown() -> str:
    """The text of docs/configuration.md."""
    return "".join(_markdown_lines())


def _markdown_lines() -> Iterator[str]:
    yield "# Configuration\n\n"
    yield "Made from the table in `src/gateway/core/settings.py` by `make docs`.\n\n"
    yield "Sources, of which the last wins: default, TOML file (`--config`), `.env` in the working directory,\n"
    yield "environment, command line. An empty value counts as not set. A bad value, or a key in the TOML file\n"
    yield "that nobody knows, ends the start with one line that names it and exit status 1.\n\n"
    yield "Durations are seconds or carry a unit (`500ms`, `30s`, `2m`, `1h`); sizes are bytes or carry one\n"
    yield "(`512KiB`, `32MiB`, `1GiB`). Secrets have no option: other users of the machine see a command line.\n\n"
    yield "| environment | TOML | option | default | meaning |\n|---|---|---|---|---|\n"
    for row in TABLE:
        name = f"`{row.name}`" if row.in_file else ""
        option = "" if row.secret else f"`--{row.option}`"
        default = f"`{row.default}`" if row.default else ""
        yield f"| `{row.env}` | {name} | {option} | {default} | {row.help} |\n"
