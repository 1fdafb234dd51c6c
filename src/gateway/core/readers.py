"""What the value of a setting may look like: readers from text, or TOML's own types, to the value.

Each takes a string, or a number or boolean as TOML has them, and raises ValueError with what is expected.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from . import sources

MAX_TEXT: Final = 4096
MAX_NAMES: Final = 1000
MAX_NESTED: Final = 64
"""Tables and lists of a TOML file within one another."""

MAX_PROBLEM: Final = 200
"""Characters of a parser's own words that an error repeats."""


class SettingsError(ValueError):
    """A setting is wrong; the text names it, where it came from, and what would be right."""


Reader = Callable[[Any], Any]


def read_toml(where: str, text: str) -> dict[str, Any]:
    """What a TOML file says. ``where`` names it. Raises `SettingsError`.

    Beyond what the parser sees to: integers are of 64 bits, as TOML has them, and nothing is nested so deeply that it could
    not be shown or passed on.
    """
    try:
        found = tomllib.loads(text)
    except ValueError as problem:  # which a number of thousands of digits is too
        raise SettingsError(f"{where}: is not TOML: {str(problem)[:MAX_PROBLEM]}") from None
    except RecursionError:
        raise SettingsError(f"{where}: {_TOO_DEEP}") from None
    level: list[Any] = [found]
    for _ in range(MAX_NESTED):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        if any(isinstance(one, int) and not -(2**63) <= one < 2**63 for one in level):
            raise SettingsError(f"{where}: has a number of more than 64 bits")
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return found
    raise SettingsError(f"{where}: {_TOO_DEEP}")


_TOO_DEEP: Final = f"tables and lists are nested more than {MAX_NESTED} deep"


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


def number(low: float, high: float) -> Reader:
    """A number from ``low`` to ``high``, with or without decimals."""
    expected = f"a number from {low:g} to {high:g}"

    def read(value: Any) -> float:
        found = _quantity(value, {"": 1}, expected)
        if not low <= found <= high:
            raise ValueError(expected)
        return found

    return read


def seconds(low: float, high: float = 86400.0, *, or_never: bool = False) -> Reader:
    """Seconds, or a number with ms, s, m, h or d; ``or_never``: 0 is one too."""
    expected = f"a duration from {low:g} s to {high:.15g} s, such as 30, 500ms or 2m" + (", or 0" if or_never else "")

    def read(value: Any) -> float:
        found = _quantity(value, {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}, expected)
        if not low <= found <= high and not (or_never and found == 0):
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
    """A base URL without its trailing slash; a trailing ``/v1``, as SDKs want it, is taken off. Or one of `core.sources`."""
    expected = "a URL such as http://127.0.0.1:8000, without user, query or fragment"
    url = text(value)
    if sources.is_source(url):
        return sources.written(sources.read_url(url))
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


def backend_urls(value: Any) -> tuple[str, ...]:
    """Base URLs with commas between them, each once."""
    urls = tuple(backend_url(url) for url in text(value).split(",") if url.strip())
    if len(set(urls)) < len(urls):
        raise ValueError("a list of URLs of which each stands there once")
    return urls


@dataclass(frozen=True)
class RedisServer:
    """Where a Redis or Valkey server is, and what it wants to hear."""

    tls: bool
    host: str
    port: int
    username: str | None
    password: str | None = field(repr=False)
    database: int

    @property
    def where(self) -> str:
        """For people: without the password."""
        return f"{self.host}:{self.port}"


def redis_url(value: Any) -> RedisServer:
    """``redis://[[user]:password@]host[:port][/database]``, or ``rediss`` for TLS."""
    expected = "a URL such as redis://:password@127.0.0.1:6379/0, or rediss:// for TLS"
    url = text(value)
    try:
        parts = urlsplit(url)
        port, database = parts.port, parts.path.strip("/")
        found = host(parts.hostname or "")
    except ValueError:
        raise ValueError(expected) from None
    whole = parts.scheme in ("redis", "rediss") and re.fullmatch(r"[0-9]{0,4}", database) and port != 0
    if not whole or parts.query or parts.fragment:
        raise ValueError(expected)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return RedisServer(parts.scheme == "rediss", found, port or 6379, user or None, password or None, int(database or 0))


def dns_server(value: Any) -> tuple[str, int]:
    """The literal address of a name server, and its port: 53 unless it says another."""
    expected = "the address of a name server, such as 10.0.0.10, 10.0.0.10:5353 or [::1]:53"
    found = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+))(?::(?P<port>[0-9]{1,5}))?", text(value))
    try:
        address = str(ipaddress.ip_address(found["v6"] or found["v4"] if found else ""))
    except ValueError:
        raise ValueError(expected) from None
    port = int((found and found["port"]) or 53)
    if not 0 < port < 65536:
        raise ValueError(expected)
    return address, port


def ledger_place(value: Any) -> str:
    """The path of an SQLite file, or a URL of PostgreSQL; empty for ``off``."""
    place = text(value)
    scheme, is_url, _ = place.partition("://")
    if is_url and scheme not in ("postgres", "postgresql"):
        raise ValueError("the path of an SQLite file, a URL such as postgresql://user@host/database, or off")
    return "" if place.lower() == "off" else place


def name(value: Any) -> str:
    """A name that may stand in a header, a label and a log line as it is."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9._:@/\[\]-]{1,100}", value):
        raise ValueError("a name of letters, digits and . _ : @ / [ ] - (at most 100)")
    return value


def word(value: Any) -> str:
    """A short word in lower case."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9_-]{1,20}", value.strip().lower()):
        raise ValueError("a word such as gpu or cpu")
    return value.strip().lower()


def names(value: Any) -> tuple[str, ...]:
    """A list of texts, each once and in its order."""
    expected = f"a list of at most {MAX_NAMES} names, such as ['llama-3-8b']"
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        raise ValueError(expected)
    found = tuple(dict.fromkeys(text(one) for one in value if isinstance(one, str) and one.strip()))
    if len(found) < len(value):
        raise ValueError(expected)
    return found


def variable(value: Any) -> str:
    """The name of an environment variable."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", value):
        raise ValueError("the name of an environment variable")
    return value


def shown(value: Any) -> str:
    """A value as an error message shows it."""
    written = repr(value)
    return written if len(written) <= 80 else written[:77] + "..."
