"""What an operator says of models: tables ``[models.NAME]`` of the TOML file, and what they make of a request.

A table gives a model another name at the backends, values for fields that a request leaves out, models to fall back to, and
the ranges of what may be asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from . import readers
from .chat import ChatRequest
from .errors import UNDECODABLE, GatewayError
from .ranges import Ranges, check
from .readers import Reader, SettingsError
from .schema import Schema

MAX_MODELS: Final = 1000
MAX_DEFAULTS: Final = 100
MAX_FALLBACKS: Final = 16
MAX_TOKENS: Final = 2**31 - 1

SAME: Final = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
"""Two names of one thing: a request that has the one does not get the other's default."""

NOT_DEFAULTS: Final = frozenset(["model", "messages", "prompt", "input", "stream", "stream_options"])
"""What a request is, rather than how it is answered; the gateway reads these itself."""


ANYTHING: Final = Ranges()


class ModelSettings(NamedTuple):
    """One table. ``backend_model`` is its name at the backends, ``fallbacks`` what is tried next, all of it, in order."""

    name: str
    backend_model: str
    defaults: Mapping[str, msgspec.Raw] = {}
    fallbacks: tuple[str, ...] = ()
    ranges: Ranges = ANYTHING

    def applied(self, body: bytes, *, defaults: bool = True) -> bytes:
        """The request as this model's backends are to see it; fields that do not change keep their own bytes.

        Raises `GatewayError` invalid_json if a field's name is no text.
        """
        try:
            fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except UNDECODABLE as error:
            raise GatewayError("invalid_json", f"The request body is not valid JSON: {error}.") from None
        own = self.defaults if defaults else {}
        added = {name: value for name, value in own.items() if name not in fields and SAME.get(name) not in fields}
        if not added and fields.get("model") == self._written:
            return body
        return msgspec.json.encode({**fields, **added, "model": self._written})

    @property
    def _written(self) -> msgspec.Raw:
        return msgspec.Raw(msgspec.json.encode(self.backend_model))


Models = Mapping[str, ModelSettings]
NO_MODELS: Final[Models] = {}


# --- reading ----------------------------------------------------------------------------------


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,200}", value):
        raise ValueError("the id of a model: at most 200 printable ASCII characters without spaces")
    return value


def _names(value: Any) -> tuple[str, ...]:
    expected = f"a list of at most {MAX_FALLBACKS} models, each once, such as ['llama-3-8b']"
    if not isinstance(value, list) or len(value) > MAX_FALLBACKS or len({str(one) for one in value}) < len(value):
        raise ValueError(expected)
    return tuple(_name(one) for one in value)


_CHAT: Final = Schema(ChatRequest)
_RANGES: Final[dict[str, Reader]] = {
    "max_tokens": readers.whole_number(1, MAX_TOKENS),
    "context_length": readers.whole_number(1, MAX_TOKENS),
    "max_n": readers.whole_number(1, 1000),
    "allow_logprobs": readers.switch,
    "allow_tools": readers.switch,
}


def _ranges(where: str, found: Any) -> Ranges:
    return Ranges(**{name: _read(where, name, value, _RANGES) for name, value in _table(where, found).items()})


def _defaults(where: str, found: Any) -> dict[str, msgspec.Raw]:
    fields = _table(where, found)
    if len(fields) > MAX_DEFAULTS:
        raise SettingsError(f"{where}: more than {MAX_DEFAULTS} defaults")
    return {name: _default(where, name, value) for name, value in fields.items()}


def _default(where: str, name: str, value: Any) -> msgspec.Raw:
    if name in NOT_DEFAULTS:
        raise SettingsError(f"{where}: '{name}' cannot have a default; every request says it itself")
    try:
        return msgspec.Raw(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError):
        raise SettingsError(f"{where}.{name}: {readers.shown(value)} has no counterpart in JSON") from None


def _table(where: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise SettingsError(f"{where}: {readers.shown(found)} is not a table")
    return found


def _read(where: str, name: str, value: Any, known: Mapping[str, Reader]) -> Any:
    if name not in known:
        raise SettingsError(f"{where}: unknown key '{name}'; known are {', '.join(known)}")
    try:
        return known[name](value)
    except ValueError as error:
        raise SettingsError(f"{where}.{name}: {readers.shown(value)} is not {error}") from None


_READERS: Final[dict[str, Callable[[Any], Any]]] = {"backend_model": _name, "fallbacks": _names}
_TABLES: Final[dict[str, Callable[[str, Any], Any]]] = {"defaults": _defaults, "ranges": _ranges}


def read_tables(where: str, found: Any) -> dict[str, ModelSettings]:
    """The tables of ``[models.NAME]``, their fallbacks followed to the end. Raises `SettingsError`."""
    if not isinstance(found, dict) or len(found) > MAX_MODELS:
        raise SettingsError(f"{where}: models: not at most {MAX_MODELS} tables, each headed [models.NAME]")
    made = {name: _made(f"{where}: models", name, table) for name, table in found.items()}
    return {name: one._replace(fallbacks=_chain(f"{where}: models.{name}.fallbacks", name, made)) for name, one in made.items()}


def _made(where: str, name: str, found: Any) -> ModelSettings:
    try:
        _name(name)
    except ValueError as error:
        raise SettingsError(f"{where}: {readers.shown(name)} is not {error}") from None
    where = f"{where}.{name}"
    known: dict[str, Any] = {**_READERS, **_TABLES}
    given: dict[str, Any] = {"backend_model": name}
    for key, value in _table(where, found).items():
        given[key] = _TABLES[key](f"{where}.{key}", value) if key in _TABLES else _read(where, key, value, known)
    made = ModelSettings(name, **given)
    _check_defaults(f"{where}.defaults", made)
    return made


def _check_defaults(where: str, made: ModelSettings) -> None:
    """Raises `SettingsError` for values that every chat completion would be refused for."""
    frame = {"messages": [{"role": "user", "content": ""}]}
    try:
        check(_CHAT.read(msgspec.json.encode({**frame, **made.defaults})), made.ranges)
    except GatewayError as problem:
        raise SettingsError(f"{where}: {problem.message}") from None


def _chain(where: str, name: str, models: Models) -> tuple[str, ...]:
    """The model's fallbacks, each followed by its own; each once."""
    found: dict[str, None] = {}
    _follow(where, models, (name,), found)
    return tuple(found)


def _follow(where: str, models: Models, path: tuple[str, ...], found: dict[str, None]) -> None:
    for fallback in models[path[-1]].fallbacks if path[-1] in models else ():
        if fallback in path:
            raise SettingsError(f"{where}: goes round in a circle: {' -> '.join([*path, fallback])}; take one of them out")
        if fallback not in found:
            found[fallback] = None
            if len(found) > MAX_FALLBACKS:
                raise SettingsError(f"{where}: leads to more than {MAX_FALLBACKS} models, one after the other")
            _follow(where, models, (*path, fallback), found)


def check_known(where: str, models: Models, served: Collection[str] | None) -> None:
    """Raises `SettingsError` if a table leads to a model that no backend serves. ``served`` None: they have not all been told,
    and what they serve is found out later."""
    if served is None:
        return
    for one in models.values():
        wanted = [("backend_model", one.backend_model)]
        wanted += [("fallbacks", name) for name in one.fallbacks if name not in models]
        for key, name in wanted:
            if name not in served:
                there_are = ", ".join(sorted(served)[:20])
                raise SettingsError(f"{where}: models.{one.name}.{key}: no backend serves '{name}'; they serve {there_are}")


# --- what is listed ---------------------------------------------------------------------------


def listed(models: Models, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of ``/v1/models`` for names that the backends do not have; ``root`` is what stands behind."""
    there = {entry["id"]: entry for entry in entries}
    return [_entry(one, there.get(one.backend_model, {})) for name, one in models.items() if name not in there]


def _entry(one: ModelSettings, behind: Mapping[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in behind.items() if name != "aliases"}
    return {"created": 0, **told, "id": one.name, "object": "model", "owned_by": "gateway", "root": one.backend_model}


KEYS: Final = (
    ("backend_model", "the table's name", "what the backends call the model; it is not looked up among the tables again"),
    ("fallbacks", "none", "models to try, in this order, when no backend of this one can take the request; theirs follow"),
    ("defaults", "none", "table of fields for requests that do not have them: max_tokens, temperature, stop..."),
    ("ranges", "any", "table of what may be asked for: max_tokens, context_length, max_n, allow_logprobs, allow_tools"),
)

EXAMPLE: Final = """\
[models.fast]
backend_model = "qwen3-8b"
fallbacks = ["llama-3-70b"]

[models.fast.defaults]
temperature = 0.2
max_tokens = 1024

[models."llama-3-70b".ranges]
max_tokens = 4096
"""


def markdown_lines() -> Iterator[str]:
    """The part of docs/configuration.md on models."""
    yield "\n## Models\n\n"
    yield "Models need no settings. A table of the TOML file says what is different about one (docs/models.md).\n\n"
    yield f"```toml\n{EXAMPLE}```\n\n"
    yield "| key | default | meaning |\n|---|---|---|\n"
    for name, default, help in KEYS:
        yield f"| `{name}` | {default} | {help} |\n"
