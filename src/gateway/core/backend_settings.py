"""What the gateway is told of each backend: a table ``[[backends]]`` of the TOML file, or a URL of BACKEND_URL."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from . import readers
from .readers import Reader, SettingsError

Kind = Literal["llamacpp", "vllm", "sglang", "ollama", "tgi", "openai", "echo"]
"""What a backend is. ``openai``: anything else that speaks OpenAI's API; ``echo``: no server at all."""

KINDS: Final = ("auto", "llamacpp", "vllm", "sglang", "ollama", "tgi", "openai")
MAX_BACKENDS: Final = 256


class Key(NamedTuple):
    """One key of a ``[[backends]]`` table. ``default`` is words where it is not a value of its own."""

    name: str
    read: Reader
    default: str
    help: str


KEYS: Final = (
    Key(
        "url",
        readers.backend_url,
        "required",
        "base URL of the model server, or where to find some: dns+http, srv+http or k8s+http (docs/discovery.md)",
    ),
    Key("name", readers.name, "host and port of the URL", "what it is called in headers, logs and metrics"),
    Key("kind", readers.choice(*KINDS), "`GATEWAY_BACKEND_KIND`", "what it is: " + ", ".join(KINDS)),
    Key("models", readers.names, "discovered", "ids of the models to use it for"),
    Key("weight", readers.number(0.001, 1000), "`1`", "its share of the work beside the other backends"),
    Key("slots", readers.whole_number(1, 65536), "discovered", "requests it works on at a time"),
    Key("device", readers.word, "`gpu`", "class of the device it runs on: a word such as gpu or cpu"),
    Key("cost_factor", readers.number(0.001, 1000), "`1`", "what a second of it costs, compared with the other backends"),
    Key("api_key_env", readers.variable, "`GATEWAY_BACKEND_API_KEY`", "NAME of the variable with the key sent to it"),
    Key("stream_usage", readers.switch, "`GATEWAY_STREAM_USAGE`", "ask it for the token counts of every stream"),
    Key(
        "messages",
        readers.choice("auto", "native", "translate"),
        "`auto`",
        "how it gets Anthropic's messages (docs/anthropic.md)",
    ),
    Key("connect_timeout", readers.seconds(0.01), "`GATEWAY_CONNECT_TIMEOUT`", "longest wait for a connection to it"),
    Key("first_byte_timeout", readers.seconds(0.01), "`GATEWAY_FIRST_BYTE_TIMEOUT`", "longest wait for its first byte"),
    Key("idle_timeout", readers.seconds(0.01), "`GATEWAY_IDLE_TIMEOUT`", "longest silence within its answer"),
    Key("total_timeout", readers.seconds(0), "`GATEWAY_TOTAL_TIMEOUT`", "longest time for a whole answer; 0 is no limit"),
)
TIMEOUTS: Final = ("connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout")
_KEYS: Final = {key.name: key for key in KEYS}

EXAMPLE: Final = """\
[[backends]]
url = "http://10.0.0.5:8000"
name = "a100"
slots = 64

[[backends]]
url = "http://127.0.0.1:8080"
kind = "llamacpp"
device = "cpu"
cost_factor = 0.2

[[backends]]
url = "https://models.example/v1"
models = ["llama-3-70b"]
api_key_env = "EXAMPLE_KEY"
"""


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """One backend. ``models`` empty and ``slots`` None: as it says itself. Timeouts are seconds; ``total`` 0 is no limit.
    ``address``: the literal address to connect to, if that is not for the URL's host to say; TLS still asks for the host."""

    name: str
    url: str
    address: str = ""
    kind: Literal["auto"] | Kind = "auto"
    models: tuple[str, ...] = ()
    weight: float = 1.0
    slots: int | None = None
    device: str = "gpu"
    cost_factor: float = 1.0
    api_key: str | None = dataclasses.field(default=None, repr=False)
    stream_usage: bool = True
    messages: Literal["auto", "native", "translate"] = "auto"
    connect_timeout: float = 5.0
    first_byte_timeout: float = 60.0
    idle_timeout: float = 60.0
    total_timeout: float = 0.0


class Table(NamedTuple):
    """A table as it stands in a file: where, and its values, read."""

    where: str
    values: Mapping[str, Any]


def read_tables(where: str, found: Any) -> list[Table]:
    """The tables of ``[[backends]]``, each value read and named by its path. Raises `SettingsError`."""
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found) or len(found) > MAX_BACKENDS:
        raise SettingsError(f"{where}: backends: not at most {MAX_BACKENDS} tables, each headed [[backends]]")
    return [_read_table(f"{where}: backends[{number}]", one) for number, one in enumerate(found)]


def _read_table(where: str, found: Mapping[str, Any]) -> Table:
    if "url" not in found:
        raise SettingsError(f"{where}.url: missing; give the base URL of the model server")
    return Table(where, {name: _read(where, name, value) for name, value in found.items()})


def _read(where: str, name: str, value: Any) -> Any:
    if name not in _KEYS:
        raise SettingsError(f"{where}: unknown key '{name}'; known are {', '.join(_KEYS)}")
    try:
        return _KEYS[name].read(value)
    except ValueError as error:
        raise SettingsError(f"{where}.{name}: {readers.shown(value)} is not {error}") from None


def made(tables: Sequence[Table], defaults: Mapping[str, Any], variables: Mapping[str, str]) -> tuple[BackendSettings, ...]:
    """The backends of these tables; ``variables`` is where a key stands. Raises `SettingsError`."""
    _refuse_twice(tables, "url", [table.values["url"] for table in tables])
    names = list(_names(tables))
    _refuse_twice(tables, "name", names)
    return tuple(_made(table, name, defaults, variables) for table, name in zip(tables, names, strict=True))


def _made(table: Table, name: str, defaults: Mapping[str, Any], variables: Mapping[str, str]) -> BackendSettings:
    given = {**defaults, **table.values, "name": name}
    variable = given.pop("api_key_env", None)
    if variable is not None:
        given["api_key"] = _key(f"{table.where}.api_key_env", variable, variables)
    return BackendSettings(**given)


def _key(where: str, variable: str, variables: Mapping[str, str]) -> str:
    value = variables.get(variable)
    if not value:
        raise SettingsError(f"{where}: the variable {variable} is not set; put the key into the environment or .env")
    try:
        return str(readers.key(value))
    except ValueError as error:
        raise SettingsError(f"{where}: the value of {variable} is not {error}") from None


def _names(tables: Sequence[Table]) -> Iterator[str]:
    """The given name; else host and port, and the path too where several backends share those."""
    places = Counter(urlsplit(table.values["url"]).netloc for table in tables)
    for table in tables:
        parts = urlsplit(table.values["url"])
        yield table.values.get("name") or (parts.netloc if places[parts.netloc] == 1 else parts.netloc + parts.path)


def _refuse_twice(tables: Sequence[Table], key: str, values: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for table, value in zip(tables, values, strict=True):
        if value in seen:
            raise SettingsError(f"{table.where}.{key}: '{value}' is that of {seen[value]} too; each backend needs its own")
        seen[value] = table.where.rpartition(" ")[2]


def markdown_lines() -> Iterator[str]:
    """The part of docs/configuration.md on backends."""
    yield "\n## Backends\n\n"
    yield "One backend, or several that are alike, need no file: `BACKEND_URL=http://10.0.0.5:8000,http://10.0.0.6:8000`.\n"
    yield "Where they differ, the TOML file has a table for each:\n\n"
    yield f"```toml\n{EXAMPLE}```\n\n"
    yield "Like any setting, the backends come from the last source that names some: `BACKEND_URL` in `.env`, the\n"
    yield "environment or on the command line replaces all of the file's `[[backends]]`. A file has `backend_url` or\n"
    yield "`[[backends]]`, not both. URLs and names are unique.\n\n"
    yield "A URL that begins with `dns+http`, `srv+http` or `k8s+http` stands for all backends that are found there\n"
    yield "([discovery.md](discovery.md)); the other keys hold for each of them, and `name` is the first part of theirs.\n\n"
    yield "| key | default | meaning |\n|---|---|---|\n"
    for key in KEYS:
        yield f"| `{key.name}` | {key.default} | {key.help} |\n"
